"""Recipes of runs that take seconds: a teacher of 64x64 icons from the committed sample, and a student of it."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any
from unittest import mock

ICONS = Path(__file__).parent / "data" / "npm"
TEACHER = """version = 2
[run]
name = "tiny-teacher"
trains = "teacher"
licence = "Apache-2.0"
[data]
folder = "{folder}/data"
concepts = "concepts.txt"
vocabulary = "{folder}/merges.txt.gz"
num_merges = 4
[emoji]
packs = ["noto", "fluent-emoji-flat"]
size_px = 64
[autoencoder]
channels = [8, 8, 16, 16]
num_steps = 2
batch = 2
[decoder]
num_steps = 2
batch = 2
[model]
text_widths = [16, 16]
channels = [16, 32, 32]
norm_groups = 8
heads = [1, 2, 2]
[teacher]
num_steps = 3
batch = 2
[loop]
log_every = 1
"""
STUDENT = """version = 2
[run]
name = "tiny"
trains = "student"
licence = "Apache-2.0"
[prompts]
files = ["{folder}/data/prompts.txt"]
[teacher]
checkpoint = "{teacher}"
sampler = "dpm-solver++"
num_steps = 2
guidance = 3.0
cache_samples = 8
shard_size = 4
batch = 2
[regression]
num_steps = 3
batch = 2
warmup_steps = 1
[pool]
noise_levels = [10, 500]
feature_levels = [0, 5, 9]
heads_per_cell = 2
width = 32
num_blocks = 1
crop_latents = 4
refresh_rate = 0.05
[heads]
lr = 1e-3
[student]
stage_steps = [2, 1, 1, 2]
batch = 2
accumulation = 1
lr = 1e-4
warmup_steps = 2
ema_decay = 0.9
precision = "fp32"
[loop]
log_every = 1
checkpoint_every_s = 0
sample_every = 3
sample_prompts = ["apple", "a banana", "red apple"]
"""


def write_teacher_recipe(folder: Path) -> Path:
    """The teacher's recipe, with its concepts and vocabulary beside it; `build_dataset` makes the data."""
    (folder / "concepts.txt").write_text("# food\nred apple = apple\nbanana\n", encoding="utf-8")
    with gzip.open(folder / "merges.txt.gz", "wt", encoding="utf-8") as file:
        file.write("header\na p\np l\nap pl\nb a\n")
    path = folder / "tiny-teacher.toml"
    path.write_text(TEACHER.format(folder=folder), encoding="utf-8")
    return path


def write_student_recipe(folder: Path, teacher: Path, **changes: object) -> Path:
    """The student's recipe.

    Args:
        teacher: its checkpoint folder.
        changes: as for `changed`.
    """
    path = folder / f"{'-'.join(['tiny', *changes])}.toml"
    path.write_text(changed(STUDENT.format(folder=folder, teacher=teacher), **changes), encoding="utf-8")
    return path


def changed(text: str, **values: object) -> str:
    """A recipe with other values: `student_lr="3e-4"` sets the `lr` of `[student]`, adding it where it is not said."""
    for name, value in values.items():
        section, _, key = name.partition("_")
        head, mark, rest = text.partition(f"[{section}]\n")
        assert mark, f"no [{section}] in the recipe"
        own, bracket, others = rest.partition("\n[")
        lines = [line for line in own.splitlines() if not line.startswith(f"{key} =")]
        text = head + mark + "\n".join([f"{key} = {value}", *lines]) + bracket + others
    return text


def train(recipe: Path, out: Path, **options: Any) -> Path:
    """`nitro_training.train` on the CPU, whatever the machine has: only there are two runs equal bit for bit."""
    from nitro_training import run

    with mock.patch.object(run, "Engine", cpu_engine):
        return run.train(recipe, out=out, **options)


def cpu_engine() -> Any:
    import torch

    from nitro_training.engine import Engine

    engine = Engine()
    engine.device = torch.device("cpu")
    return engine


def require_same_state(expected: Path, found: Path) -> None:
    """Whether two states are equal bit for bit, with what is written beside the tensors."""
    import torch
    from safetensors.torch import load_file

    from nitro_training.checkpoint import read_metadata

    assert read_metadata(expected) == read_metadata(found)
    wanted, tensors = load_file(expected), load_file(found)
    assert wanted.keys() == tensors.keys()
    differing = [key for key, value in wanted.items() if not torch.equal(value, tensors[key])]
    assert not differing, f"{len(differing)} of {len(wanted)} tensors differ, first {differing[0]}"


def read_scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of a log: (step, value) by name."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    found.Reload()
    return {name: [(event.step, event.value) for event in found.Scalars(name)] for name in found.Tags()["scalars"]}

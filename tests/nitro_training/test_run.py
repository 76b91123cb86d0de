"""A whole tiny run: autoencoder, teacher, pairs, student, decoder, checkpoint; and what happens when it is stopped."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file

from nitro_rt.errors import ConfigError, TrainingError
from nitro_training import checkpoint, loop, train
from nitro_training.emoji import build_dataset
from nitro_training.recipe import read_recipe

ICONS = Path(__file__).parents[1] / "data" / "npm"
RECIPE = """version = 1
[run]
name = "tiny"
licence = "Apache-2.0"
data = "{data}"
concepts = "concepts.txt"
vocabulary = "{vocabulary}"
num_merges = 4
[emoji]
packs = ["noto", "fluent-emoji-flat"]
size_px = 64
[autoencoder]
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
[pool]
width = 32
num_blocks = 1
[student]
warmup_steps = 2
adversarial_steps = 2
batch = 2
num_pairs = 8
teacher_steps = 2
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    (folder / "concepts.txt").write_text("# food\nred apple = apple\nbanana\n", encoding="utf-8")
    with gzip.open(folder / "merges.txt.gz", "wt", encoding="utf-8") as file:
        file.write("header\na p\np l\nap pl\nb a\n")
    path = folder / "tiny.toml"
    path.write_text(RECIPE.format(data=folder / "data", vocabulary=folder / "merges.txt.gz"), encoding="utf-8")
    build_dataset(read_recipe(path).emoji, folder / "concepts.txt", ICONS, folder / "data")
    return path


@pytest.fixture(scope="module")
def finished(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "tiny"
    assert train(recipe, out=out) == out / "checkpoint"
    return out


def test_diffusers_loads_the_checkpoint_unmodified(finished: Path) -> None:
    pipe = StableDiffusionXLPipeline.from_pretrained(finished / "checkpoint", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    images = pipe("an apple", num_inference_steps=1, guidance_scale=0.0, output_type="np").images
    assert images.shape == (1, 64, 64, 3) and pipe.vae.config.scaling_factor == 1.0


def test_the_checkpoint_is_half_precision_safetensors_only(finished: Path) -> None:
    weights = list((finished / "checkpoint").rglob("*.safetensors"))
    assert len(weights) == 4
    assert all(t.dtype == torch.float16 for path in weights for t in load_file(path).values() if t.is_floating_point())
    assert not [path for path in (finished / "checkpoint").rglob("*") if path.suffix in (".bin", ".pt", ".pkl", ".ckpt")]


def test_run_json_says_what_was_run(finished: Path) -> None:
    facts = json.loads((finished / "checkpoint" / "run.json").read_text())
    assert facts["shifted_timestep"] == 500
    assert facts["steps_done"] == {"autoencoder": 2, "teacher": 3, "student": 4, "decoder": 2}
    assert facts["recipe"]["teacher"]["num_steps"] == 3


def test_a_run_is_not_overwritten_without_resume(recipe: Path, finished: Path) -> None:
    with pytest.raises(TrainingError, match=r"already holds a run; add --resume"):
        train(recipe, out=finished)


def test_a_stopped_run_resumes_bit_for_bit(recipe: Path, finished: Path, tmp_path: Path) -> None:
    """Stopped in every stage after one step, and again after two, the run ends with the uninterrupted run's weights."""
    for max_steps in (1, 2, None):
        train(recipe, out=tmp_path, max_steps=max_steps, resume=True)
    for part in ("unet/diffusion_pytorch_model", "text_encoder_2/model", "vae/diffusion_pytorch_model"):
        for kind in ("teacher", "checkpoint"):
            expected = load_file(finished / kind / f"{part}.safetensors")
            actual = load_file(tmp_path / kind / f"{part}.safetensors")
            assert all(torch.equal(actual[key], value) for key, value in expected.items()), (kind, part)


def test_a_run_killed_between_two_checkpoints_resumes_bit_for_bit(
    recipe: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The student's second step dies after a checkpoint of the first; the trace then equals the uninterrupted one."""
    shutil.copytree(finished, tmp_path / "run")
    run = tmp_path / "run"
    for name in ("student.safetensors", "student.loss.jsonl"):
        (run / name).unlink()
    train(recipe, out=run, max_steps=3, resume=True)

    def die(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(loop, "_require_finite", die)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, out=run, resume=True)
    train(recipe, out=run, resume=True)
    expected, actual = load_file(finished / "student.safetensors"), load_file(run / "student.safetensors")
    assert expected.keys() == actual.keys()
    assert all(torch.equal(actual[key], value) for key, value in expected.items())


def test_a_changed_recipe_does_not_resume(recipe: Path, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    changed = recipe.parent / "changed.toml"
    changed.write_text(recipe.read_text().replace("num_steps = 3", "num_steps = 5"), encoding="utf-8")
    with pytest.raises(TrainingError, match=r"teacher.safetensors was written with other options"):
        train(changed, out=tmp_path / "run", resume=True)


def test_a_damaged_state_is_said(recipe: Path, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    state = tmp_path / "run" / "teacher.safetensors"
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(TrainingError, match=r"teacher.safetensors is damaged"):
        train(recipe, out=tmp_path / "run", resume=True)


def test_a_folder_that_cannot_be_written_is_said(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(TrainingError, match="cannot write to"):
        train(recipe, out=tmp_path / "file" / "run")


def test_a_full_disk_keeps_the_state_before(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = tmp_path / "teacher.safetensors"
    shutil.copy(finished / "teacher.safetensors", state)
    before = state.read_bytes()

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(TrainingError, match="No space left on device; what was there before is kept"):
        checkpoint.write_tensors(state, {"x": torch.zeros(1)}, {})
    assert state.read_bytes() == before and [path.name for path in tmp_path.iterdir()] == ["teacher.safetensors"]


def test_a_dry_run_changes_nothing(recipe: Path, tmp_path: Path) -> None:
    seen: list[str] = []
    train(recipe, out=tmp_path / "run", dry_run=True, report=lambda stage, done, total, losses: seen.append(stage))
    assert seen == ["autoencoder", "teacher", "pairs", "student", "decoder"]
    assert not (tmp_path / "run").exists()


def test_data_made_with_other_options_are_refused(recipe: Path, tmp_path: Path) -> None:
    changed = recipe.parent / "other-data.toml"
    changed.write_text(recipe.read_text().replace("size_px = 64", "size_px = 128"), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"made with other \[emoji\] options"):
        train(changed, out=tmp_path / "run")


def test_a_loss_that_is_not_finite_stops_the_stage_by_name() -> None:
    with pytest.raises(TrainingError, match=r"student: g_loss became nan at step 7"):
        loop._require_finite("student", 7, {"regression": 1.0, "g_loss": float("nan")})

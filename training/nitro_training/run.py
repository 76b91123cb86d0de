"""A whole run of a recipe, in a folder of its own."""

from __future__ import annotations

import dataclasses
import errno
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from filelock import FileLock, Timeout
from torch.nn.attention import SDPBackend, sdpa_kernel

from nitro_rt.errors import ConfigError, TrainingError
from nitro_training import checkpoint, distillation, pretraining
from nitro_training.engine import Engine
from nitro_training.facts import Report
from nitro_training.loop import Losses
from nitro_training.plan import plan, render
from nitro_training.recipe import StudentRecipe, TeacherRecipe, read_recipe

_CANNOT_WRITE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EEXIST)


def train(
    recipe: Path,
    *,
    out: Path | None = None,
    max_steps: int | None = None,
    resume: bool = False,
    allow_changed: bool = False,
    report: Report = lambda stage, done, total, losses: None,
) -> Path:
    """Run a recipe.

    Args:
        out: the run's folder; `runs/<name>` by default. The finished checkpoint is its `checkpoint` folder.
        max_steps: stop every stage after this many steps (a trial of the whole way).
        resume: go on with what the folder holds; without it, a folder with a run in it is refused.
        allow_changed: resume although options have changed since.
    Returns: the checkpoint folder.
    Raises: ConfigError for a wrong recipe or missing data, TrainingError where the run cannot start or go on.
    """
    resolved = read_recipe(recipe)
    if max_steps is not None and max_steps < 1:
        raise ConfigError(f"--max-steps must be at least 1, got {max_steps}")
    if allow_changed and not resume:
        raise ConfigError("--allow-changed goes on with a run whose options have changed; it needs --resume")
    engine = Engine()
    try:
        return _train(resolved, engine, out, max_steps, resume, allow_changed, report)
    finally:
        engine.close()


def _train(
    resolved: TeacherRecipe | StudentRecipe, engine: Engine, out: Path | None, max_steps: int | None, resume: bool,
    allow_changed: bool, report: Report,
) -> Path:  # fmt: skip
    engine.require_same("their recipe", checkpoint.digest_of(dataclasses.asdict(resolved)))
    job = _job(resolved, engine)
    folder = out or Path("runs") / resolved.run.name
    if (folder / "run.json").exists() and not resume:
        raise TrainingError(f"{folder} already holds a run; add --resume to go on with it, or choose another --out")
    engine.barrier()  # nobody writes before everybody has looked
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _lock(folder, engine), _attention(engine):
            return job.run(folder, max_steps, allow_changed, report if engine.is_main else _silent)
    except Timeout as exc:
        raise TrainingError(f"another process is training in {folder}; wait for it or choose another --out") from exc
    except OSError as exc:
        if exc.errno not in _CANNOT_WRITE:
            raise
        raise TrainingError(f"cannot write to {folder}: {exc}") from exc


def describe(recipe: Path, max_steps: int | None = None) -> str:
    """What a run of this recipe would be, without running it: for a student parameters, FLOPs, memory and a go or no-go.

    Raises: as `train`, for the recipe; a small teacher's data must be there, an SDXL teacher's weights need not.
    """
    resolved = read_recipe(recipe)
    if isinstance(resolved, StudentRecipe):
        return render(plan(resolved))
    pretraining.Pretraining(resolved)
    lengths = pretraining.stage_lengths(resolved)
    return "\n".join(f"{name}: {min(length, max_steps or length)} steps" for name, length in lengths.items())


def _job(recipe: TeacherRecipe | StudentRecipe, engine: Engine) -> pretraining.Pretraining | distillation.Distillation:
    if isinstance(recipe, StudentRecipe):
        return distillation.Distillation(recipe, engine)
    if engine.num_processes > 1:
        raise ConfigError(f"{recipe.run.name} trains a teacher, which needs one process; there are {engine.num_processes}")
    return pretraining.Pretraining(recipe)


def _silent(stage: str, done: int, total: int, losses: Losses) -> None:
    """What the other processes report: the main one's losses are already everyone's mean."""


def _lock(folder: Path, engine: Engine) -> AbstractContextManager[object]:
    return FileLock(folder / ".lock", timeout=0) if engine.is_main else nullcontext()


def _attention(engine: Engine) -> AbstractContextManager[object]:
    """On a CPU the plain attention is the fastest: the fused kernel loses on maps of 8x8 and smaller (1.11 s against 0.88 s
    for a step of 64 latents of 16x16 through a UNet of widths 32/64/160, two cores)."""
    return sdpa_kernel(SDPBackend.MATH) if engine.device.type == "cpu" else nullcontext()

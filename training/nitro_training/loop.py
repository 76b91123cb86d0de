"""The training loop that every stage shares: step, log, checkpoint, resume.

All randomness of a step follows from the stage's seed and the step's number, so a resumed run continues exactly as the
uninterrupted one would have: no generator state and no data position need to be stored.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from nitro_rt.errors import ConfigError, TrainingError
from nitro_training import checkpoint

if TYPE_CHECKING:
    from nitro_training.engine import Engine

Losses = dict[str, float]


class Stage(Protocol):
    """One thing to train."""

    name: str
    num_steps: int
    seed: int

    def state(self) -> checkpoint.RunState: ...

    def step(self, step: int) -> Losses: ...


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How a stage is logged and kept; none of this changes what is trained, so all of it may change at a resume."""

    log_every: int = 20
    """Steps between two lines of the loss log."""
    checkpoint_every_s: float = 120.0
    """Seconds between two checkpoints."""
    loss_limit: float = 1e4
    """A loss or gradient norm beyond this stops the run as diverged."""
    sample_every: int = 0
    """Steps between two sheets of sample pictures; 0 draws none."""
    sample_prompts: tuple[str, ...] = ()
    """What the sample sheets show."""

    def __post_init__(self) -> None:
        if self.log_every < 1:
            raise ConfigError(f"loop.log_every must be at least 1, got {self.log_every}")
        if self.sample_every and not self.sample_prompts:
            raise ConfigError("loop.sample_every needs loop.sample_prompts to draw")


def step_generator(seed: int, step: int) -> torch.Generator:
    """The only source of randomness of one step of a pretraining stage."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def run(
    stage: Stage,
    folder: Path,
    *,
    options: dict[str, Any],
    upstream: str = "",
    config: LoopConfig | None = None,
    max_steps: int | None = None,
    allow_changed: bool = False,
    engine: Engine | None = None,
    report: Callable[[int, Losses], None] = lambda step, losses: None,
) -> int:
    """Train `stage` in `folder` up to its number of steps (or `max_steps`, if lower), resuming what is there.

    A checkpoint is written at the end and every `checkpoint_every_s`. Ctrl-C writes none: a step cut in two may have
    moved half the weights, so the last whole checkpoint is what counts.

    Args:
        options: what decides the result; a state written with others is refused unless `allow_changed`.
        upstream: what the earlier stages have become; a state that was trained on less of them is dropped and begun again.
        engine: the processes that train together; only its main one writes.
    Returns: the number of steps done in all.
    Raises: TrainingError if a loss or a weight stops being finite or a loss passes `loss_limit` (the last good checkpoint is
        kept), if a state does not fit, or if there is no room for one.
    """
    config = config or LoopConfig()
    is_main = engine is None or engine.is_main
    agreed = engine.decide if engine else bool  # clocks differ, and sharded weights are saved by all processes together
    path = folder / f"{stage.name}.safetensors"
    is_current = path.is_file() and checkpoint.read_metadata(path).get("upstream", "") == upstream
    last = min(stage.num_steps, max_steps if max_steps is not None else stage.num_steps)
    if not is_current:
        _require_shorter(path, last)
    first = checkpoint.load(path, stage.state(), options=options, allow_changed=allow_changed) if is_current else 0
    if engine:
        engine.require_same(f"the step that {stage.name} goes on from", first)

    def save(step: int) -> None:
        tensors = stage.state().tensors(keep=is_main)
        if is_main:
            _require_finite(stage.name, step, tensors)
            checkpoint.save(path, tensors, step=step, options=options, upstream=upstream)

    if is_main:
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint.remove_leftover(path)
        checkpoint.require_space(path, stage.state())
    log = _LossLog(folder / f"{stage.name}.loss.jsonl", first, config.log_every) if is_main else None
    saved_at, done = time.monotonic(), first
    for step in range(first, last):
        losses = stage.step(step)
        done = step + 1
        _require_sane(stage.name, done, losses, config.loss_limit)
        report(done, losses)
        if log:
            log.add(done, losses)
        if done % config.log_every == 0 and agreed(time.monotonic() - saved_at > config.checkpoint_every_s):
            save(done)
            saved_at = time.monotonic()
    if done > first:
        save(done)
    return done


class _LossLog:
    """One line per `every` steps: the mean of each loss over the steps that gave it."""

    def __init__(self, path: Path, first: int, every: int) -> None:
        self.path, self.every = path, every
        self.sums: dict[str, tuple[float, int]] = {}
        _truncate_log(path, first)

    def add(self, done: int, losses: Losses) -> None:
        for key, value in losses.items():
            total, count = self.sums.get(key, (0.0, 0))
            self.sums[key] = (total + value, count + 1)
        if done % self.every == 0:
            means = {key: round(total / count, 6) for key, (total, count) in self.sums.items()}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": done, **means}) + "\n")
            self.sums = {}


def learning_rate(step: int, *, peak: float, num_steps: int, warmup_steps: int, final: float = 0.02) -> float:
    """Linear warm-up, then a cosine from `peak` down to `final * peak`."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    return peak * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = value


def _require_shorter(path: Path, last: int) -> None:
    """A state that does not fit what was before it is begun again, but not by a trial that ends before it."""
    if (done := checkpoint.steps_done(path)) > last:
        raise TrainingError(
            f"{path} holds {done} steps on top of other stages than this run's, which would end after {last}: they would be "
            "lost; leave out --max-steps, or choose another --out"
        )


def _require_sane(name: str, done: int, losses: Losses, limit: float) -> None:
    wrong = {key: value for key, value in losses.items() if not math.isfinite(value)}
    if wrong:
        terms = ", ".join(f"{key} is {value}" for key, value in wrong.items())
        raise TrainingError(f"{name}: not finite at step {done}: {terms}; the last good checkpoint is kept")
    for key, value in losses.items():
        if ("loss" in key or "norm" in key) and abs(value) > limit:
            raise TrainingError(
                f"{name}: {key} is {value:.4g} at step {done}, beyond loop.loss_limit = {limit:g}: the run diverged; "
                "the last good checkpoint is kept. Lower the learning rate, or raise the limit if this is meant"
            )


def _require_finite(name: str, done: int, tensors: Mapping[str, Tensor]) -> None:
    """A step whose losses and gradients are finite may still end in weights that are not: they must not replace good ones."""
    wrong = [key for key, tensor in tensors.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if wrong:
        raise TrainingError(
            f"{name}: {len(wrong)} tensors are not finite after step {done}, first {wrong[0]}; the last good checkpoint is kept"
        )


def _truncate_log(path: Path, step: int) -> None:
    """Drop the lines that a killed run logged after its last checkpoint: they will be logged again."""
    if path.is_file():
        kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
        temporary = path.with_suffix(".partial")
        temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        os.replace(temporary, path)


def _step_of(line: str) -> float:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError):
        return math.inf

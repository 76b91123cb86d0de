"""The training loop that every stage shares: step, log, checkpoint, resume.

All randomness of a step comes from a generator seeded by (seed, step), so a resumed run continues exactly as the
uninterrupted one would have: no generator state and no data position need to be stored.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from nitro_rt.errors import TrainingError
from nitro_training import checkpoint

Losses = dict[str, float]


class Stage(Protocol):
    """One thing to train."""

    name: str
    num_steps: int
    seed: int

    def state(self) -> checkpoint.RunState: ...

    def step(self, step: int, generator: torch.Generator) -> Losses: ...


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How a stage runs; none of this changes what is trained."""

    log_every: int = 20
    """Steps between two lines of the loss log."""
    checkpoint_every_s: float = 120.0
    """Seconds between two checkpoints."""


def step_generator(seed: int, step: int) -> torch.Generator:
    """The only source of randomness of one step."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def run(
    stage: Stage,
    folder: Path,
    *,
    digest: str,
    upstream: str = "",
    config: LoopConfig | None = None,
    max_steps: int | None = None,
    report: Callable[[int, Losses], None] = lambda step, losses: None,
) -> int:
    """Train `stage` in `folder` up to its number of steps (or `max_steps`, if lower), resuming what is there.

    A checkpoint is written at the end and every `checkpoint_every_s`. Ctrl-C writes none: a step cut in two may have
    moved half the weights, so the last whole checkpoint is what counts.

    Args:
        digest: of the options; a state written with others is refused.
        upstream: what the earlier stages have become; a state that was trained on less of them is dropped and begun again.
    Returns: the number of steps done in all.
    Raises: TrainingError if a loss stops being finite; the last good checkpoint is kept.
    """
    config = config or LoopConfig()
    path = folder / f"{stage.name}.safetensors"
    log_path = folder / f"{stage.name}.loss.jsonl"
    is_current = path.is_file() and checkpoint.read_metadata(path).get("upstream", "") == upstream
    first = checkpoint.load(path, stage.state(), digest=digest) if is_current else 0
    last = min(stage.num_steps, max_steps if max_steps is not None else stage.num_steps)
    folder.mkdir(parents=True, exist_ok=True)
    _truncate_log(log_path, first)
    saved_at, done = time.monotonic(), first
    sums: Losses = {}
    with log_path.open("a", encoding="utf-8") as log:
        for step in range(first, last):
            losses = stage.step(step, step_generator(stage.seed, step))
            _require_finite(stage.name, step, losses)
            done = step + 1
            for key, value in losses.items():
                sums[key] = sums.get(key, 0.0) + value
            report(done, losses)
            if done % config.log_every == 0:
                means = {key: round(value / config.log_every, 6) for key, value in sums.items()}
                log.write(json.dumps({"step": done, **means}) + "\n")
                log.flush()
                sums = {}
            if time.monotonic() - saved_at > config.checkpoint_every_s and done % config.log_every == 0:
                checkpoint.save(path, stage.state(), step=done, digest=digest, upstream=upstream)
                saved_at = time.monotonic()
    if done > first:
        checkpoint.save(path, stage.state(), step=done, digest=digest, upstream=upstream)
    return done


def learning_rate(step: int, *, peak: float, num_steps: int, warmup_steps: int, final: float = 0.02) -> float:
    """Linear warm-up, then a cosine from `peak` down to `final * peak`."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    return peak * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = value


def _require_finite(name: str, step: int, losses: Losses) -> None:
    for key, value in losses.items():
        if not math.isfinite(value):
            raise TrainingError(f"{name}: {key} became {value} at step {step}; the last good checkpoint is kept")


def _truncate_log(path: Path, step: int) -> None:
    """Drop the lines that a killed run logged after its last checkpoint: they will be logged again."""
    if path.is_file():
        kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
        path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")


def _step_of(line: str) -> float:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError):
        return math.inf

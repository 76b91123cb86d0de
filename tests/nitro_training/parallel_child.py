"""A tiny student's training, as one of several processes runs it; test_engine.py starts them and runs it alone, too.

    python parallel_child.py OUT STRATEGY...    with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set

For each strategy: train `STEPS` optimiser steps with a checkpoint in the middle, then once more from that checkpoint in a
fresh stage. The main process writes what came out to OUT/<strategy>.json and the checkpoints beside it.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nitro_training import checkpoint
from nitro_training.adversary import Adversary, Condition
from nitro_training.backbone import UNetFeatures
from nitro_training.engine import Engine
from nitro_training.loop import Losses
from nitro_training.losses import GAMES
from nitro_training.model import ModelConfig, build_unet
from nitro_training.pool import HeadOptimizerConfig, HeadPool, PoolConfig
from nitro_training.randomness import BatchRandom
from nitro_training.samples import Sample
from nitro_training.student import StudentConfig, StudentStage
from nitro_training.teacher import alphas_cumprod

MODEL = ModelConfig(text_widths=(16, 16), channels=(16, 32, 32), norm_groups=8, heads=(1, 2, 2))
SIDE, CROP, TOKENS = 16, 8, 5
LEVELS = (0, 1, 4, 5)
"""No features of 2x2: what a head makes of them is one number per channel, its normalisation leaves little but signs, and a
win or a loss hangs on the last bit."""
STEPS, SAVED_AT = 4, 2
STRATEGIES = {"ddp": "false", "fsdp": "true"}


class SeededSamples:
    """Stands in for a teacher: everything follows from the batch's randomness, sample by sample."""

    def draw(self, random: BatchRandom) -> Sample:
        noise, x0 = random.randn(4, SIDE, SIDE), random.randn(4, SIDE, SIDE)
        return Sample(noise, x0, Condition(random.randn(TOKENS, sum(MODEL.text_widths)), random.randn(MODEL.text_widths[1])))


def make_stage(engine: Engine, batch: int) -> StudentStage:
    """All three tasks, accumulation, refresh, an extra update of the heads, an average, and steps one and two."""
    torch.manual_seed(0)
    unet = build_unet(MODEL, SIDE * 8).eval()
    features = UNetFeatures(unet)
    config = PoolConfig(width=32, num_blocks=1, heads_per_cell=2, refresh_rate=0.05, crop_latents=CROP, feature_levels=LEVELS)
    sides = {task: features.sides(CROP if task.startswith("local") else SIDE) for task in config.tasks}
    pool = HeadPool(config, features.channels(), sides, optimizer=HeadOptimizerConfig(lr=1e-3))
    null = Condition(torch.zeros(1, TOKENS, sum(MODEL.text_widths)), torch.zeros(1, MODEL.text_widths[1]))
    adversary = Adversary(features, pool, GAMES["hinge"], alphas_cumprod(), null)
    student = StudentConfig(
        stage_steps=(2, 2), batch=batch, accumulation=2, d_updates=2, lr=1e-4, warmup_steps=0, ema_decay=0.5, precision="fp32",
        regression_weight=0.1,
    )  # fmt: skip
    return StudentStage(student, unet, adversary, SeededSamples(), engine)


def run(engine: Engine, batch: int, out: Path, name: str) -> dict[str, Any]:
    """Losses of all steps, and of the steps after the checkpoint by a stage that has loaded it."""
    stage = make_stage(engine, batch)
    path = out / f"{name}.safetensors"
    losses = []
    for step in range(STEPS):
        losses.append(stage.step(step))
        if step + 1 == SAVED_AT:
            save(engine, stage, path, SAVED_AT)
    save(engine, stage, out / f"{name}-end.safetensors", STEPS)
    published = {key: float(value.double().norm()) for key, value in stage.published().state_dict().items()}
    engine.barrier()  # nobody reads before it is written
    resumed = resume(engine, batch, path)
    return {"losses": losses, "resumed": resumed, "published": published, "facts": engine.facts({"student": batch})}


def save(engine: Engine, stage: StudentStage, path: Path, step: int) -> None:
    tensors = stage.state().tensors(keep=engine.is_main)
    if engine.is_main:
        checkpoint.save(path, tensors, step=step, options={})


def resume(engine: Engine, batch: int, path: Path) -> list[Losses]:
    stage = make_stage(engine, batch)
    scramble(stage.unet, stage.adversary.pool)
    first = checkpoint.load(path, stage.state(), options={})
    return [stage.step(step) for step in range(first, STEPS)]


@torch.no_grad()
def scramble(*modules: nn.Module) -> None:
    """So that only what is loaded can make it right again."""
    parameters: list[Tensor] = [parameter for module in modules for parameter in module.parameters()]
    for parameter in parameters:
        parameter.fill_(0.5)


def main() -> None:
    out = Path(sys.argv[1])
    for strategy in sys.argv[2:]:
        os.environ["ACCELERATE_USE_FSDP"] = STRATEGIES[strategy]
        engine = Engine()
        os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)  # the next one must not meet this one's store
        assert engine.strategy == strategy, engine.strategy
        result = run(engine, 2, out, strategy)
        if engine.is_main:
            (out / f"{strategy}.json").write_text(json.dumps(result))
        engine.close()


if __name__ == "__main__":
    main()

"""Everything that a student trains with, at toy size and in memory: a UNet of SDXL's topology, samples, an adversary, a stage.

Nothing here is changed by a test: what is trained is a copy.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from nitro_training.adversary import Adversary, Condition
from nitro_training.backbone import UNetFeatures
from nitro_training.engine import Engine
from nitro_training.losses import GAMES
from nitro_training.model import ModelConfig, build_unet
from nitro_training.pool import HeadOptimizerConfig, HeadPool, PoolConfig
from nitro_training.randomness import BatchRandom, generator
from nitro_training.samples import Sample
from nitro_training.student import StudentConfig, StudentStage
from nitro_training.teacher import alphas_cumprod

MODEL = ModelConfig(text_widths=(16, 16), channels=(8, 16, 24), norm_groups=8, heads=(1, 2, 2))
"""Another width at every level, so that a head on the wrong feature does not fit."""
SIDE, CROP, TOKENS = 16, 8, 3
POOL = PoolConfig(width=64, num_blocks=1, crop_latents=CROP)
HEADS = HeadOptimizerConfig(lr=1e-2, betas=(0.5, 0.99), weight_decay=0.1)
STUDENT = StudentConfig(
    stage_steps=(1, 1, 1, 1), batch=2, accumulation=1, lr=1e-3, warmup_steps=0, weight_decay=0.1, precision="fp32"
)


@lru_cache
def unet() -> UNet2DConditionModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build_unet(MODEL, SIDE * 8).eval()


@lru_cache
def backbone() -> UNetFeatures:
    """Another UNet's eyes than the student's own start."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return UNetFeatures(build_unet(MODEL, SIDE * 8))


def condition(num: int = 2, *name: int | str) -> Condition:
    """Prompts' conditioning, random."""
    source = generator("condition", *name)
    return Condition(torch.randn(num, TOKENS, 32, generator=source), torch.randn(num, 16, generator=source))


def null() -> Condition:
    """A null condition that is told from zeros and from every prompt."""
    return condition(1, "null")


def latents(*name: int | str, num: int = 2) -> Tensor:
    return torch.randn(num, 4, SIDE, SIDE, generator=generator("latents", *name))


def batch_random(*name: int | str, num: int = 2) -> BatchRandom:
    return BatchRandom("test", *name, first=0, num=num)


def head_pool(optimizer: HeadOptimizerConfig = HEADS, **options: Any) -> HeadPool:
    config = dataclasses.replace(POOL, **options)
    sides = {task: backbone().sides(config.crop_latents if task.startswith("local") else SIDE) for task in config.tasks}
    return HeadPool(config, backbone().channels(), sides, optimizer=optimizer)


def adversary(*, game: str = "hinge", abar: Tensor | None = None, eyes: Any = None, **options: Any) -> Adversary:
    """
    Args:
        abar: ones make every look free of noise.
        eyes: instead of the backbone.
    """
    abar = alphas_cumprod() if abar is None else abar
    return Adversary(eyes or backbone(), head_pool(**options), GAMES[game], abar, null())


class MemorySamples:
    """A teacher's results from memory: anything that follows from noise and prompt."""

    def draw(self, random: BatchRandom) -> Sample:
        noise, embeds, pooled = random.randn(4, SIDE, SIDE), random.randn(TOKENS, 32), random.randn(16)
        return Sample(noise, 0.5 * noise.roll(1, -1) + pooled[:, :1, None, None], Condition(embeds, pooled))


@lru_cache
def engine() -> Engine:
    """One process on the CPU, whatever the machine has."""
    one = Engine()
    one.device = torch.device("cpu")
    return one


def student_stage(pool: Mapping[str, Any] | None = None, **options: Any) -> StudentStage:
    """
    Args:
        pool: options of the pool and `optimizer`, that of its heads.
        options: of the student.
    """
    config = dataclasses.replace(STUDENT, **options)
    return StudentStage(config, unet(), adversary(game=config.loss, **(pool or {})), MemorySamples(), engine())


def copies(module: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in module.parameters()]


def same(before: list[Tensor], module: nn.Module) -> bool:
    """Whether every weight is what it was, bit for bit."""
    return all(torch.equal(old, new) for old, new in zip(before, module.parameters(), strict=True))


def is_free_of_gradient(module: nn.Module) -> bool:
    return all(parameter.grad is None for parameter in module.parameters())


plain = contextlib.nullcontext
"""No autocast."""

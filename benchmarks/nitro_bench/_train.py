"""Child process of `training`: one loop of one size, checked and then timed.

`python -m nitro_bench._train REQUEST` with the request as JSON; prints one line of JSON.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from nitro_bench._draw import peak_rss_bytes
from nitro_bench.ladd import LaddLoop
from nitro_rt.errors import TrainingError
from nitro_training.adversary import Adversary, Condition
from nitro_training.backbone import UNetFeatures
from nitro_training.engine import Engine
from nitro_training.losses import GAMES
from nitro_training.model import LATENT_PX, ModelConfig, build_unet
from nitro_training.pool import HeadOptimizerConfig, HeadPool, PoolConfig
from nitro_training.randomness import BatchRandom
from nitro_training.samples import Sample
from nitro_training.student import StudentConfig, StudentStage
from nitro_training.teacher import alphas_cumprod

SHIFT = 500
TOKENS = 77
NUM_SAMPLES = 64


class Loop(Protocol):
    unet: nn.Module

    def step(self, step: int) -> dict[str, float]: ...


@dataclass(frozen=True)
class MemorySamples:
    """Stand-in for the teacher: random latents and prompts in memory."""

    noise_N4hw: Tensor
    x0_N4hw: Tensor
    embeds_NTC: Tensor
    pooled_NP: Tensor

    @classmethod
    def make(cls, side: int, embeds: int, pooled: int, device: torch.device) -> MemorySamples:
        source = torch.Generator().manual_seed(0)
        shapes = (4, side, side), (4, side, side), (TOKENS, embeds), (pooled,)
        return cls(*(torch.randn(NUM_SAMPLES, *shape, generator=source).to(device) for shape in shapes))

    def draw(self, random: BatchRandom) -> Sample:
        rows = random.randint(NUM_SAMPLES).to(self.x0_N4hw.device)
        condition = Condition(self.embeds_NTC[rows], self.pooled_NP[rows])
        return Sample(self.noise_N4hw[rows], self.x0_N4hw[rows], condition)


def build(request: dict[str, Any], engine: Engine) -> tuple[Loop, list[nn.Module], HeadPool | None]:
    """The loop, all its heads, and its pool if it has one."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {name: tuple(value) for name, value in request["model"].items()}
    model = ModelConfig(**shape)
    side = request["size_px"] // LATENT_PX
    unet = build_unet(model, request["size_px"])
    backbone = UNetFeatures(unet).to(engine.device)
    samples = MemorySamples.make(side, sum(model.text_widths), model.text_widths[1], engine.device)
    config = StudentConfig(shifted_timestep=SHIFT, batch=request["batch"], accumulation=1, warmup_steps=0, stage_steps=(10**6,))
    tasks = tuple(request["tasks"]) or PoolConfig.tasks
    pool_config = PoolConfig(tasks=tasks, heads_per_cell=request["heads_per_cell"], crop_latents=side // 2)
    heads = HeadOptimizerConfig()
    if request["loop"] == "ladd":
        ladd = LaddLoop(config, pool_config, heads, unet, backbone, samples, side, engine.device)
        return ladd, list(ladd.heads), None
    sides = {task: backbone.sides(side // 2 if task.startswith("local") else side) for task in pool_config.tasks}
    pool = HeadPool(pool_config, backbone.channels(), sides, optimizer=heads, device=engine.device)
    null = Condition(
        *(torch.zeros(1, *shape.shape[1:], device=engine.device) for shape in (samples.embeds_NTC, samples.pooled_NP))
    )
    adversary = Adversary(backbone, pool, GAMES[config.loss], alphas_cumprod().to(engine.device), null)
    return StudentStage(config, unet, adversary, samples, engine), list(pool.heads), pool


def measure(request: dict[str, Any]) -> dict[str, Any]:
    """Raises: TrainingError if the loop does not train what it should; nothing is then timed."""
    engine = Engine()
    # On a CPU the plain attention is the fastest on maps this small, for both loops; nitro_training.run takes it too.
    with sdpa_kernel(SDPBackend.MATH) if engine.device.type == "cpu" else nullcontext():
        loop, heads, pool = build(request, engine)
        before = [fingerprint(head) for head in heads], fingerprint(loop.unet)
        for step in range(request["num_warmup"]):
            require_finite(loop.step(step))
        require_trained(before, [fingerprint(head) for head in heads], fingerprint(loop.unet), pool)
        wall_ms, cpu_ms = timed(loop, request["num_warmup"], request["seconds"], request["min_iterations"], engine.device)
    is_cuda = engine.device.type == "cuda"
    return {
        "wall_ms": wall_ms,
        "cpu_ms": cpu_ms,
        "peak_rss_bytes": peak_rss_bytes(),
        "cuda_peak_bytes": torch.cuda.max_memory_allocated() if is_cuda else None,
        "device": torch.cuda.get_device_name() if is_cuda else "cpu",
        "num_threads": torch.get_num_threads(),
        "num_heads": len(heads),
        "heads_bytes": sum(4 * parameter.numel() for head in heads for parameter in head.parameters()),
        "student_parameters": sum(parameter.numel() for parameter in loop.unet.parameters()),
        "versions": {name: metadata.version(name) for name in ("torch", "diffusers", "accelerate")},
    }


def timed(loop: Loop, first: int, seconds: float, min_iterations: int, device: torch.device) -> tuple[list[float], list[float]]:
    """Wall-clock and processor milliseconds of each iteration, for `seconds`."""
    synchronise: Callable[[], None] = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wall_ms: list[float] = []
    cpu_ms: list[float] = []
    while sum(wall_ms) < 1e3 * seconds or len(wall_ms) < min_iterations:
        synchronise()
        wall_s, cpu_s = time.perf_counter(), time.process_time()
        losses = loop.step(first + len(wall_ms))
        synchronise()
        wall_ms.append(1e3 * (time.perf_counter() - wall_s))
        cpu_ms.append(1e3 * (time.process_time() - cpu_s))
        require_finite(losses)
    return wall_ms, cpu_ms


@torch.no_grad()
def fingerprint(module: nn.Module) -> float:
    """A number that changes with any weight; a copy of the pool would count as its memory."""
    return float(sum(parameter.double().abs().sum() for parameter in module.parameters()))


def require_finite(losses: dict[str, float]) -> None:
    """Raises: TrainingError naming the loss that is not finite."""
    for name, value in losses.items():
        if not math.isfinite(value):
            raise TrainingError(f"{name} is {value}; nothing was timed")


def require_trained(before: tuple[list[float], float], heads: list[float], student: float, pool: HeadPool | None) -> None:
    """Whether student and heads have learnt: of a pool exactly those that judged or were renewed, else all.

    Raises: TrainingError saying what did not change, or changed and should not have.
    """
    if student == before[1]:
        raise TrainingError("the student did not change in the warm-up; nothing was timed")
    changed = {index for index, (old, new) in enumerate(zip(before[0], heads, strict=True)) if old != new}
    expected = set(range(len(heads)))
    if pool is not None:
        expected = set(((pool.updates > 0) | (pool.births > 0)).nonzero().flatten().tolist())
    if changed != expected or not changed:
        raise TrainingError(f"{len(changed)} heads changed in the warm-up, {len(expected)} should have; nothing was timed")


def main() -> None:
    print(json.dumps(measure(json.loads(sys.argv[1]))))


if __name__ == "__main__":
    main()

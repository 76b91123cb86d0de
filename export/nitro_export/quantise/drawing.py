"""The parent draws while its layers are watched: first the denoiser at its noise levels, then the decoder on what came out."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from nitro_export.quantise.ranges import Recorder
from nitro_rt.schedule import StepSchedule

if TYPE_CHECKING:
    from nitro_export.parent import Drawing, Parent

NUM_ROWS = 128
"""Sampled of each tensor over all calls: enough for an SQNR within a few tenths of a decibel."""

Report = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class WatchedStage:
    """One stage that has drawn."""

    name: str
    recorder: Recorder
    modules: dict[str, nn.Module]
    """By their names in the graph."""


def watched_stages(
    parent: Parent,
    prompts: Sequence[str],
    schedules: Mapping[int, StepSchedule],
    *,
    kinds: tuple[type[nn.Module], ...],
    seed: int,
    report: Report,
) -> Iterator[WatchedStage]:
    """`denoise`, then `decode`, each after it has drawn all prompts with the largest of the step counts.

    A stage's modules are valid until the next one is asked for: the parent then lets go of the part.

    Args:
        kinds: of modules to watch.
        seed: of the noise (one more for each prompt) and of the choice of rows.
    """
    started = time.perf_counter()
    schedule, num_draws = schedules[max(schedules)], math.ceil(len(prompts) / parent.batch)
    modules = _named(parent.network.unet, "network.unet.", kinds)
    recorder = Recorder(seed=seed, rows_per_call=math.ceil(NUM_ROWS / (num_draws * len(schedule.timesteps))))
    x0s: list[list[Tensor]] = []
    with recorder.watching(modules):
        for index in range(num_draws):
            numbers = range(index * parent.batch, (index + 1) * parent.batch)
            batch = [prompts[number % len(prompts)] for number in numbers]
            drawing = parent.draw(batch, [seed + number for number in numbers], schedule, decode=False)
            x0s.append(_x0s(drawing, schedules))
            report(f"drawing {index + 1} of {num_draws}, {time.perf_counter() - started:.1f} s")
    parent.release("text_stage")
    yield WatchedStage(name="denoise", recorder=recorder, modules=modules)
    parent.release("network")
    # One picture of each drawing, of the step counts in turn; all of them where there is one drawing.
    latents = x0s[0] if num_draws == 1 else [found[index % len(found)] for index, found in enumerate(x0s)]
    modules = _named(parent.folded_decode_stage.vae, "vae.", kinds)
    recorder = Recorder(seed=seed, rows_per_call=math.ceil(NUM_ROWS / len(latents)))
    with recorder.watching(modules), torch.no_grad():
        for index, x0_BChw in enumerate(latents):
            parent.folded_decode_stage.levels(x0_BChw)
            report(f"decoding {index + 1} of {len(latents)}, {time.perf_counter() - started:.1f} s")
    yield WatchedStage(name="decode", recorder=recorder, modules=modules)


def weights_of(module: nn.Module) -> Tensor:
    """[O, K] float32, read anew from where they are stored."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.detach().float().reshape(len(weight), -1)


def _x0s(drawing: Drawing, schedules: Mapping[int, StepSchedule]) -> list[Tensor]:
    """What the decoder is given: the drawing's own x0 and, where one step is served too, that after the first step."""
    last = drawing.x0_BChw
    if 1 not in schedules or len(drawing.steps) == 1:
        return [last]
    schedule = schedules[len(drawing.steps)]
    # The first step's result is next_alpha * x0 + next_sigma * noise.
    first = (drawing.steps[1]["latents"] - schedule.next_sigma[0] * drawing.steps[0]["noise"]) / schedule.next_alpha[0]
    return [first, last]


def _named(network: nn.Module, prefix: str, kinds: tuple[type[nn.Module], ...]) -> dict[str, nn.Module]:
    return {prefix + name: module for name, module in network.named_modules() if isinstance(module, kinds)}

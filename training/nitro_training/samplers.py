"""How a teacher draws: the solvers of its authors, over diffusers' schedulers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, LCMScheduler
from torch import Tensor, nn

from nitro_rt.errors import ConfigError
from nitro_training.model import predict_noise

_SCHEDULE: dict[str, Any] = {
    "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000
}  # fmt: skip
"""SDXL's noise schedule. Said to every scheduler: their own defaults differ."""


def _dpm_solver(num_steps: int, device: torch.device) -> DPMSolverMultistepScheduler:
    """DPM-Solver++ (2M), Lu et al. 2022, arXiv:2211.01095."""
    scheduler = DPMSolverMultistepScheduler(**_SCHEDULE, timestep_spacing="trailing")
    scheduler.set_timesteps(num_steps, device=device)
    return scheduler


def _lcm(num_steps: int, device: torch.device) -> LCMScheduler:
    """Multistep consistency sampling as DMD2 does it (arXiv:2405.14867): 999, 749, 499, 249 for four steps, and spread
    likewise for other numbers. diffusers' own grid for four steps begins 999, 759."""
    scheduler = LCMScheduler(**_SCHEDULE, original_inference_steps=1000)
    scheduler.set_timesteps(timesteps=lcm_times(num_steps), device=device)
    return scheduler


def _ddim_trailing(num_steps: int, device: torch.device) -> DDIMScheduler:
    """DDIM as Hyper-SDXL's LoRAs are drawn with (arXiv:2404.13686): trailing steps; the last one ends, as in SDXL's own
    scheduler config, at the noise of the first training time, not at none."""
    scheduler = DDIMScheduler(
        **_SCHEDULE, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=False, steps_offset=1
    )
    scheduler.set_timesteps(num_steps, device=device)
    return scheduler


_SCHEDULERS: dict[str, Callable[[int, torch.device], Any]] = {
    "dpm-solver++": _dpm_solver,
    "lcm": _lcm,
    "ddim-trailing": _ddim_trailing,
}
SAMPLERS = tuple(_SCHEDULERS)
STOCHASTIC = ("lcm",)
"""Samplers that draw noise between their steps."""


def lcm_times(num_steps: int) -> list[int]:
    """The times of `num_steps` evenly spread steps that begin at 999, largest first."""
    return [1000 * (num_steps - index) // num_steps - 1 for index in range(num_steps)]


@torch.no_grad()
def sample(
    unet: nn.Module, embeds_BTC: Tensor, pooled_BP: Tensor, noise_B4hw: Tensor, *, sampler: str = "dpm-solver++",
    num_steps: int, guidance: float, generators: Sequence[torch.Generator] | None = None,
    autocast: torch.dtype | None = torch.bfloat16,
) -> Tensor:  # fmt: skip
    """x0 [B, 4, h, w] float32; deterministic in its arguments.

    Args:
        noise_B4hw: x_T, standard normal.
        sampler: one of `SAMPLERS`.
        guidance: weight of the conditional direction against the null condition (zeros, as SDXL has it); 1 or 0 means none,
            and the null condition is then not run.
        generators: of every sample, for stochastic samplers; so a sample's noise does not depend on its batch.
        autocast: what the UNet computes in; None for the dtype of its weights.
    Raises: ConfigError for an unknown sampler, or a stochastic one without its generators.
    """
    if sampler not in _SCHEDULERS:
        raise ConfigError(f"there is no sampler {sampler!r}; available: {', '.join(SAMPLERS)}")
    noise_source = _noise_source(sampler, generators, len(noise_B4hw))
    predict = _guided if guidance not in (0.0, 1.0) else _unguided
    x = noise_B4hw.float()
    scheduler = _SCHEDULERS[sampler](num_steps, x.device)
    for time in scheduler.timesteps:
        with torch.autocast(x.device.type, autocast or torch.bfloat16, enabled=autocast is not None):
            prediction = predict(unet, x, time, embeds_BTC, pooled_BP, guidance)
        x = scheduler.step(prediction, time, x, return_dict=False, **noise_source)[0]
    return x


def _unguided(unet: nn.Module, x: Tensor, time: Tensor, embeds: Tensor, pooled: Tensor, guidance: float) -> Tensor:
    return predict_noise(unet, x, time.expand(len(x)), embeds, pooled)


def _guided(unet: nn.Module, x: Tensor, time: Tensor, embeds: Tensor, pooled: Tensor, guidance: float) -> Tensor:
    embeds, pooled = (torch.cat([one, torch.zeros_like(one)]) for one in (embeds, pooled))
    prediction = predict_noise(unet, torch.cat([x, x]), time.expand(2 * len(x)), embeds, pooled)
    conditional, null = prediction.chunk(2)
    return null + guidance * (conditional - null)


def _noise_source(sampler: str, generators: Sequence[torch.Generator] | None, num: int) -> dict[str, Any]:
    if sampler not in STOCHASTIC:
        return {}
    if generators is None or len(generators) != num:
        found = "none" if generators is None else str(len(generators))
        raise ConfigError(f"the sampler {sampler!r} draws noise: it needs a generator for each of {num} samples, got {found}")
    return {"generator": list(generators)}

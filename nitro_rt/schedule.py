"""The shifted LCM schedule of NitroFusion: which timesteps are visited, what the network is told, how latents move.

One grid serves 1-4 steps. A step at the grid's time t tells the network t' = floor(t * shift / 1000), converts its
noise prediction to x0 at t' too, and mixes fresh noise in at the next *original* time:

    eps    = unet(x, t')
    x0     = (x - sqrt(1 - abar[t']) * eps) / sqrt(abar[t'])
    x_next = sqrt(abar[t_next]) * x0 + sqrt(1 - abar[t_next]) * noise        the last step returns x0

Source: github.com/ChenDarYen/ComfyUI-TimestepShiftModel; diffusers' LCMScheduler with original_inference_steps=4.
Shapes: N steps, T training timesteps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nitro_rt.errors import ConfigError

MAX_STEPS = 4
"""The grid has four times, so a checkpoint runs in one to four steps."""


@dataclass(frozen=True, kw_only=True)
class StepSchedule:
    """The constants of one step count."""

    timesteps: tuple[int, ...]
    """Original grid times t, largest first."""
    shifted_timesteps: tuple[int, ...]
    """What the network is told: t'."""
    alpha: tuple[float, ...]
    """sqrt(abar[t'])."""
    sigma: tuple[float, ...]
    """sqrt(1 - abar[t'])."""
    next_alpha: tuple[float, ...]
    """sqrt(abar[t_next]); 1 for the last step."""
    next_sigma: tuple[float, ...]
    """sqrt(1 - abar[t_next]); 0 for the last step."""


def alphas_cumprod_from_config(scheduler_config: dict[str, Any]) -> NDArray[np.float32]:
    """abar, [T] float32, computed as diffusers' schedulers do.

    Args:
        scheduler_config: the checkpoint's `scheduler/scheduler_config.json`.
    Raises: ConfigError for a beta schedule or prediction type that NitroFusion checkpoints do not use.
    """
    kind = scheduler_config.get("beta_schedule", "scaled_linear")
    prediction = scheduler_config.get("prediction_type", "epsilon")
    num = int(scheduler_config.get("num_train_timesteps", 1000))
    start, end = float(scheduler_config.get("beta_start", 0.00085)), float(scheduler_config.get("beta_end", 0.012))
    if prediction != "epsilon":
        raise ConfigError(f"the scheduler predicts {prediction!r}; only 'epsilon' checkpoints are supported")
    if kind == "scaled_linear":
        betas = np.linspace(start**0.5, end**0.5, num, dtype=np.float32) ** 2
    elif kind == "linear":
        betas = np.linspace(start, end, num, dtype=np.float32)
    else:
        raise ConfigError(f"beta_schedule {kind!r} is not supported; available: scaled_linear, linear")
    return np.cumprod(1.0 - betas, dtype=np.float32)


def grid(num_steps: int, num_train_timesteps: int = 1000) -> tuple[int, ...]:
    """The original times of `num_steps`, as LCMScheduler(original_inference_steps=4) picks them: 2 -> (999, 499)."""
    if not 1 <= num_steps <= MAX_STEPS:
        raise ConfigError(f"steps must be from 1 to {MAX_STEPS}, got {num_steps}")
    origin = np.arange(1, MAX_STEPS + 1) * (num_train_timesteps // MAX_STEPS) - 1
    picked = np.floor(np.linspace(0, MAX_STEPS, num=num_steps, endpoint=False)).astype(np.int64)
    return tuple(int(time) for time in origin[::-1][picked])


def step_schedule(num_steps: int, shift: int, alphas_cumprod_T: NDArray[np.float32]) -> StepSchedule:
    """The constants of `num_steps` steps.

    Args:
        shift: `shifted_timestep`, 1 to T (250 for NitroSD-Realism, 500 for NitroSD-Vibrant; T means no shift).
        alphas_cumprod_T: [T] abar.
    """
    num_train = len(alphas_cumprod_T)
    if not 1 <= shift <= num_train:
        raise ConfigError(f"shift must be from 1 to {num_train}, got {shift}")
    times = grid(num_steps, num_train)
    shifted = tuple(time * shift // num_train for time in times)
    abar = alphas_cumprod_T.astype(np.float64)
    at, following = abar[list(shifted)], abar[list(times[1:])]
    return StepSchedule(
        timesteps=times,
        shifted_timesteps=shifted,
        alpha=tuple(map(float, np.sqrt(at))),
        sigma=tuple(map(float, np.sqrt(1 - at))),
        next_alpha=(*map(float, np.sqrt(following)), 1.0),
        next_sigma=(*map(float, np.sqrt(1 - following)), 0.0),
    )

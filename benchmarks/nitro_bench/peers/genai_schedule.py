"""NitroFusion's schedule as far as OpenVINO GenAI's own LCM scheduler can be told it: exact for one step only.

It takes a scheduler_config.json and no code. One time tells its network where it is, converts to x0, and says how much fresh
noise the step before mixes in; NitroFusion has t' = floor(t * shift / T) for the first two and the original t for the third. A
training grid that is cut off after t' gives the first two. The last step mixes nothing, so one step is exact; with more, noise
is mixed to t' instead of t, which draws other images. Standard library only.
"""

from __future__ import annotations

from typing import Any

GRID = 4
"""Times of the grid, of which one to four are visited."""
DIFFERS = (
    "another schedule: OpenVINO GenAI's LCM scheduler mixes fresh noise to the shifted time t' where NitroFusion mixes to the "
    "original t, so with more than one step its pictures are others; the networks run as often and at the same sizes"
)


def scheduler_config(config: dict[str, Any], shift: int, steps: int) -> dict[str, Any]:
    """The config of an LCM scheduler that visits t' in the given number of steps.

    Args:
        config: the checkpoint's scheduler_config.json.
        shift: `shifted_timestep` of the checkpoint's run.json.
    """
    num_train = int(config.get("num_train_timesteps", 1000))
    if steps == 1:
        # The grid has one time, its last: t' itself, whatever the shift.
        visited, times = 1, (num_train // GRID * GRID - 1) * shift // num_train + 1
    else:
        visited, times = GRID, shift
    return {
        **config,
        "_class_name": "LCMScheduler",
        "num_train_timesteps": times,
        "original_inference_steps": visited,
        # The betas up to there, and not another beta_end: the same numbers for every beta schedule.
        "trained_betas": betas(config, num_train)[:times],
    }


def betas(config: dict[str, Any], num_train: int) -> list[float]:
    """[T]. Raises: ValueError for a beta schedule that NitroFusion's checkpoints do not use."""
    start, end = float(config.get("beta_start", 0.00085)), float(config.get("beta_end", 0.012))
    kind = config.get("beta_schedule", "scaled_linear")
    if kind not in ("scaled_linear", "linear"):
        raise ValueError(f"beta_schedule {kind!r} is not supported; available: scaled_linear, linear")
    power = 2 if kind == "scaled_linear" else 1
    low, high = start ** (1 / power), end ** (1 / power)
    return [(low + (high - low) * index / (num_train - 1)) ** power for index in range(num_train)]

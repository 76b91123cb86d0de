"""The config for OpenVINO GenAI's LCM scheduler, read by diffusers' LCM scheduler, after which GenAI's is written."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from diffusers import LCMScheduler

from nitro_bench.peers.genai_schedule import betas, scheduler_config
from nitro_rt.schedule import alphas_cumprod_from_config, step_schedule

CONFIG: dict[str, Any] = {
    "_class_name": "LCMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "set_alpha_to_one": True,
    "timestep_scaling": 10.0,
}


def scheduler_of(shift: int, steps: int, config: dict[str, Any] = CONFIG) -> LCMScheduler:
    scheduler = LCMScheduler.from_config(scheduler_config(config, shift, steps))
    scheduler.set_timesteps(steps)
    return scheduler


@pytest.mark.parametrize("shift", [250, 333, 500, 1000])
@pytest.mark.parametrize("kind", ["scaled_linear", "linear"])
def test_one_step_is_exact_whatever_the_shift(shift: int, kind: str) -> None:
    config = CONFIG | {"beta_schedule": kind}
    ours = step_schedule(1, shift, alphas_cumprod_from_config(config))
    theirs = scheduler_of(shift, 1, config)
    assert tuple(theirs.timesteps.tolist()) == ours.shifted_timesteps
    alpha = float(theirs.alphas_cumprod[ours.shifted_timesteps[0]]) ** 0.5
    assert alpha == pytest.approx(ours.alpha[0], rel=1e-5)


@pytest.mark.parametrize("steps", [2, 4])
def test_more_steps_tell_the_network_the_same_and_mix_less_noise(steps: int) -> None:
    ours = step_schedule(steps, 500, alphas_cumprod_from_config(CONFIG))
    theirs = scheduler_of(500, steps)
    assert tuple(theirs.timesteps.tolist()) == ours.shifted_timesteps
    np.testing.assert_allclose(theirs.alphas_cumprod[theirs.timesteps].sqrt(), ours.alpha, rtol=1e-5)
    mixed = (1 - theirs.alphas_cumprod[theirs.timesteps[1:]]).sqrt().numpy()
    assert (mixed < np.array(ours.next_sigma[:-1]) - 0.05).all()


def test_an_unknown_beta_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match="beta_schedule 'cosine' is not supported"):
        betas(CONFIG | {"beta_schedule": "cosine"}, 1000)

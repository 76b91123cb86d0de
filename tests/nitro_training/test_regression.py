"""The warm-up to one-step weights: what the student is shown and told, and what is handed on."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_student import MemorySamples, copies, engine, same, unet
from torch import Tensor

from nitro_rt.errors import ConfigError
from nitro_training.loop import learning_rate
from nitro_training.randomness import BatchRandom
from nitro_training.regression import RegressionConfig, RegressionStage
from nitro_training.samples import Sample
from nitro_training.teacher import alphas_cumprod

CONFIG = RegressionConfig(num_steps=30, batch=8, lr=2e-3, warmup_steps=2)
TOLD = {499: 999, 374: 749, 249: 499, 124: 249}
"""t of every t' at a shift of 500."""


def stage(samples: Any = None, **options: Any) -> RegressionStage:
    return RegressionStage(dataclasses.replace(CONFIG, **options), unet(), 500, samples or MemorySamples(), engine())


def watched_step(one: RegressionStage, step: int) -> tuple[Tensor, Tensor, Sample]:
    """What the network is shown and told in a step, and the samples of that step."""
    seen: list[tuple[Tensor, Tensor]] = []
    drawn: list[Sample] = []
    draw = one.samples.draw
    one.samples = SimpleNamespace(draw=lambda random: drawn.append(draw(random)) or drawn[-1])  # type: ignore[assignment]
    hook = one.unet.register_forward_pre_hook(lambda module, args: seen.append((args[0].clone(), args[1].clone())))
    one.step(step)
    hook.remove()
    ((x, times),) = seen
    return x, times, drawn[0]


def test_the_first_time_sees_the_noise_itself_and_later_ones_the_noised_result() -> None:
    x, told, sample = watched_step(stage(batch=16), 0)
    assert set(told.tolist()) == set(TOLD), "every time of the grid, told as t'"
    for index, time in enumerate(told.tolist()):
        if time == 499:
            assert torch.equal(x[index], sample.noise_B4hw[index])
        else:
            abar = alphas_cumprod()[TOLD[time]]
            noise = (x[index] - abar.sqrt() * sample.x0_B4hw[index]) / (1 - abar).sqrt()
            assert abs(noise.mean()) < 0.15 and abs(noise.std() - 1) < 0.1
            assert (noise - sample.noise_B4hw[index]).abs().max() > 0.5, "fresh noise, not x_T"


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_times_are_drawn_by_their_shares(share: float) -> None:
    one, num = stage(one_step_share=share), 2000
    times = one._draw_times(BatchRandom("times", first=0, num=num)).tolist()
    for time in TOLD.values():
        expected = share if time == 999 else (1 - share) / 3
        assert abs(times.count(time) / num - expected) < 0.04


def test_the_loss_falls_on_one_batch() -> None:
    random = BatchRandom("one", first=0, num=8)
    sample = MemorySamples().draw(random)
    one = stage(SimpleNamespace(draw=lambda random: sample), one_step_share=1.0)
    losses = [one.step(step)["regression_loss"] for step in range(10)]
    assert losses[-1] < 0.9 * losses[0]


def test_the_learning_rate_warms_up_and_falls_to_a_tenth() -> None:
    one = stage(num_steps=4, batch=2)
    rates = []
    for step in range(4):
        one.step(step)
        rates.append(one.optimizer.param_groups[0]["lr"])
    assert rates == [learning_rate(step, peak=2e-3, num_steps=4, warmup_steps=2, final=0.1) for step in range(4)]
    assert rates[0] == 1e-3 and rates[1] == rates[2] == 2e-3
    assert learning_rate(4, peak=2e-3, num_steps=4, warmup_steps=2, final=0.1) == pytest.approx(2e-4)


def test_the_average_is_handed_on_and_the_start_is_left_alone() -> None:
    one, before = stage(batch=2), copies(unet())
    start = copies(one.unet)
    one.step(0)
    for old, average, new in zip(start, one.published().parameters(), one.unet.parameters(), strict=True):
        torch.testing.assert_close(average, 0.1 * old + 0.9 * new.detach())
    assert same(before, unet()) and set(one.state().modules) == {"unet", "unet_ema"}


def test_a_step_follows_from_its_number() -> None:
    first, second = stage(batch=2), stage(batch=2)
    assert [first.step(step) for step in range(2)] == [second.step(step) for step in range(2)]
    assert first.step(2) != first.step(3)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"batch": 0}, "at least 1"), ({"one_step_share": 2.0}, "from 0 to 1"), ({"ema_decay": -1.0}, "from 0 to 1")],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RegressionConfig(**options)

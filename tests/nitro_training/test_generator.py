"""The student's way from noise to latents: the grid, the conversion at t', and backward simulation."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from tiny_student import SIDE, batch_random, condition, latents, unet
from torch import Tensor, nn

from nitro_rt.errors import ConfigError
from nitro_rt.schedule import grid
from nitro_training.generator import Place, draw_place, draw_student, predict_x0, simulate
from nitro_training.model import lcm_scheduler, time_ids
from nitro_training.randomness import generator
from nitro_training.teacher import alphas_cumprod
from oracle import ShiftedLCMScheduler

GRID = {1: (999,), 2: (999, 499), 3: (999, 749, 499), 4: (999, 749, 499, 249)}
SHIFTED = {
    250: {1: (249,), 2: (249, 124), 3: (249, 187, 124), 4: (249, 187, 124, 62)},
    500: {1: (499,), 2: (499, 249), 3: (499, 374, 249), 4: (499, 374, 249, 124)},
}
PLACES = [(num_steps, index) for num_steps in range(1, 5) for index in range(num_steps)]
ABAR = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)
"""SDXL's schedule, computed here once more, in float64."""


class Spy(nn.Module):
    """A UNet that keeps what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs: list[Tensor] = []
        self.times: list[int] = []

    def forward(self, x: Tensor, times: Tensor, *args: object, **kwargs: object) -> object:
        (time,) = set(times.tolist())
        self.inputs.append(x.clone())
        self.times.append(time)
        return unet()(x, times, *args, **kwargs)


def noise_prediction(x: Tensor, time: int) -> Tensor:
    given = condition(len(x))
    added = {"text_embeds": given.pooled_BP, "time_ids": time_ids(len(x), SIDE * 8)}
    sample: Tensor = unet()(x, torch.full((len(x),), time), given.embeds_BTC, added_cond_kwargs=added).sample
    return sample.detach()


def one_x0(x: Tensor, time: int, shift: int, net: nn.Module | None = None) -> Tensor:
    given = condition(len(x))
    times = torch.full((len(x),), time)
    return predict_x0(net or unet(), x, times, shift, given.embeds_BTC, given.pooled_BP, alphas_cumprod())


def test_the_grid_is_the_known_table() -> None:
    """Of LCM with four original steps, and both published shifts; t' is told to the network in training and drawing."""
    given = condition(1)
    for num_steps, times in GRID.items():
        assert grid(num_steps) == times
        assert tuple(Place(num_steps, index).time for index in range(num_steps)) == times
        for shift, table in SHIFTED.items():
            drawing, training = Spy(), Spy()
            draw_student(
                drawing, given.embeds_BTC, given.pooled_BP, latents(num=1), num_steps=num_steps, shift=shift,
                generator=generator(0),
            )  # fmt: skip
            for index in range(num_steps):
                one_x0(latents(num=1), Place(num_steps, index).time, shift, training)
            assert tuple(drawing.times) == tuple(training.times) == table[num_steps]


def test_one_step_is_the_closed_form() -> None:
    """x0 = (x_T - sqrt(1 - abar) eps) / sqrt(abar), all of it at t'."""
    x, given = latents(), condition()
    for shift, time in ((250, 249), (500, 499), (1000, 999)):
        expected = (x.double() - (1 - ABAR[time]).sqrt() * noise_prediction(x, time).double()) / ABAR[time].sqrt()
        drawn = draw_student(unet(), given.embeds_BTC, given.pooled_BP, x, num_steps=1, shift=shift, generator=generator(0))
        for found in (one_x0(x, 999, shift), drawn):
            torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=1e-4)


def test_x0_is_what_the_comfyui_node_computes() -> None:
    """x scaled to unit variance at sigma, the network at floor(t * s / 1000), and denoised from x * sqrt(sigma'^2 + 1)."""
    sigma = ((1 - ABAR) / ABAR).sqrt()
    for shift in (250, 500):
        for time in GRID[4]:
            x, told = latents("comfy", time), time * shift // 1000
            theirs = x.double() * (sigma[time] ** 2 + 1).sqrt()  # ComfyUI keeps latents unscaled
            scaled = theirs / (sigma[time] ** 2 + 1).sqrt()
            eps = noise_prediction(scaled.float(), told).double()
            x0 = scaled * (sigma[told] ** 2 + 1).sqrt() - sigma[told] * eps
            torch.testing.assert_close(one_x0(x, time, shift).double(), x0, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shift", [250, 500])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 4])
def test_a_draw_is_that_of_diffusers_scheduler(shift: int, num_steps: int) -> None:
    check_against_diffusers(num_steps, shift)


def test_draws_are_those_of_diffusers_scheduler() -> None:
    check_against_diffusers(3, 500)


def check_against_diffusers(num_steps: int, shift: int) -> None:
    """LCMScheduler with original_inference_steps=4 and shifted timesteps, and the same generator."""
    scheduler = ShiftedLCMScheduler.shifted(dict(lcm_scheduler().config), shift)
    scheduler.set_timesteps(num_steps)
    x, source, given = latents(num=1), generator("diffusers"), condition(1)
    for time in scheduler.timesteps:
        x = scheduler.step(noise_prediction(x, int(time)), time, x, generator=source, return_dict=False)[0]
    found = draw_student(
        unet(), given.embeds_BTC, given.pooled_BP, latents(num=1), num_steps=num_steps, shift=shift,
        generator=generator("diffusers"),
    )  # fmt: skip
    torch.testing.assert_close(found, x, atol=2e-4, rtol=2e-4)


def test_simulation_is_the_beginning_of_a_draw() -> None:
    """At every place of every grid the student learns on what it would see there in a draw, given the same noise."""
    given = condition(1)
    for num_steps, index in PLACES:
        spy, source = Spy(), batch_random("simulate", num=1)
        draw_student(
            spy, given.embeds_BTC, given.pooled_BP, latents(num=1), num_steps=num_steps, shift=500,
            generator=batch_random("simulate", num=1).generators[0],
        )  # fmt: skip
        found = simulate(
            unet(), latents(num=1), Place(num_steps, index), 500, given.embeds_BTC, given.pooled_BP, alphas_cumprod(), source
        )
        torch.testing.assert_close(found, spy.inputs[index], atol=1e-4, rtol=1e-4)
        if index == 0:
            assert torch.equal(found, latents(num=1)), "the first step sees x_T itself"


def test_simulation_keeps_no_graph() -> None:
    given, abar = condition(), alphas_cumprod()
    x = latents().requires_grad_(True)
    seen = simulate(unet(), x, Place(3, 2), 500, given.embeds_BTC, given.pooled_BP, abar, batch_random("graph"))
    assert not seen.requires_grad
    learns = one_x0(seen, Place(3, 2).time, 500)
    assert learns.requires_grad, "the step that learns does"


def test_the_first_stage_is_one_step_alone() -> None:
    source = generator("first")
    assert {draw_place(1, 0.0, source) for _ in range(50)} == {Place(1, 0)}


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("stage", [2, 3, 4])
def test_later_stages_draw_every_later_step_and_keep_the_first(stage: int, share: float) -> None:
    check_places(stage, share)


def test_places_are_drawn_by_their_shares() -> None:
    check_places(4, 0.3)


def check_places(stage: int, share: float) -> None:
    """One step with its share; else the number of steps evenly from 2 to the stage, and evenly a step after the first."""
    source, num = generator("places", stage, str(share)), 1500
    counts = Counter(draw_place(stage, share, source) for _ in range(num))
    expected = {Place(1, 0): share}
    for num_steps in range(2, stage + 1):
        for index in range(1, num_steps):
            expected[Place(num_steps, index)] = (1 - share) / (stage - 1) / (num_steps - 1)
    assert set(counts) == {place for place, probability in expected.items() if probability}
    for place, probability in expected.items():
        assert abs(counts[place] / num - probability) < 0.05, (place, probability)


def test_x0_is_converted_in_float32_under_autocast() -> None:
    """The network may compute in bfloat16; its noise prediction then is all that is rounded."""
    x = latents()
    with torch.autocast("cpu", torch.bfloat16):
        eps = noise_prediction(x, 499).float()
        found = one_x0(x, 999, 500)
    assert found.dtype == torch.float32
    expected = (x.double() - (1 - ABAR[499]).sqrt() * eps.double()) / ABAR[499].sqrt()
    torch.testing.assert_close(found.double(), expected, atol=2e-5, rtol=2e-5)


def test_a_grid_of_five_steps_is_refused() -> None:
    with pytest.raises(ConfigError, match="from 1 to 4, got 5"):
        Place(5, 0).time  # noqa: B018

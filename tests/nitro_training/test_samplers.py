from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from nitro_rt.errors import ConfigError
from nitro_training.randomness import generator
from nitro_training.samplers import SAMPLERS, lcm_times, sample
from nitro_training.teacher import alphas_cumprod

ABAR = alphas_cumprod()
SHAPE = (4, 8, 8)


class Knowing(nn.Module):
    """A UNet that always knows x0: the sum of the prompt's embedding and `x0`; it notes how it was called."""

    def __init__(self, x0_4hw: Tensor) -> None:
        super().__init__()
        self.x0, self.times, self.batches = x0_4hw, [0][:0], [0][:0]

    def forward(self, x: Tensor, times: Tensor, embeds: Tensor, **_: object) -> tuple[Tensor]:
        self.times.append(int(times[0]))
        self.batches.append(len(x))
        abar = ABAR[times].view(-1, 1, 1, 1)
        x0 = self.x0 + embeds.mean(dim=(1, 2)).view(-1, 1, 1, 1)
        return ((x - abar.sqrt() * x0) / (1 - abar).sqrt(),)


class Curved(nn.Module):
    """A UNet whose prediction depends on the sample in no simple way, so steps and noise show."""

    def forward(self, x: Tensor, times: Tensor, embeds: Tensor, **_: object) -> tuple[Tensor]:
        return (torch.sin(2 * x + times.view(-1, 1, 1, 1) / 300),)


def draw(unet: nn.Module, sampler: str, num: int = 2, first: int = 0, **options: object) -> Tensor:
    noise = torch.stack([torch.randn(SHAPE, generator=generator("x", index)) for index in range(first, first + num)])
    settings: dict[str, object] = {"num_steps": 4, "guidance": 1.0, "generators": generators(num, first), **options}
    embeds, pooled = torch.ones(num, 3, 5), torch.ones(num, 7)
    return sample(unet, embeds, pooled, noise, sampler=sampler, **settings)  # type: ignore[arg-type]


def generators(num: int, first: int = 0) -> Sequence[torch.Generator]:
    return [generator("between steps", index) for index in range(first, first + num)]


@pytest.mark.parametrize(
    ("sampler", "num_steps", "times"),
    [
        ("lcm", 4, [999, 749, 499, 249]),  # DMD2
        ("lcm", 1, [999]),
        ("lcm", 3, [999, 665, 332]),
        ("ddim-trailing", 8, [999, 874, 749, 624, 499, 374, 249, 124]),  # Hyper-SDXL
        ("ddim-trailing", 1, [999]),
        ("dpm-solver++", 4, [999, 749, 499, 249]),
    ],
)
def test_the_network_is_asked_at_the_times_of_its_authors(sampler: str, num_steps: int, times: list[int]) -> None:
    unet = Knowing(torch.zeros(SHAPE))
    draw(unet, sampler, num_steps=num_steps)
    assert unet.times == times
    assert sampler != "lcm" or lcm_times(num_steps) == times


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("num_steps", [1, 4, 5])
def test_a_network_that_knows_x0_is_drawn_to_it(sampler: str, num_steps: int) -> None:
    x0 = torch.randn(SHAPE, generator=generator("x0"))
    found = draw(Knowing(x0), sampler, num_steps=num_steps)
    if sampler == "ddim-trailing":  # ends at the noise of time 0
        noise = torch.stack([torch.randn(SHAPE, generator=generator("x", index)) for index in range(2)])
        start = (noise - ABAR[999].sqrt() * (x0 + 1)) / (1 - ABAR[999]).sqrt()
        torch.testing.assert_close(found, ABAR[0].sqrt() * (x0 + 1) + (1 - ABAR[0]).sqrt() * start, rtol=0, atol=1e-4)
    else:
        torch.testing.assert_close(found, (x0 + 1).expand(2, *SHAPE), rtol=0, atol=1e-4)


@pytest.mark.parametrize("guidance", [0.0, 1.0])
def test_no_guidance_runs_the_conditional_half_alone(guidance: float) -> None:
    unet = Knowing(torch.zeros(SHAPE))
    found = draw(unet, "dpm-solver++", guidance=guidance)
    assert unet.batches == [2] * 4
    torch.testing.assert_close(found, torch.ones(2, *SHAPE), rtol=0, atol=1e-4)


def test_guidance_leads_away_from_the_null_condition_which_is_zeros() -> None:
    unet = Knowing(torch.full(SHAPE, 0.5))
    found = draw(unet, "dpm-solver++", guidance=3.0)
    assert unet.batches == [4] * 4
    torch.testing.assert_close(found, torch.full((2, *SHAPE), 0.5 + 3.0), rtol=0, atol=1e-4)  # 0.5 without a prompt, 1.5 with


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samples_do_not_depend_on_their_batch(sampler: str) -> None:
    whole = draw(Curved(), sampler, num=4)
    halves = torch.cat([draw(Curved(), sampler, num=1), draw(Curved(), sampler, num=3, first=1)])
    torch.testing.assert_close(halves, whole, rtol=0, atol=0)


def test_the_generators_are_what_a_stochastic_sampler_draws_from() -> None:
    one, again = draw(Curved(), "lcm"), draw(Curved(), "lcm")
    other = draw(Curved(), "lcm", generators=generators(2, first=7))
    assert torch.equal(one, again)
    assert (one - other).abs().max() > 0.1
    assert torch.equal(draw(Curved(), "ddim-trailing"), draw(Curved(), "ddim-trailing", generators=None))


@pytest.mark.parametrize("num", [None, 1])
def test_a_stochastic_sampler_without_a_generator_for_each_sample_is_refused(num: int | None) -> None:
    with pytest.raises(ConfigError, match="'lcm' draws noise: it needs a generator for each of 2 samples, got (none|1)"):
        draw(Curved(), "lcm", generators=None if num is None else generators(num))


def test_an_unknown_sampler_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"no sampler 'euler'; available: dpm-solver\+\+, lcm, ddim-trailing"):
        draw(Curved(), "euler")


def test_the_result_is_float32_whatever_the_network_computes_in() -> None:
    seen = []

    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor, times: Tensor, embeds: Tensor, **_: object) -> tuple[Tensor]:
            seen.append(self.layer(x).dtype)
            return (self.layer(x),)

    assert draw(Linear(), "lcm", num_steps=1).dtype == torch.float32
    assert draw(Linear(), "lcm", num_steps=1, autocast=None).dtype == torch.float32
    assert seen == [torch.bfloat16, torch.float32]

"""The student's way from noise to latents: the shifted grid, one to four steps, and its simulation while it learns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nitro_rt.schedule import grid, step_schedule
from nitro_training.model import predict_noise
from nitro_training.randomness import BatchRandom
from nitro_training.teacher import add_noise, alphas_cumprod


@dataclass(frozen=True)
class Place:
    """Where on which grid a student learns: step `index` of `num_steps`."""

    num_steps: int
    index: int

    @property
    def time(self) -> int:
        """The original time of this step."""
        return grid(self.num_steps)[self.index]


def draw_place(stage: int, one_step_share: float, source: torch.Generator) -> Place:
    """Bottom-up refinement: at stage k the student learns one step with `one_step_share`, else a later step of 2..k.

    Source: arXiv:2412.02030, section 3.5, which leaves the shares open.
    """
    if stage == 1 or torch.rand((), generator=source) < one_step_share:
        return Place(1, 0)
    num_steps = int(torch.randint(2, stage + 1, (), generator=source))
    return Place(num_steps, int(torch.randint(1, num_steps, (), generator=source)))


def predict_x0(
    unet: nn.Module, x_B4hw: Tensor, times_B: Tensor, shift: int, embeds_BTC: Tensor, pooled_BP: Tensor, abar_T: Tensor
) -> Tensor:
    """The student's x0 [B, 4, h, w] at the grid's times: told the shifted ones, and converted at them in float32."""
    shifted_B = times_B * shift // len(abar_T)
    noise = predict_noise(unet, x_B4hw, shifted_B, embeds_BTC, pooled_BP)
    with torch.autocast(x_B4hw.device.type, enabled=False):
        abar = abar_T[shifted_B].float().view(-1, 1, 1, 1)
        return (x_B4hw.float() - (1 - abar).sqrt() * noise.float()) / abar.sqrt()


@torch.no_grad()
def simulate(
    unet: nn.Module, noise_B4hw: Tensor, place: Place, shift: int, embeds_BTC: Tensor, pooled_BP: Tensor, abar_T: Tensor,
    random: BatchRandom,
) -> Tensor:  # fmt: skip
    """What the student would see at `place` in a real draw: its own earlier steps, without gradient (backward simulation).

    Source: Yin et al. 2024, DMD2, arXiv:2405.14867, section 4.5.
    """
    times = grid(place.num_steps)
    x = noise_B4hw
    for time, following in zip(times[: place.index], times[1 : place.index + 1], strict=True):
        now, then = (torch.full((len(x),), at, device=x.device) for at in (time, following))
        x0 = predict_x0(unet, x, now, shift, embeds_BTC, pooled_BP, abar_T)
        x = add_noise(x0, random.randn(*x.shape[1:]).to(x.device), then, abar_T)
    return x


@torch.no_grad()
def draw_student(
    unet: nn.Module, embeds_BTC: Tensor, pooled_BP: Tensor, noise_B4hw: Tensor, *, num_steps: int, shift: int,
    generator: torch.Generator,
) -> Tensor:  # fmt: skip
    """x0 [B, 4, h, w] in one to four steps, as the runtime draws.

    Args:
        noise_B4hw: x_T, standard normal.
        generator: source of the fresh noise between steps, on the host.
    """
    schedule = step_schedule(num_steps, shift, alphas_cumprod().numpy())
    x = noise_B4hw
    for index, time in enumerate(schedule.shifted_timesteps):
        eps = predict_noise(unet, x, torch.full((len(x),), time, device=x.device), embeds_BTC, pooled_BP)
        x = (x - schedule.sigma[index] * eps) / schedule.alpha[index]
        if index < num_steps - 1:
            fresh = torch.randn(x.shape, generator=generator).to(x.device)
            x = schedule.next_alpha[index] * x + schedule.next_sigma[index] * fresh
    return x

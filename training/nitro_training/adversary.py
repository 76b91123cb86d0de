"""One look of the discriminator: real and fake latents, noised again to t*, through the frozen encoder to the drawn heads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nitro_rt.errors import ConfigError
from nitro_training.backbone import UNetFeatures, crop_time_ids
from nitro_training.losses import Game
from nitro_training.model import LATENT_PX, time_ids
from nitro_training.pool import HeadPool
from nitro_training.randomness import BatchRandom
from nitro_training.teacher import add_noise


@dataclass(frozen=True)
class Condition:
    """What a prompt tells a UNet: embeddings [B, T, C] and pooled vectors [B, P]."""

    embeds_BTC: Tensor
    pooled_BP: Tensor


@dataclass(frozen=True)
class View:
    """What one task's heads judge: latents noised to t*, with their conditioning."""

    real_B4hw: Tensor
    fake_B4hw: Tensor
    condition: Condition
    time_ids_B6: Tensor


@dataclass
class Verdict:
    """What one look gives."""

    d_loss: Tensor
    """Scalar, with gradients to the drawn heads only."""
    g_loss: Tensor
    """Scalar, with gradients to the fake latents only."""
    drawn: list[int]
    """The heads that judged."""
    terms: dict[str, float] = field(default_factory=dict)
    """Losses and win rates per task and per t*, for the log."""


class Adversary:
    """The discriminator: a frozen backbone, a pool of heads, and the game they play."""

    def __init__(self, backbone: UNetFeatures, pool: HeadPool, game: Game, abar_T: Tensor, null: Condition) -> None:
        """
        Args:
            abar_T: the noise schedule.
            null: the null condition of a single sample, batch size 1.
        """
        self.backbone, self.pool, self.game, self.abar, self.null = backbone, pool, game, abar_T, null

    def judge(
        self, real_B4hw: Tensor, fake_B4hw: Tensor, condition: Condition, random: BatchRandom,
        autocast: Callable[[], AbstractContextManager[object]],
    ) -> Verdict:  # fmt: skip
        """Losses of both sides at one t*.

        The heads' loss sees the fake detached; the student's loss sees the heads frozen: neither leaves a gradient with the
        other.

        Args:
            fake_B4hw: the student's latents, with their graph.
            random: what t*, heads, windows and noise follow from.
        Raises: ConfigError if a crop is larger than the latents.
        """
        config = self.pool.config
        level = self.pool.draw_noise_level(random.shared)
        times = torch.full((len(real_B4hw),), config.noise_levels[level], device=real_B4hw.device)
        drawn = self.pool.draw(level, random.shared)
        real_scores, detached_scores, fake_scores = [], [], []
        terms: dict[str, float] = {}
        for task in config.tasks:
            view = self._view(task, real_B4hw, fake_B4hw, times, condition, random)
            with autocast():
                real, detached, fake = self._scores(view, times, drawn[task])
            terms[f"win_rate/{task}"] = self.pool.record(drawn[task], real.detach(), detached.detach())
            terms[f"d_loss/{task}"] = float(self.game.d_loss(real, detached).detach())
            terms[f"g_loss/{task}"] = float(self.game.g_loss(fake).detach())
            real_scores.append(real)
            detached_scores.append(detached)
            fake_scores.append(fake)
        d_loss = self.game.d_loss(torch.cat(real_scores), torch.cat(detached_scores))
        g_loss = self.game.g_loss(torch.cat(fake_scores))
        name = f"t{config.noise_levels[level]}"
        terms |= {f"d_loss/{name}": float(d_loss.detach()), f"g_loss/{name}": float(g_loss.detach())}
        return Verdict(d_loss, g_loss, _flat(drawn), terms)

    def _view(self, task: str, real: Tensor, fake: Tensor, times: Tensor, condition: Condition, random: BatchRandom) -> View:
        """The latents of one task, noised to t* with noise of their own; windows are the same for real and fake."""
        side = real.shape[-1]
        ids = time_ids(len(real), side * LATENT_PX)
        if task.startswith("local"):
            crop = self.pool.config.crop_latents
            require_crop(crop, side)
            corners = torch.stack([random.randint(side - crop + 1), random.randint(side - crop + 1)], dim=1)
            real, fake = crops(real, corners, crop), crops(fake, corners, crop)
            if self.pool.config.crop_time_ids == "crop":
                ids = crop_time_ids(side, corners, crop)
        if task.endswith("unconditional"):
            condition = Condition(
                self.null.embeds_BTC.expand_as(condition.embeds_BTC), self.null.pooled_BP.expand_as(condition.pooled_BP)
            )
        noisy_real, noisy_fake = (add_noise(x, random.randn(*x.shape[1:]).to(x.device), times, self.abar) for x in (real, fake))
        return View(noisy_real, noisy_fake, condition, ids.to(real.device))

    def _scores(self, view: View, times: Tensor, drawn: list[list[int]]) -> tuple[Tensor, Tensor, Tensor]:
        """Scores [H, B] of real; of fake for the heads' loss; of fake for the student's."""
        embeds, pooled = view.condition.embeds_BTC, view.condition.pooled_BP
        with torch.no_grad():
            real_features = self.backbone(view.real_B4hw, times, embeds, pooled, view.time_ids_B6)
        fake_features = self.backbone(view.fake_B4hw, times, embeds, pooled, view.time_ids_B6)
        real = self.pool.scores(drawn, real_features)
        detached = self.pool.scores(drawn, [feature.detach() for feature in fake_features])
        heads = [self.pool.head(index) for indices in drawn for index in indices]
        for head in heads:
            head.requires_grad_(False)
        fake = self.pool.scores(drawn, fake_features)
        for head in heads:
            head.requires_grad_(True)
        return real, detached, fake


def crops(latents_B4hw: Tensor, corners_B2: Tensor, side: int) -> Tensor:
    """A window of each sample, [B, 4, side, side].

    Args:
        corners_B2: top and left of every window, in latents.
    """
    pairs = zip(latents_B4hw, corners_B2.tolist(), strict=True)
    return torch.stack([sample[:, top : top + side, left : left + side] for sample, (top, left) in pairs])


def require_crop(crop: int, side: int) -> None:
    """Raises: ConfigError if a window of `crop` does not fit into latents of `side`."""
    if crop > side:
        raise ConfigError(
            f"pool.crop_latents = {crop} is larger than the latents ({side}x{side}); "
            f"use at most {side}, or drop the local tasks from pool.tasks"
        )


def _flat(drawn: Mapping[str, list[list[int]]]) -> list[int]:
    return [index for cells in drawn.values() for indices in cells for index in indices]

"""The peer of `training`: a plain LADD-style loop, with one discriminator head for each feature level.

Every head is fixed and sees all noise levels; it judges the whole latents with their prompt; the losses are the hinge's.
Written for the comparison: the model, backbone, heads, samples and optimisers' settings are those of the student's stage,
and the fake's features are computed once for both sides, as there. There is no pool, no crop, no null condition, no refresh,
no accumulation, no engine and no log.

Source: Sauer et al. 2024, latent adversarial diffusion distillation, arXiv:2403.12015. Its heads are also told t* and the
prompt's pooled vector; these are not.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nitro_rt.schedule import grid
from nitro_training.adversary import Condition
from nitro_training.backbone import UNetFeatures
from nitro_training.generator import predict_x0
from nitro_training.losses import hinge_d_loss, linear_g_loss
from nitro_training.model import LATENT_PX, time_ids
from nitro_training.pool import Head, HeadOptimizerConfig, PoolConfig
from nitro_training.randomness import BatchRandom
from nitro_training.samples import TeacherSamples
from nitro_training.student import StudentConfig
from nitro_training.teacher import add_noise, alphas_cumprod


class LaddLoop:
    """A one-step student against one head per feature level."""

    def __init__(
        self, config: StudentConfig, pool: PoolConfig, heads: HeadOptimizerConfig, init: nn.Module, backbone: UNetFeatures,
        samples: TeacherSamples, side: int, device: torch.device,
    ) -> None:  # fmt: skip
        """
        Args:
            config: of it shift, batch, learning rate, betas, weight decay, clip and precision.
            pool: of it the noise levels and the heads' width and depth.
            init: copied.
            side: of the latents.
        """
        self.config, self.pool, self.backbone, self.samples, self.device = config, pool, backbone, samples, device
        self.unet: nn.Module = copy.deepcopy(init).requires_grad_(True)
        self.unet.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = torch.optim.AdamW(
            self.unet.parameters(), lr=config.lr, betas=config.betas, weight_decay=config.weight_decay
        )
        pairs = zip(backbone.channels(), backbone.sides(side), strict=True)
        self.heads = nn.ModuleList(
            Head(channels, pool.width, min(pool.num_blocks, cells.bit_length() - 1)) for channels, cells in pairs
        ).to(device)
        self.head_optimizer = torch.optim.AdamW(
            self.heads.parameters(), lr=heads.lr, betas=heads.betas, weight_decay=heads.weight_decay
        )
        self.head_clip = heads.clip
        self.abar = alphas_cumprod().to(device)
        self.ids = time_ids(config.batch, side * LATENT_PX).to(device)

    def step(self, step: int) -> dict[str, float]:
        """One update of the heads, then one of the student."""
        config = self.config
        random = BatchRandom(config.seed, step, first=0, num=config.batch)
        sample = self.samples.draw(random)
        condition, shape = sample.condition, sample.x0_B4hw.shape[1:]
        t_star = self._times(self._draw_noise_level(random))
        real_noise, fake_noise = (random.randn(*shape).to(self.device) for _ in range(2))
        with self._autocast():
            fake = predict_x0(
                self.unet, sample.noise_B4hw, self._times(grid(1)[0]), config.shifted_timestep,
                condition.embeds_BTC, condition.pooled_BP, self.abar,
            )  # fmt: skip
            with torch.no_grad():
                real_features = self._features(add_noise(sample.x0_B4hw, real_noise, t_star, self.abar), t_star, condition)
            fake_features = self._features(add_noise(fake, fake_noise, t_star, self.abar), t_star, condition)
            d_loss = hinge_d_loss(self._scores(real_features), self._scores([f.detach() for f in fake_features]))
        d_norm = self._update(d_loss, self.heads, self.head_optimizer, self.head_clip)
        with self._autocast():
            self.heads.requires_grad_(False)
            g_loss = linear_g_loss(self._scores(fake_features))
            self.heads.requires_grad_(True)
        g_norm = self._update(g_loss, self.unet, self.optimizer, config.clip)
        return {"d_loss": d_loss.item(), "g_loss": g_loss.item(), "d_grad_norm": d_norm, "g_grad_norm": g_norm}

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16")

    def _draw_noise_level(self, random: BatchRandom) -> int:
        levels = self.pool.noise_levels
        return levels[int(torch.randint(len(levels), (), generator=random.shared))]

    def _times(self, time: int) -> Tensor:
        return torch.full((self.config.batch,), time, device=self.device)

    def _features(self, latents_B4hw: Tensor, times_B: Tensor, condition: Condition) -> tuple[Tensor, ...]:
        features: tuple[Tensor, ...] = self.backbone(latents_B4hw, times_B, condition.embeds_BTC, condition.pooled_BP, self.ids)
        return features

    def _scores(self, features: Sequence[Tensor]) -> Tensor:
        """Scores [H, B] float32."""
        return torch.stack([head(feature) for head, feature in zip(self.heads, features, strict=True)])

    @staticmethod
    def _update(loss: Tensor, module: nn.Module, optimizer: torch.optim.Optimizer, clip: float) -> float:
        """One step; returns the gradient's norm before clipping."""
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(module.parameters(), clip or float("inf"))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(norm)

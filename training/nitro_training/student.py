"""The one-to-four-step student: NitroFusion's adversarial distillation with a dynamic pool of heads, a first cut.

Two phases:

1. *Warm-up* to one-step weights. The paper starts from published one-step SDXL weights; a model of our own has none, so
   the student first regresses the teacher's result from the teacher's own noise (a cache of pairs x_T -> x_0).
2. *Adversarial.* Teacher results are real, student results fake. Both are noised again to t* and shown to the frozen
   encoder of the teacher; one head per feature level judges; heads are drawn from and returned to the pool.

Source: Chen et al. 2024, arXiv:2412.02030, sections 3.2-3.5.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional

from nitro_rt.errors import ConfigError
from nitro_rt.schedule import MAX_STEPS, grid, step_schedule
from nitro_training.backbone import UNetFeatures
from nitro_training.checkpoint import RunState
from nitro_training.loop import Losses, learning_rate, set_learning_rate
from nitro_training.model import predict_noise
from nitro_training.pool import HeadPool, hinge_d_loss, hinge_g_loss
from nitro_training.teacher import add_noise, alphas_cumprod, update_ema


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """Training of the student."""

    shifted_timestep: int = 500
    """The shift: 250 in NitroSD-Realism, 500 in NitroSD-Vibrant."""
    warmup_steps: int = 1500
    """Steps of regression on the teacher's pairs."""
    adversarial_steps: int = 1500
    batch: int = 32
    warmup_lr: float = 4e-4
    lr: float = 4e-5
    head_lr: float = 4e-4
    """Ten times the student's: heads start at random and die young."""
    weight_decay: float = 0.01
    one_step_share: float = 0.5
    """Share of samples drawn at the first time; the rest spreads evenly over the other times of the grid."""
    regression_weight: float = 1.0
    """Weight of the warm-up's loss in the adversarial phase; 0 is the paper's purely adversarial objective."""
    adversarial_weight: float = 0.1
    ema_decay: float = 0.998
    num_pairs: int = 6144
    """Size of the teacher's cache."""
    teacher_steps: int = 12
    """Solver steps per pair."""
    guidance: float = 3.0
    """Classifier-free guidance of the teacher: what the student learns to give without any."""
    seed: int = 51

    def __post_init__(self) -> None:
        if not 1 <= self.shifted_timestep <= 1000:
            raise ConfigError(f"student.shifted_timestep must be from 1 to 1000, got {self.shifted_timestep}")
        if self.num_pairs < 1 or self.teacher_steps < 1:
            raise ConfigError("student.num_pairs and student.teacher_steps must be at least 1")
        if self.batch < 2:
            raise ConfigError("student.batch must be at least 2: with one sample the hinge loss collapses to one mode")


@dataclass(frozen=True)
class TeacherPairs:
    """What the teacher made of its noise."""

    noise_N4hw: Tensor
    x0_N4hw: Tensor
    embeds_NTC: Tensor
    pooled_NP: Tensor


class StudentStage:
    name = "student"

    def __init__(
        self, config: StudentConfig, teacher: UNet2DConditionModel, features: UNetFeatures, pool: HeadPool, pairs: TeacherPairs
    ) -> None:
        self.config, self.features, self.pool, self.pairs = config, features, pool, pairs
        self.seed, self.num_steps = config.seed, config.warmup_steps + config.adversarial_steps
        self.unet = copy.deepcopy(teacher).requires_grad_(True).to(memory_format=torch.channels_last)
        self.ema = {"unet_ema": copy.deepcopy(self.unet).requires_grad_(False)}
        decay = config.weight_decay
        self.generator_optimizer = torch.optim.AdamW(self.unet.parameters(), betas=(0.9, 0.99), weight_decay=decay, fused=True)
        self.head_optimizer = torch.optim.AdamW(pool.parameters(), betas=(0.0, 0.99), weight_decay=0.0)
        self.abar = alphas_cumprod()
        self.times = torch.tensor(grid(MAX_STEPS))

    def state(self) -> RunState:
        return RunState(
            modules={"unet": self.unet, **self.ema, "pool": self.pool},
            optimizers={"unet": self.generator_optimizer, "pool": self.head_optimizer},
        )

    def step(self, step: int, generator: torch.Generator) -> Losses:
        config = self.config
        index = torch.randint(0, len(self.pairs.x0_N4hw), (config.batch,), generator=generator)
        embeds, pooled = self.pairs.embeds_NTC[index].float(), self.pairs.pooled_NP[index].float()
        real = self.pairs.x0_N4hw[index]
        times = self.draw_times(generator)
        adversarial = step >= config.warmup_steps
        inputs = self.student_inputs(self.pairs.noise_N4hw[index], real, times, embeds, pooled, generator, adversarial)
        fake = self.x0(self.unet, inputs, times, embeds, pooled)
        regression = functional.smooth_l1_loss(fake, real, beta=0.2)
        if not adversarial:
            self._update_student(regression, self._warmup_rate(step), step)
            return {"regression": regression.item()}
        d_loss, g_loss = self._judge(real, fake, embeds, pooled, generator)
        rate = learning_rate(step - config.warmup_steps, peak=config.lr, num_steps=config.adversarial_steps, warmup_steps=50)
        self._update_student(config.regression_weight * regression + config.adversarial_weight * g_loss, rate, step)
        self.pool.refresh(self.head_optimizer, generator)
        return {"regression": regression.item(), "d_loss": d_loss, "g_loss": g_loss.item()}

    def draw_times(self, generator: torch.Generator) -> Tensor:
        """One time of the grid per sample, [B]; the first with `one_step_share`."""
        config = self.config
        later = torch.randint(1, len(self.times), (config.batch,), generator=generator)
        first = torch.rand(config.batch, generator=generator) < config.one_step_share
        return self.times[torch.where(first, 0, later)]

    def student_inputs(
        self, noise: Tensor, real: Tensor, times: Tensor, embeds: Tensor, pooled: Tensor, generator: torch.Generator, own: bool
    ) -> Tensor:
        """What the student sees at `times`: pure noise at the first, else a result noised again.

        The result is the student's own one-step one when `own` (backward simulation), the teacher's otherwise.
        """
        first = times == self.times[0]
        if own and not bool(first.all()):
            with torch.no_grad():
                real = self.x0(self.unet, noise, self.times[:1].expand(len(noise)), embeds, pooled)
        fresh = torch.randn(noise.shape, generator=generator)
        return torch.where(first.view(-1, 1, 1, 1), noise, add_noise(real, fresh, times, self.abar))

    def x0(self, unet: nn.Module, x: Tensor, times: Tensor, embeds: Tensor, pooled: Tensor) -> Tensor:
        """The student's result [B, 4, h, w] float32: told the shifted time, and converted at it."""
        shifted = times * self.config.shifted_timestep // 1000
        with torch.autocast("cpu", torch.bfloat16):
            noise = predict_noise(unet, x, shifted, embeds, pooled)
        abar = self.abar[shifted].view(-1, 1, 1, 1)
        return (x - (1 - abar).sqrt() * noise) / abar.sqrt()

    def _judge(
        self, real: Tensor, fake: Tensor, embeds: Tensor, pooled: Tensor, generator: torch.Generator
    ) -> tuple[float, Tensor]:
        """Train the drawn heads on this batch, then give the student's loss by them.

        The heads see the detached fake; the student's pass runs with the heads frozen, so neither leaves gradients in the
        other.
        """
        level = int(torch.randint(0, len(self.pool.config.noise_levels), (1,), generator=generator))
        times = torch.full((len(real),), self.pool.config.noise_levels[level])
        drawn = self.pool.draw(level, generator)
        noisy_real = add_noise(real, torch.randn(real.shape, generator=generator), times, self.abar)
        noisy_fake = add_noise(fake, torch.randn(fake.shape, generator=generator), times, self.abar)
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                real_features = self.features(noisy_real, times, embeds, pooled)
            fake_features = self.features(noisy_fake, times, embeds, pooled)
            real_scores = self.pool.scores(drawn, real_features)
            fake_scores = self.pool.scores(drawn, tuple(feature.detach() for feature in fake_features))
        d_loss = hinge_d_loss(real_scores, fake_scores)
        set_learning_rate(self.head_optimizer, self.config.head_lr)
        self.head_optimizer.zero_grad(set_to_none=True)  # heads without a gradient are skipped: no update, no decay
        d_loss.backward()
        self.head_optimizer.step()
        self.pool.requires_grad_(False)
        with torch.autocast("cpu", torch.bfloat16):
            g_loss = hinge_g_loss(self.pool.scores(drawn, fake_features))
        self.pool.requires_grad_(True)
        return d_loss.item(), g_loss

    def _update_student(self, loss: Tensor, rate: float, step: int) -> None:
        set_learning_rate(self.generator_optimizer, rate)
        self.generator_optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.unet.parameters(), 1.0)
        self.generator_optimizer.step()
        update_ema(self.ema, {"unet": self.unet}, min(self.config.ema_decay, (1 + step) / (10 + step)))

    def _warmup_rate(self, step: int) -> float:
        return learning_rate(step, peak=self.config.warmup_lr, num_steps=self.config.warmup_steps, warmup_steps=100, final=0.1)


@torch.no_grad()
def draw_student(
    unet: nn.Module, embeds_BTC: Tensor, pooled_BP: Tensor, noise_B4hw: Tensor, *, num_steps: int, shift: int,
    generator: torch.Generator,
) -> Tensor:  # fmt: skip
    """x0 [B, 4, h, w] in one to four steps, as the runtime draws.

    Args:
        noise_B4hw: x_T, standard normal.
        generator: source of the fresh noise between steps.
    """
    schedule = step_schedule(num_steps, shift, alphas_cumprod().numpy())
    x = noise_B4hw
    for index, time in enumerate(schedule.shifted_timesteps):
        eps = predict_noise(unet, x, torch.full((len(x),), time), embeds_BTC, pooled_BP)
        x = (x - schedule.sigma[index] * eps) / schedule.alpha[index]
        if index < num_steps - 1:
            fresh = torch.randn(x.shape, generator=generator)
            x = schedule.next_alpha[index] * x + schedule.next_sigma[index] * fresh
    return x

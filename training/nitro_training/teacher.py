"""The multi-step teacher: UNet and text encoders trained together to predict noise, with caption dropout for guidance."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional

from nitro_rt.errors import ConfigError
from nitro_rt.schedule import alphas_cumprod_from_config
from nitro_training.checkpoint import RunState
from nitro_training.latents import CaptionedLatents
from nitro_training.loop import Losses, learning_rate, set_learning_rate, step_generator
from nitro_training.model import TextEncoders, predict_noise


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """Training of the teacher."""

    start: str = ""
    """A checkpoint folder whose UNet and text encoders the training goes on from, with a fresh optimiser; empty means from
    random weights."""
    num_steps: int = 6000
    batch: int = 32
    peak_lr: float = 8e-4
    warmup_steps: int = 200
    weight_decay: float = 0.01
    caption_dropout: float = 0.2
    """Share of samples that see the null condition (zeros)."""
    snr_clip: float = 5.0
    """Largest weight of an error in x0: errors weigh min(1 + SNR, clip), as in velocity prediction with min-SNR
    (Hang et al. 2023, arXiv:2303.09556). The plain noise loss weighs them by the SNR, which at the first timestep is
    0.005: a small model then hardly learns what a caption means for shape and colour."""
    ema_decay: float = 0.998
    recoloured_share: float = 0.4
    """Share of draws that are hue-shifted copies."""
    seed: int = 31

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ConfigError(f"teacher.batch must be at least 1, got {self.batch}")


def alphas_cumprod() -> Tensor:
    """abar of SDXL's noise schedule, [1000] float32."""
    return torch.from_numpy(alphas_cumprod_from_config({}))


class TeacherStage:
    name = "teacher"

    def __init__(self, config: TeacherConfig, unet: UNet2DConditionModel, text: TextEncoders, data: CaptionedLatents) -> None:
        self.config, self.text, self.data = config, text, data
        self.num_steps, self.seed = config.num_steps, config.seed
        self.unet = unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.trained: dict[str, nn.Module] = {"unet": self.unet, **text.modules()}
        self.ema = {f"{name}_ema": copy.deepcopy(module).requires_grad_(False) for name, module in self.trained.items()}
        self.parameters = [p for module in self.trained.values() for p in module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=config.peak_lr, betas=(0.9, 0.99), weight_decay=config.weight_decay, fused=True
        )
        self.abar = alphas_cumprod()

    def state(self) -> RunState:
        return RunState(modules={**self.trained, **self.ema}, optimizers={"teacher": self.optimizer})

    def step(self, step: int) -> Losses:
        config, generator = self.config, step_generator(self.seed, step)
        rate = learning_rate(step, peak=config.peak_lr, num_steps=config.num_steps, warmup_steps=config.warmup_steps)
        set_learning_rate(self.optimizer, rate)
        latents, rows = self.data.draw(config.batch, generator)
        noise = torch.randn(latents.shape, generator=generator)
        times = torch.randint(0, 1000, (config.batch,), generator=generator)
        kept = torch.rand(config.batch, generator=generator) >= config.caption_dropout
        with torch.autocast("cpu", torch.bfloat16):
            embeds, pooled = self.text.encode(self.data.input_ids_MT[rows])
            embeds, pooled = embeds * kept.view(-1, 1, 1), pooled * kept.view(-1, 1)
            predicted = predict_noise(self.unet, add_noise(latents, noise, times, self.abar), times, embeds, pooled)
        errors = functional.mse_loss(predicted, noise, reduction="none").mean(dim=(1, 2, 3))
        loss = (noise_loss_weight(times, self.abar, config.snr_clip) * errors).mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        update_ema(self.ema, self.trained, min(config.ema_decay, (1 + step) / (10 + step)))
        return {"loss": loss.item(), "mse": errors.mean().item()}


def add_noise(x0_B4hw: Tensor, noise_B4hw: Tensor, times_B: Tensor, abar_T: Tensor) -> Tensor:
    """sqrt(abar) x0 + sqrt(1 - abar) noise, at each sample's time."""
    abar = abar_T[times_B].view(-1, 1, 1, 1)
    return abar.sqrt() * x0_B4hw + (1 - abar).sqrt() * noise_B4hw


def noise_loss_weight(times_B: Tensor, abar_T: Tensor, clip: float) -> Tensor:
    """min(1 + SNR, clip) / SNR, [B]: what a squared error of the predicted noise weighs.

    The squared error of x0 is that of the noise divided by the SNR, so in x0 the weight is min(1 + SNR, clip).
    """
    abar = abar_T[times_B]
    snr = abar / (1 - abar)
    return (1 + snr).clamp(max=clip) / snr


@torch.no_grad()
def update_ema(averages: dict[str, nn.Module], trained: dict[str, nn.Module], decay: float) -> None:
    """Move every average towards its module: average = decay * average + (1 - decay) * module."""
    for name, module in trained.items():
        for average, parameter in zip(averages[f"{name}_ema"].parameters(), module.parameters(), strict=True):
            average.lerp_(parameter, 1 - decay)

"""Training of the small VAE (diffusers' AutoencoderKL, factor 8): pixels to latents and back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional

from nitro_rt.errors import ConfigError
from nitro_training.checkpoint import RunState
from nitro_training.loop import Losses, learning_rate, set_learning_rate, step_generator


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """Shape and training of the VAE."""

    channels: tuple[int, ...] = (16, 32, 64, 128)
    """Width of each level; four levels make factor 8."""
    norm_groups: int = 8
    layers: int = 1
    """Residual layers per level of the encoder; the decoder has one more."""
    num_steps: int = 1500
    batch: int = 8
    peak_lr: float = 1.5e-3
    warmup_steps: int = 50
    kl_weight: float = 1e-6
    seed: int = 11

    def __post_init__(self) -> None:
        if len(self.channels) != 4:
            raise ConfigError(f"autoencoder.channels needs four levels (factor 8), got {list(self.channels)}")


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Further training of the decoder alone: the latents, and so everything trained on them, stay what they are."""

    num_steps: int = 600
    batch: int = 8
    peak_lr: float = 8e-4
    warmup_steps: int = 50
    kl_weight: float = 0.0
    seed: int = 12


def build(config: AutoencoderConfig, size_px: int) -> AutoencoderKL:
    levels = len(config.channels)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=config.channels,
        layers_per_block=config.layers,
        norm_num_groups=config.norm_groups,
        latent_channels=4,
        sample_size=size_px,
        scaling_factor=1.0,  # the latents are normalised inside the VAE's own 1x1 convolutions
        force_upcast=False,
    )


class AutoencoderStage:
    """Trains encoder and decoder together or, given a `DecoderConfig`, the decoder of a finished VAE."""

    def __init__(self, config: AutoencoderConfig | DecoderConfig, vae: AutoencoderKL, images_NHW3: Tensor) -> None:
        self.config, self.images_NHW3 = config, images_NHW3
        self.decoder_only = isinstance(config, DecoderConfig)
        self.name = "decoder" if self.decoder_only else "autoencoder"
        self.num_steps, self.seed = config.num_steps, config.seed
        self.vae = vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.trained: nn.Module = vae.decoder if self.decoder_only else vae
        self.optimizer = torch.optim.AdamW(self.trained.parameters(), betas=(0.9, 0.99), weight_decay=1e-4)

    def state(self) -> RunState:
        return RunState(modules={"vae": self.vae}, optimizers={"vae": self.optimizer})

    def step(self, step: int) -> Losses:
        config, generator = self.config, step_generator(self.seed, step)
        rate = learning_rate(step, peak=config.peak_lr, num_steps=self.num_steps, warmup_steps=config.warmup_steps)
        set_learning_rate(self.optimizer, rate)
        index = torch.randint(0, len(self.images_NHW3), (config.batch,), generator=generator)
        real = pixels_from_uint8(self.images_NHW3[index])
        with torch.autocast("cpu", torch.bfloat16):
            with torch.set_grad_enabled(not self.decoder_only):
                posterior = self.vae.encode(real).latent_dist
                mean, logvar = posterior.mean.float(), posterior.logvar.float()
            noise = torch.randn(mean.shape, generator=generator)
            fake = self.vae.decode(mean + noise * torch.exp(0.5 * logvar)).sample.float()
        kl = 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).mean()
        loss = reconstruction_loss(fake, real) + config.kl_weight * kl
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained.parameters(), 1.0)
        self.optimizer.step()
        mse = functional.mse_loss(fake.detach().clamp(-1, 1), real) / 4
        return {"loss": loss.item(), "kl": kl.item(), "psnr_db": float(-10 * torch.log10(mse))}


def reconstruction_loss(fake_B3HW: Tensor, real_B3HW: Tensor) -> Tensor:
    """Mean absolute error, half that of the horizontal and vertical differences (sharp edges), and squared errors.

    The squared error of the picture averaged over 4x4 pixels weighs most: without it the small encoder first spends its
    channels on outlines and stays nearly colour-blind for a thousand steps.
    """
    total = functional.l1_loss(fake_B3HW, real_B3HW) + 2.0 * functional.mse_loss(fake_B3HW, real_B3HW)
    for axis in (-1, -2):
        total = total + 0.5 * functional.l1_loss(fake_B3HW.diff(dim=axis), real_B3HW.diff(dim=axis))
    return total + 4.0 * functional.mse_loss(functional.avg_pool2d(fake_B3HW, 4), functional.avg_pool2d(real_B3HW, 4))


def pixels_from_uint8(images_BHW3: Tensor) -> Tensor:
    """[B, H, W, 3] uint8 to [B, 3, H, W] in [-1, 1], channels-last."""
    return images_BHW3.permute(0, 3, 1, 2).float().div(127.5).sub(1.0).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def encode_all(vae: AutoencoderKL, images_NHW3: Tensor, batch: int = 64) -> Tensor:
    """The posterior means of all images, [N, 4, H/8, W/8] float32, not yet scaled."""
    vae.eval()
    means = [vae.encode(pixels_from_uint8(chunk)).latent_dist.mean for chunk in images_NHW3.split(batch)]
    return torch.cat(means).float()

"""How alike two UNets draw: one-step pictures of the same prompts from the same noise, compared pixel by pixel."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor

from nitro_export.checkpoint import read_checkpoint
from nitro_training.generator import draw_student
from nitro_training.sheet import pixels

BATCH = 8
"""Pictures drawn at a time."""


@dataclass(frozen=True, kw_only=True)
class Likeness:
    """Two sets of uint8 pictures, compared over all their pixels."""

    mean_abs_difference: float
    """Of 255 levels."""
    psnr_db: float | None
    """Peak signal-to-noise ratio; None where the pictures are the same."""


@dataclass(frozen=True)
class Gallery:
    """A checkpoint's prompts and noise, to be drawn with whatever weights its UNet is given. Float32, on the CPU."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    embeds_BTC: Tensor
    pooled_BP: Tensor
    noise_B4hw: Tensor
    shift: int

    @classmethod
    def load(cls, checkpoint: Path, prompts: Sequence[str], *, shift: int, seed: int) -> Gallery:
        """Text encoders, both tokenizers and the decoder are the checkpoint's own.

        Raises: ModelNotFound, ExportError if it is no SDXL checkpoint.
        """
        variant = read_checkpoint(checkpoint).variants["unet"]
        pipe = StableDiffusionXLPipeline.from_pretrained(
            checkpoint, dtype=torch.float32, variant=variant, local_files_only=True
        )
        with torch.no_grad():
            embeds, _, pooled, _ = pipe.encode_prompt(list(prompts), do_classifier_free_guidance=False)
        side = pipe.unet.config.sample_size
        noise = torch.randn(len(prompts), 4, side, side, generator=torch.Generator().manual_seed(seed))
        return cls(pipe.unet.eval(), pipe.vae.eval(), embeds, pooled, noise, shift)

    @torch.no_grad()
    def draw(self, weights: Mapping[str, Tensor]) -> Tensor:
        """uint8 [N, H, W, 3], in one step, with these UNet weights."""
        self.unet.load_state_dict(dict(weights))
        pictures = []
        for rows in torch.arange(len(self.noise_B4hw)).split(BATCH):
            latents = draw_student(
                self.unet, self.embeds_BTC[rows], self.pooled_BP[rows], self.noise_B4hw[rows], num_steps=1, shift=self.shift,
                generator=torch.Generator().manual_seed(0),  # one step draws nothing from it
            )  # fmt: skip
            pictures.append(pixels(self.vae, latents))
        return torch.cat(pictures)


def likeness(first_NHW3: Tensor, second_NHW3: Tensor) -> Likeness:
    """Compare two sets of uint8 pictures, [N, H, W, 3]."""
    difference = first_NHW3.double() - second_NHW3.double()
    mean_square = float(difference.square().mean())
    psnr = 10 * math.log10(255**2 / mean_square) if mean_square else None
    return Likeness(mean_abs_difference=float(difference.abs().mean()), psnr_db=psnr)

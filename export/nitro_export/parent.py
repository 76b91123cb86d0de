"""The parent: a checkpoint itself in float32 arithmetic, which graphs, quantised layers and bundles are compared with.

Weights stay in the type and the files that they are stored in; each layer's are widened while it computes. So a full SDXL
UNet runs in float32 without 10 GB of memory. The VAE is small and is loaded whole.

Shapes: B batch, N steps, T tokens, h and w latents, H and W pixels.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPTokenizer

from nitro_export.checkpoint import Checkpoint
from nitro_export.loading import empty_part_of_graph, fill, load_part, widen
from nitro_export.stages import DecodeStage, DenoiseNetwork, DenoiseStage, TextStage
from nitro_rt.errors import ConfigError, ExportError
from nitro_rt.noise import draw_noise
from nitro_rt.schedule import StepSchedule


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """What was drawn, and everything that the denoiser saw on the way."""

    steps: tuple[dict[str, Tensor], ...]
    """Per step, the denoiser's inputs by name: latents, prompt_embeds, pooled_prompt_embeds, step_index, noise."""
    x0_BChw: Tensor
    """[B, 4, h, w] float32: the decoder's input."""
    images_BHWC: Tensor | None
    """[B, H, W, 3] uint8; None where only latents were asked for."""


class Parent:
    """One checkpoint, ready to draw. A part is loaded when it is first used and let go by `release`."""

    def __init__(self, checkpoint: Checkpoint, *, size_px: int, batch: int = 1) -> None:
        self.checkpoint = checkpoint
        self.size_px, self.batch = size_px, batch
        self.latent_size = size_px // checkpoint.vae_factor

    @functools.cached_property
    def text_stage(self) -> TextStage:
        encoders = [load_part(self.checkpoint, part, None) for part in ("text_encoder", "text_encoder_2")]
        for encoder in encoders:
            widen(encoder)
        return TextStage(*encoders, batch=self.batch, num_tokens=self.checkpoint.num_tokens).eval()

    @functools.cached_property
    def network(self) -> DenoiseNetwork:
        unet = load_part(self.checkpoint, "unet", None)
        widen(unet)
        return DenoiseNetwork(unet).eval()

    @functools.cached_property
    def decode_stage(self) -> DecodeStage:
        return self._decode_stage(load_part(self.checkpoint, "vae"))

    @functools.cached_property
    def folded_decode_stage(self) -> DecodeStage:
        """The decoder in the form that graphs have, to look at its layers: they are those of the graph, one by one."""
        vae, stored = empty_part_of_graph(self.checkpoint, "vae")
        fill(vae, stored, torch.float32)
        return self._decode_stage(vae)

    def _decode_stage(self, vae: Any) -> DecodeStage:
        return DecodeStage(vae, latent_size=self.latent_size, size_px=self.size_px, batch=self.batch).eval()

    def denoise_stage(self, schedule: StepSchedule) -> DenoiseStage:
        """The denoiser of one step count; all of them share `network`."""
        return DenoiseStage(
            self.network,
            schedule,
            size_px=self.size_px,
            latent_size=self.latent_size,
            batch=self.batch,
            num_tokens=self.checkpoint.num_tokens,
        ).eval()

    def release(self, *names: str) -> None:
        """Let go of stages that are not needed any more: `text_stage`, `network`, `decode_stage`."""
        for name in names:
            self.__dict__.pop(name, None)

    def tokens(self, prompts: Sequence[str]) -> tuple[Tensor, ...]:
        """[B, T] int64 for each of the two encoders.

        Raises: ConfigError unless there is one prompt per image of the batch; ExportError for a damaged tokenizer.
        """
        if len(prompts) != self.batch:
            raise ConfigError(f"{len(prompts)} prompts for a batch of {self.batch}; give one for each image")
        return tuple(
            tokenizer(
                list(prompts), padding="max_length", max_length=self.checkpoint.num_tokens, truncation=True, return_tensors="pt"
            )["input_ids"]
            for tokenizer in self._tokenizers
        )

    @functools.cached_property
    def _tokenizers(self) -> list[Any]:
        folders = [self.checkpoint.folder / part for part in ("tokenizer", "tokenizer_2")]
        try:
            return [CLIPTokenizer.from_pretrained(folder, local_files_only=True) for folder in folders]
        except Exception as exc:  # json, tokenizers and transformers each raise their own kinds for a damaged file
            raise ExportError(
                f"{folders[0].parent} has a tokenizer that cannot be read: {exc}; fetch the checkpoint again"
            ) from exc

    @torch.no_grad()
    def text(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Prompts to [B, T, C] embeddings and [B, P] pooled ones, float32."""
        embeds, pooled = self.text_stage(*self.tokens(prompts))
        return embeds, pooled

    @torch.no_grad()
    def draw(self, prompts: Sequence[str], seeds: Sequence[int], schedule: StepSchedule, *, decode: bool = True) -> Drawing:
        """Draw one batch exactly as the runtime does: image i has its own stream of noise, seeded with `seeds[i]`."""
        embeds, pooled = self.text(prompts)
        num_steps, channels = len(schedule.timesteps), self.checkpoint.unet["in_channels"]
        sample_CHW = (channels, self.latent_size, self.latent_size)
        noises = torch.from_numpy(draw_noise(seeds, num_steps, len(prompts), self.batch, sample_CHW))
        stage, latents, steps = self.denoise_stage(schedule), noises[0], []
        for index in range(num_steps):
            noise = noises[index + 1] if index + 1 < num_steps else torch.zeros_like(latents)
            given = (latents, embeds, pooled, torch.tensor([index]), noise)
            steps.append({spec.name: tensor for spec, tensor in zip(stage.inputs, given, strict=True)})
            latents = stage(*given)
        images = self.decode_stage(latents) if decode else None
        return Drawing(steps=tuple(steps), x0_BChw=latents, images_BHWC=images)

"""The parts of a small SDXL-layout model, and its folder as diffusers reads it."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, LCMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from nitro_rt.errors import ConfigError, TrainingError

RUN_FILE = "run.json"
LATENT_PX = 8
"""Pixels per latent, in each direction."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of the text encoders and the UNet; the block structure is SDXL's."""

    text_widths: tuple[int, int] = (96, 128)
    text_layers: int = 3
    text_heads: tuple[int, int] = (2, 2)
    channels: tuple[int, int, int] = (64, 128, 176)
    transformer_layers: tuple[int, int, int] = (1, 1, 1)
    heads: tuple[int, int, int] = (1, 2, 4)
    """Attention heads per level (the first level has no attention, as in SDXL)."""
    norm_groups: int = 16
    time_id_dim: int = 16
    """Width of the sinusoid of each of SDXL's six size numbers."""
    seed: int = 21

    def __post_init__(self) -> None:
        for width in self.channels:
            if width % self.norm_groups:
                raise ConfigError(f"model.channels {list(self.channels)} must be multiples of norm_groups {self.norm_groups}")


@dataclass
class TextEncoders:
    """Both CLIP text encoders, as SDXL joins them."""

    tokenizer: CLIPTokenizer
    first: CLIPTextModel
    second: CLIPTextModelWithProjection
    tokenizer_2: CLIPTokenizer | None = None
    """The second encoder's, where it is another: SDXL's own pads with "!". Both of a small model share one."""

    def tokenize(self, captions: list[str]) -> Tensor:
        """What `encode` takes: [B, T] int64, or [B, 2, T] where each encoder has a tokenizer of its own."""
        ids = _tokenize(self.tokenizer, captions)
        return ids if self.tokenizer_2 is None else torch.stack([ids, _tokenize(self.tokenizer_2, captions)], dim=1)

    def encode(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Prompt embeddings [B, T, C] (penultimate layers of both, side by side) and the second's pooled vector [B, P]."""
        ids = input_ids.to(self.first.device)
        first_ids, second_ids = ids.unbind(1) if ids.ndim == 3 else (ids, ids)
        first = self.first(first_ids, output_hidden_states=True)
        second = self.second(second_ids, output_hidden_states=True)
        return torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1), second.text_embeds

    def modules(self) -> dict[str, nn.Module]:
        return {"text_encoder": self.first, "text_encoder_2": self.second}


def _tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    encoded = tokenizer(
        captions, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    )
    ids: Tensor = encoded.input_ids
    return ids


def build_text_encoders(config: ModelConfig, tokenizer: CLIPTokenizer) -> TextEncoders:
    first_width, second_width = config.text_widths
    return TextEncoders(
        tokenizer,
        CLIPTextModel(_text_config(config, tokenizer, first_width, config.text_heads[0])),
        CLIPTextModelWithProjection(_text_config(config, tokenizer, second_width, config.text_heads[1])),
    )


def _text_config(config: ModelConfig, tokenizer: CLIPTokenizer, width: int, heads: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=3 * width,
        projection_dim=width,
        num_hidden_layers=config.text_layers,
        num_attention_heads=heads,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=len(tokenizer) - 2,
        eos_token_id=len(tokenizer) - 1,
        pad_token_id=len(tokenizer) - 1,
    )


def build_unet(config: ModelConfig, size_px: int) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=size_px // 8,
        block_out_channels=config.channels,
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=config.transformer_layers,
        attention_head_dim=config.heads,
        cross_attention_dim=sum(config.text_widths),
        norm_num_groups=config.norm_groups,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=config.time_id_dim,
        projection_class_embeddings_input_dim=6 * config.time_id_dim + config.text_widths[1],
    )


def time_ids(batch: int, size_px: int) -> Tensor:
    """SDXL's size conditioning [B, 6]: original size, crop offset, target size."""
    return torch.tensor([[size_px, size_px, 0, 0, size_px, size_px]], dtype=torch.float32).expand(batch, 6)


def predict_noise(unet: nn.Module, latents_B4hw: Tensor, times_B: Tensor, embeds_BTC: Tensor, pooled_BP: Tensor) -> Tensor:
    """The UNet's noise prediction, [B, 4, h, w] float32; `times_B` is what the network is told."""
    ids = time_ids(len(latents_B4hw), latents_B4hw.shape[-1] * LATENT_PX).to(latents_B4hw.device)
    added = {"text_embeds": pooled_BP, "time_ids": ids}
    sample: Tensor = unet(latents_B4hw, times_B, embeds_BTC, added_cond_kwargs=added, return_dict=False)[0]
    return sample.float()


def lcm_scheduler() -> LCMScheduler:
    """SDXL's noise schedule in the scheduler that runs 1-4 steps."""
    return LCMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, num_train_timesteps=1000, original_inference_steps=4
    )


def save_checkpoint(
    folder: Path, *, vae: AutoencoderKL, text: TextEncoders, unet: UNet2DConditionModel, run: dict[str, Any]
) -> None:
    """Write the diffusers SDXL folder, FP16 safetensors, with `run.json`; replaced whole by renames.

    Killed between the two renames, it leaves the old folder beside, as `.<name>.old`; the next call puts a new one in place.

    Raises: TrainingError if it cannot be written; a folder that was there is then untouched.
    """
    hidden, old = folder.parent / f".{folder.name}.partial", folder.parent / f".{folder.name}.old"
    shutil.rmtree(hidden, ignore_errors=True)
    try:
        hidden.parent.mkdir(parents=True, exist_ok=True)
        pipeline = StableDiffusionXLPipeline(
            vae=_half(vae), text_encoder=_half(text.first), text_encoder_2=_half(text.second), tokenizer=text.tokenizer,
            tokenizer_2=text.tokenizer_2 or text.tokenizer, unet=_half(unet), scheduler=lcm_scheduler(), add_watermarker=False,
        )  # fmt: skip
        pipeline.save_pretrained(hidden, safe_serialization=True)
        _forget_origin(hidden)
        (hidden / RUN_FILE).write_text(json.dumps(run, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(folder, old)
        os.replace(hidden, folder)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as exc:
        shutil.rmtree(hidden, ignore_errors=True)
        if old.exists() and not folder.exists():
            os.replace(old, folder)
        raise TrainingError(f"cannot write the checkpoint {folder}: {exc}") from exc


def _forget_origin(folder: Path) -> None:
    """Drop the paths that the parts were loaded from out of their configs: they mean nothing to anybody else."""
    for path in folder.glob("*/*.json"):
        config = json.loads(path.read_text(encoding="utf-8"))
        if config.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _half(module: Any) -> Any:
    """A copy in FP16: the training weights stay FP32."""
    import copy

    return copy.deepcopy(module).half()

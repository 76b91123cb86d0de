"""The configurations of Stable Diffusion XL base 1.0, so that a run can be planned before anything is fetched.

Only what decides shapes; a checkpoint's own files say the same in more words.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nitro_rt.errors import TrainingError

_UNET = {
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [320, 640, 1280],
    "layers_per_block": 2,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
_TEXT_ENCODER = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "projection_dim": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
}
_TEXT_ENCODER_2 = {
    "vocab_size": 49408,
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "projection_dim": 1280,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "max_position_embeddings": 77,
}
_VAE = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "norm_num_groups": 32,
    "sample_size": 1024,
}
BUILT_IN: dict[str, dict[str, Any]] = {
    "unet": _UNET,
    "text_encoder": _TEXT_ENCODER,
    "text_encoder_2": _TEXT_ENCODER_2,
    "vae": _VAE,
}


@dataclass(frozen=True, kw_only=True)
class ModelConfigs:
    """The parts' configurations, as diffusers and transformers read them."""

    parts: Mapping[str, Mapping[str, Any]]
    """unet, text_encoder, text_encoder_2, vae."""
    source: str
    """Where they are from, for the reader of a plan."""


def read_configs(checkpoint: Path) -> ModelConfigs:
    """The configurations in a checkpoint folder, or SDXL base 1.0's where there is no such folder.

    Raises: TrainingError if the folder is there without one of them, or one is damaged.
    """
    if not checkpoint.exists():
        return ModelConfigs(parts=BUILT_IN, source=f"SDXL base 1.0, built in ({checkpoint} is not here)")
    parts = {name: _read(checkpoint / name / "config.json") for name in BUILT_IN}
    return ModelConfigs(parts=parts, source=str(checkpoint))


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise TrainingError(f"cannot read {path}: {exc}; fetch the checkpoint again, whole") from exc
    if not isinstance(found, dict):
        raise TrainingError(f"{path} is not a JSON object; fetch the checkpoint again")
    return found

"""A checkpoint's configurations, or those of Stable Diffusion XL base 1.0, so that a run can be planned before anything is
fetched."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nitro_export.sdxl import CONFIGS
from nitro_rt.errors import TrainingError

PARTS = ("unet", "text_encoder", "text_encoder_2", "vae")
BUILT_IN: dict[str, dict[str, Any]] = {part: CONFIGS[part] for part in PARTS}


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
    parts = {name: _read(checkpoint / name / "config.json") for name in PARTS}
    return ModelConfigs(parts=parts, source=str(checkpoint))


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise TrainingError(f"cannot read {path}: {exc}; fetch the checkpoint again, whole") from exc
    if not isinstance(found, dict):
        raise TrainingError(f"{path} is not a JSON object; fetch the checkpoint again")
    return found

"""Single-file checkpoints: which parts of SDXL one file holds, and their tensors under diffusers' names.

Read are UNets alone (diffusers' names, or the original ones with or without `model.diffusion_model.`), autoencoders alone,
and whole checkpoints as ComfyUI saves them:

    model.diffusion_model.*       UNet
    conditioner.embedders.0.*     first text encoder, in transformers' names
    conditioner.embedders.1.*     second text encoder, in OpenCLIP's names: query, key and value in one matrix
    first_stage_model.*           autoencoder, its attention as 1x1 convolutions

The names come from diffusers' own converters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from diffusers.loaders.single_file_utils import (
    LDM_UNET_KEY,
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)

from nitro_export.lazy import LazyTensor, Tensors, lazy_tensors
from nitro_rt.errors import ConfigError

PREFIXES = {
    "unet": LDM_UNET_KEY,
    "text_encoder": "conditioner.embedders.0.",
    "text_encoder_2": "conditioner.embedders.1.",
    "vae": "first_stage_model.",
}
NOT_WEIGHTS = ("position_ids", "logit_scale", "model_ema.decay", "model_ema.num_updates")
"""Ends of names: a counter, and a factor of CLIP's training."""
OTHER_OBJECTIVES = {"v_pred": "predicts v", "edm_mean": "is of EDM's kind"}
"""Marks that trainers leave in files of models which do not predict epsilon."""


def parts_of_file(path: Path) -> dict[str, dict[str, LazyTensor]]:
    """Part (unet, vae, text_encoder, text_encoder_2) -> its tensors as they are named in the file; see `diffusers_tensors`.

    Raises: ExportError if it is damaged or quantised; ConfigError if it holds no part of SDXL, and what it is instead.
    """
    tensors = lazy_tensors([path])
    for mark, what in OTHER_OBJECTIVES.items():
        if mark in tensors:
            raise ConfigError(f"{path} {what} (it holds {mark!r}); NitroFusion checkpoints predict epsilon")
    parts = {
        part: {key: tensor for key, tensor in tensors.items() if key.startswith(prefix)} for part, prefix in PREFIXES.items()
    }
    parts = {part: found for part, found in parts.items() if found}
    if parts:
        return parts
    if "conv_in.weight" in tensors or "input_blocks.0.0.weight" in tensors:
        return {"unet": tensors}
    if any(key.startswith("decoder.") for key in tensors):
        return {"vae": tensors}
    raise ConfigError(
        f"{path} holds no part of SDXL: {_what_else(tensors)}; first of its {len(tensors)} tensors: {_first(tensors)}"
    )


def diffusers_tensors(part: str, tensors: Tensors, config: Mapping[str, Any], where: str) -> dict[str, LazyTensor]:
    """The tensors of a part under diffusers' (or transformers') names, nothing left out.

    Args:
        tensors: one of `parts_of_file`'s.
        config: the part's config.json.
        where: the file, for messages.
    Raises: ConfigError if tensors are missing or left over.
    """
    try:
        converted = _CONVERTERS[part](dict(tensors), config)
    except (KeyError, IndexError, ValueError, AttributeError) as exc:
        raise ConfigError(f"{where} is not of SDXL's architecture: its {part} cannot be read ({exc!r})") from exc
    if missing := sorted(name for name, tensor in converted.items() if tensor is None):
        raise ConfigError(f"{where}: its {part} lacks {_listed(missing)}; it is not of SDXL's architecture, or was cut")
    used = {tensor.key for tensor in converted.values()}
    if unknown := sorted(key for key in tensors if key not in used and not key.endswith(NOT_WEIGHTS)):
        raise ConfigError(f"{where}: its {part} holds {_listed(unknown)}, which SDXL does not have")
    return {name: tensor for name, tensor in converted.items() if not name.endswith(NOT_WEIGHTS)}


def _unet(tensors: dict[str, LazyTensor], config: Mapping[str, Any]) -> dict[str, LazyTensor]:
    if "conv_in.weight" in tensors:
        return tensors
    prefixed = {key if key.startswith(LDM_UNET_KEY) else LDM_UNET_KEY + key: tensor for key, tensor in tensors.items()}
    return convert_ldm_unet_checkpoint(prefixed, config)


def _text_encoder_2(tensors: dict[str, LazyTensor], config: Mapping[str, Any]) -> dict[str, LazyTensor]:
    model = SimpleNamespace(config=SimpleNamespace(hidden_size=int(config["hidden_size"])))
    return convert_open_clip_checkpoint(model, tensors, prefix=PREFIXES["text_encoder_2"] + "model.")


def _vae(tensors: dict[str, LazyTensor], config: Mapping[str, Any]) -> dict[str, LazyTensor]:
    diffusers_has = ("decoder.mid_block.", "decoder.layers.")
    return tensors if any(key.startswith(diffusers_has) for key in tensors) else convert_ldm_vae_checkpoint(tensors, config)


_CONVERTERS: dict[str, Callable[[dict[str, LazyTensor], Mapping[str, Any]], dict[str, LazyTensor]]] = {
    "unet": _unet,
    "text_encoder": lambda tensors, config: convert_ldm_clip_checkpoint(tensors),
    "text_encoder_2": _text_encoder_2,
    "vae": _vae,
}


def _what_else(tensors: Tensors) -> str:
    if any("lora" in key for key in tensors):
        return "it is a LoRA, say --model CHECKPOINT --lora FILE"
    if any(key.startswith("cond_stage_model.") for key in tensors):
        return "it is a Stable Diffusion 1 or 2 checkpoint"
    if any(key.startswith(("double_blocks.", "joint_blocks.", "transformer_blocks.")) for key in tensors):
        return "it is a transformer (Flux, SD3 or the like)"
    return "a UNet has conv_in.weight, a checkpoint model.diffusion_model.*"


def _first(tensors: Tensors) -> str:
    return min(tensors, default="none")


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:10])
    return f"{len(names)} tensors: {shown}" + (" ..." if len(names) > 10 else "")

"""LoRAs, fused into the weights before export: W' = W + scale * alpha / rank * up @ down, in float32, tensor by tensor.

Read are what diffusers reads: kohya's names (`lora_unet_*`, `lora_te1_*`, `lora_te2_*`, of diffusers' or of the original UNet)
and diffusers' and PEFT's (`unet.<layer>.lora_A.weight`, `text_encoder.*`, `text_encoder_2.*`). The names come from diffusers'
own converters, which only rename here: each key is given as its own value. Where diffusers warns and leaves tensors out,
this refuses.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers.loaders.lora_conversion_utils import (
    _convert_non_diffusers_lora_to_diffusers,
    _maybe_map_sgm_blocks_to_diffusers,
)
from diffusers.utils.state_dict_utils import (
    DIFFUSERS_OLD_TO_PEFT,
    DIFFUSERS_TO_PEFT,
    convert_state_dict,
    convert_unet_state_dict_to_peft,
)
from torch import Tensor

from nitro_export.lazy import LazyTensor, Tensors, lazy_tensors, metadata_of
from nitro_rt.errors import ConfigError, ExportError

PARTS = ("unet", "text_encoder", "text_encoder_2")
KOHYA = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_")
DOWN, UP = ".lora_A.weight", ".lora_B.weight"
OTHER_KINDS = {
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "dora_scale": "DoRA",
    "magnitude": "DoRA",
    "lora_mid": "LoCon with a core tensor",
}
OTHER_KINDS |= {"oft_": "OFT", ".diff": "full differences", ".bias": "differences of biases"}
TEXT_PREFIX = "text_model."
"""transformers 5 dropped it from the first text encoder's names; files have it or not."""


@dataclass(frozen=True, kw_only=True)
class LoraLayer:
    """What is added to one weight."""

    down: LazyTensor
    """[rank, in] or [rank, in, kh, kw]"""
    up: LazyTensor
    """[out, rank] or [out, rank, 1, 1]"""
    factor: float
    """alpha / rank; 1 where the file has no alpha."""

    def fits(self, shape: Sequence[int]) -> bool:
        rank = self.down.shape[0]
        columns = math.prod(self.down.shape[1:]), math.prod(self.up.shape[1:])
        return self.up.shape[:1] == tuple(shape[:1]) and columns == (math.prod(shape[1:]), rank)

    def delta(self, dtype: torch.dtype) -> Tensor:
        """[out, in * kh * kw]"""
        return self.factor * (self.up.read().to(dtype).flatten(1) @ self.down.read().to(dtype).flatten(1))


@dataclass(frozen=True, kw_only=True)
class Lora:
    """One LoRA file, its tensors still on disk."""

    path: Path
    layers: Mapping[str, Mapping[str, LoraLayer]]
    """Part -> module -> layer, under diffusers' names."""
    metadata: Mapping[str, str]

    @property
    def base(self) -> str:
        """What its metadata says that it was trained on, for messages."""
        told = self.metadata.get("ss_base_model_version") or self.metadata.get("modelspec.architecture")
        return f"; its metadata says that it is for {told}" if told else ""


def read_lora(path: Path, layers_per_block: int) -> Lora:
    """Open a LoRA.

    Args:
        layers_per_block: of the UNet's config: the original UNet's blocks are counted through.
    Raises: ExportError if the file is damaged; ConfigError if it holds anything but pairs of up and down matrices.
    """
    tensors = lazy_tensors([path])
    metadata = metadata_of(path)
    matrices = {key: tensor for key, tensor in tensors.items() if not key.endswith(".alpha")}
    _refuse_other_kinds(path, list(matrices))
    kohya = bool(matrices) and all(key.startswith(KOHYA) for key in matrices)
    names = _from_kohya(path, matrices, layers_per_block) if kohya else _from_diffusers(path, matrices)
    settings = _settings(path, metadata)
    layers: dict[str, dict[str, LoraLayer]] = {part: {} for part in PARTS}
    for (part, name), key in names.items():
        if not name.endswith(DOWN):
            continue
        module = name.removesuffix(DOWN)
        if (part, module + UP) not in names:
            raise ConfigError(f"--lora {path}: {key} has no counterpart (up) in the file; fetch it again")
        down = tensors[key]
        alpha = tensors.get(f"{key.split('.')[0]}.alpha") if kohya else tensors.get(f"{part}.{module}.alpha")
        factor = float(alpha.read().float()) / down.shape[0] if alpha else _factor(settings, part, module, down.shape[0])
        layers[part][module] = LoraLayer(down=down, up=tensors[names[part, module + UP]], factor=factor)
    if 2 * sum(map(len, layers.values())) != len(matrices):
        raise ConfigError(f"--lora {path}: of its {len(matrices)} tensors not all are pairs of up and down; fetch it again")
    return Lora(path=path, layers={part: found for part, found in layers.items() if found}, metadata=metadata)


def require_fit(lora: Lora, parts: Mapping[str, Tensors]) -> None:
    """Raises: ConfigError saying how many of the LoRA's layers the model lacks or has in another shape, and which."""
    absent: list[str] = []
    shapes: list[str] = []
    for part, layers in lora.layers.items():
        for module, layer in layers.items():
            name = _weight(parts[part], part, module)
            if name is None:
                absent.append(f"{part}.{module}")
            elif not layer.fits(parts[part][name].shape):
                shapes.append(
                    f"{part}.{module} {list(parts[part][name].shape)}, the LoRA has "
                    f"{list(layer.up.shape)} x {list(layer.down.shape)}"
                )
    if absent or shapes:
        layers_in_all = sum(map(len, lora.layers.values()))
        lacking = f"{len(absent)} are not in the model: {_listed(absent)}" if absent else ""
        differing = f"{len(shapes)} have another shape: {_listed(shapes)}" if shapes else ""
        raise ConfigError(
            f"--lora {lora.path} is for another base: of its {layers_in_all} layers "
            f"{'; '.join(filter(None, (lacking, differing)))}{lora.base}"
        )


def fused(part: str, tensors: Tensors, loras: Sequence[tuple[Lora, float]]) -> dict[str, LazyTensor]:
    """The part's tensors with the LoRAs added; all of them in float32, rounded once to the stored type.

    Args:
        loras: with their scales; they passed `require_fit`.
    """
    added: dict[str, list[tuple[LoraLayer, float]]] = {}
    for lora, scale in loras:
        for module, layer in lora.layers.get(part, {}).items():
            name = _weight(tensors, part, module)
            assert name is not None, module
            added.setdefault(name, []).append((layer, scale))
    return {name: _fused(name, tensor, added[name]) if name in added else tensor for name, tensor in tensors.items()}


def _fused(name: str, weight: LazyTensor, added: Sequence[tuple[LoraLayer, float]]) -> LazyTensor:
    def read() -> Tensor:
        dtype = torch.promote_types(weight.dtype, torch.float32)
        total = weight.read().to(dtype)
        for layer, scale in added:
            total += scale * layer.delta(dtype).view(weight.shape)
        result = total.to(weight.dtype)
        if not result.isfinite().all():
            raise ExportError(
                f"{name} is no longer finite after the LoRA ({total.abs().max():.3g} does not fit into {weight.dtype}); "
                "take a smaller scale, or a checkpoint in a wider number type"
            )
        return result

    return LazyTensor(dtype=weight.dtype, shape=weight.shape, read=read, key=weight.key)


def _weight(tensors: Tensors, part: str, module: str) -> str | None:
    """The name of the module's weight among the part's tensors."""
    name = f"{module}.weight"
    candidates = [name] if part == "unet" else [name, TEXT_PREFIX + name, name.removeprefix(TEXT_PREFIX)]
    return next((candidate for candidate in candidates if candidate in tensors), None)


def _from_kohya(path: Path, matrices: Tensors, layers_per_block: int) -> dict[tuple[str, str], str]:
    """(part, PEFT's name) -> key in the file."""
    wrong = sorted(key for key in matrices if not key.endswith((".lora_down.weight", ".lora_up.weight")))
    if wrong:
        raise ConfigError(f"--lora {path}: {wrong[0]} (and {len(wrong) - 1} more) is neither up nor down; not supported")
    try:
        keys = {key: key for key in matrices}
        mapped = _maybe_map_sgm_blocks_to_diffusers(keys, SimpleNamespace(layers_per_block=layers_per_block))
        if len(mapped) != len(matrices):
            raise ConfigError(f"--lora {path} names layers of the UNet in two ways, diffusers' and the original; save it anew")
        return _by_part(path, _convert_non_diffusers_lora_to_diffusers(mapped)[0])
    except (ValueError, KeyError, IndexError) as exc:
        if isinstance(exc, ConfigError):
            raise
        raise ConfigError(f"--lora {path}: its names are not those of an SDXL LoRA: {exc}") from exc


def _from_diffusers(path: Path, matrices: Tensors) -> dict[tuple[str, str], str]:
    strange = sorted(key for key in matrices if not key.startswith(tuple(f"{part}." for part in PARTS)))
    if strange or not matrices:
        raise ConfigError(
            f"--lora {path} is no LoRA that is read here: {len(strange)} of its {len(matrices)} tensors are not named "
            f"{', '.join(KOHYA)} or {', '.join(f'{part}.' for part in PARTS)}, first {strange[0] if strange else 'none'}"
        )
    return _by_part(path, {key: key for key in matrices})


def _by_part(path: Path, names: Mapping[str, str]) -> dict[tuple[str, str], str]:
    found: dict[tuple[str, str], str] = {}
    for part in PARTS:
        own = {name.removeprefix(f"{part}."): key for name, key in names.items() if name.startswith(f"{part}.")}
        text = {**DIFFUSERS_OLD_TO_PEFT, **DIFFUSERS_TO_PEFT}
        converted = convert_unet_state_dict_to_peft(own) if part == "unet" else convert_state_dict(own, text)
        found |= {(part, name): key for name, key in converted.items()}
    if wrong := sorted(key for (_, name), key in found.items() if not name.endswith((DOWN, UP))):
        raise ConfigError(f"--lora {path}: {wrong[0]} (and {len(wrong) - 1} more) is neither up nor down; not supported")
    return found


def _refuse_other_kinds(path: Path, keys: Sequence[str]) -> None:
    for mark, kind in OTHER_KINDS.items():
        if marked := sorted(key for key in keys if mark in key):
            raise ConfigError(
                f"--lora {path} holds {kind} ({len(marked)} tensors, first {marked[0]}), which is not fused here; "
                "fuse it with the tool that made it, and give the result as --model"
            )


def _settings(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """PEFT's own settings, which diffusers stores in the file's metadata; empty for most files."""
    try:
        settings = json.loads(metadata.get("lora_adapter_metadata") or "{}")
    except ValueError as exc:
        raise ExportError(f"--lora {path}: its metadata is no JSON: {exc}; fetch it again") from exc
    for part in PARTS:
        if settings.get(f"{part}.use_dora"):
            raise ConfigError(f"--lora {path} is a DoRA, which is not fused here; fuse it with the tool that made it")
    return settings


def _factor(settings: Mapping[str, Any], part: str, module: str, rank: int) -> float:
    """alpha / rank by PEFT's settings (LoraConfig: alpha_pattern, lora_alpha, use_rslora); 1 without."""
    alpha = settings.get(f"{part}.lora_alpha")
    for pattern, value in (settings.get(f"{part}.alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            alpha = value
    if alpha is None:
        return 1.0
    return float(alpha) / (math.sqrt(rank) if settings.get(f"{part}.use_rslora") else rank)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(sorted(names)[:10]) + (" ..." if len(names) > 10 else "")

"""LoRAs exchanged in loaded engines: new weights without a new build, and back to the base exactly.

Weights are always made from the base checkpoint, never from what the engines hold: A, B and A again are the same bytes.
Only for backends that refit (TensorRT and TensorRT-RTX, built with --refit); elsewhere a LoRA is fused by --lora.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from nitro_engines.keys import key_of
from nitro_engines.models import parse_lora
from nitro_rt.bundle import Bundle
from nitro_rt.errors import ConfigError, EngineMismatch
from nitro_rt.manifest import sha256_of

Weights = dict[str, dict[str, NDArray[Any]]]
"""Stage kind -> initializer of its ONNX graph -> values."""

STAGE_OF = {"unet": "denoise", "text_encoder": "text", "text_encoder_2": "text"}
"""Part of a checkpoint -> the stage that its weights are in."""
PREFIX = {"unet": "network.unet.", "text_encoder": "encoder.", "text_encoder_2": "encoder_2."}
"""Part -> what its parameters are called by in the exported graph (the stages' `parts` in nitro_export)."""
FOLDED = "time_embedding."
"""Weights of the UNet that stand in no graph: the few timesteps are computed at export."""


class Refits(Protocol):
    """A pipeline or an executor."""

    def refit(self, weights: Mapping[str, Mapping[str, NDArray[Any]]]) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Refitted:
    """What a pipeline draws with now."""

    digest: str
    """Over the base checkpoint and the LoRAs with their scales; equal digests are equal weights."""
    loras: tuple[str, ...]
    num_weights: int
    """Tensors that were exchanged, those given back counted."""


class LoraRefit:
    """The LoRAs of one loaded bundle. Not thread-safe."""

    def __init__(self, bundle: Bundle, checkpoint: Path) -> None:
        """
        Args:
            checkpoint: the folder that the bundle was built from.
        Raises: ConfigError if it is another; EngineMismatch if the bundle's weights are quantised.
        """
        from nitro_export import checkpoint_sha256, read_checkpoint

        self._checkpoint, source = read_checkpoint(checkpoint), bundle.manifest.source
        found = checkpoint_sha256(checkpoint)
        if found != source.checkpoint_sha256:
            raise ConfigError(
                f"{checkpoint} is not what {bundle.folder} was built from: its digest is {found[:12]}, the bundle's source "
                f"{source.name} has {source.checkpoint_sha256[:12]}; give that checkpoint"
            )
        if bundle.manifest.quantisation is not None:
            raise EngineMismatch(f"{bundle.folder} holds quantised weights, which no LoRA is added to; build with --lora")
        denoiser = bundle.manifest.denoise[bundle.built_steps[0]]
        dtypes = {"text": bundle.manifest.text.compute_dtype, "denoise": denoiser.compute_dtype}
        if "bfloat16" in dtypes.values():
            raise EngineMismatch(f"{bundle.folder} computes in bfloat16, which NumPy has not; build with --precision fp16")
        self._dtypes, self._base_sha256 = dtypes, found
        self._changed: dict[str, set[str]] = {}
        """Part -> weights that differ from the base now."""

    def apply(self, pipe: Refits, loras: Sequence[str]) -> Refitted:
        """Let `pipe` draw with these LoRAs from now on; none gives the base back.

        Args:
            loras: `FILE` or `FILE:SCALE`, as --lora; fused in this order.
        Raises: ModelNotFound, ConfigError, ExportError for a LoRA that does not fit; EngineMismatch if the engines were not
            built to be refitted. The pipeline then draws as before.
        """
        requests = [parse_lora(text) for text in loras]
        weights, changed = self._weights([(request.path, request.scale) for request in requests])
        if any(weights.values()):
            pipe.refit(weights)
        self._changed = changed
        contents = [{"sha256": sha256_of(request.path), "scale": request.scale} for request in requests]
        return Refitted(
            digest=key_of({"checkpoint_sha256": self._base_sha256, "loras": contents}),
            loras=tuple(loras),
            num_weights=sum(map(len, weights.values())),
        )

    def _weights(self, loras: Sequence[tuple[Path, float]]) -> tuple[Weights, dict[str, set[str]]]:
        """What must be exchanged, which is all that these LoRAs or earlier ones change; and what then differs from the base."""
        from nitro_export.checkpoint import weight_files
        from nitro_export.lazy import lazy_tensors
        from nitro_export.lora import fused, read_lora, require_fit

        layers_per_block = int(self._checkpoint.unet.get("layers_per_block") or 0)
        opened = [(read_lora(path, layers_per_block), scale) for path, scale in loras]
        parts = {part for lora, _ in opened for part in lora.layers} | set(self._changed)
        tensors = {part: lazy_tensors(weight_files(self._checkpoint, part)) for part in parts}
        for lora, _ in opened:
            require_fit(lora, tensors)
        weights: Weights = {}
        changed: dict[str, set[str]] = {}
        for part in sorted(parts):
            new = fused(part, tensors[part], opened)
            changed[part] = {name for name, tensor in new.items() if tensor is not tensors[part][name]}
            if folded := sorted(name for name in changed[part] if name.startswith(FOLDED)):
                raise ConfigError(
                    f"a LoRA changes {folded[0]}, which the engines hold as a table of timesteps; build with --lora"
                )
            dtype = self._dtypes[STAGE_OF[part]]
            values = weights.setdefault(STAGE_OF[part], {})
            for name in sorted(changed[part] | self._changed.get(part, set())):
                values[initializer(part, name)] = new[name].read().float().numpy().astype(np.dtype(dtype))
        return weights, {part: names for part, names in changed.items() if names}


def initializer(part: str, name: str) -> str:
    """A checkpoint's weight under its name in the exported graph."""
    # transformers drops this prefix from the first encoder's names only; files have it or not.
    own = name.removeprefix("text_model.") if part == "text_encoder" else name
    return PREFIX[part] + own

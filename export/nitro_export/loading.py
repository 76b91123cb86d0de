"""A checkpoint's networks as torch modules in float32, every weight accounted for.

Their type is Any: diffusers and transformers are typed in part only.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import diffusers
import torch
import transformers

from nitro_export.checkpoint import Checkpoint
from nitro_rt.errors import ExportError


def load_text_encoders(checkpoint: Checkpoint) -> tuple[Any, Any]:
    # Eager attention: the causal mask is then a constant that is added, which every runtime reads.
    eager = {"attn_implementation": "eager"}
    return (
        _load(checkpoint, "text_encoder", transformers.CLIPTextModel.from_pretrained, **eager),
        _load(checkpoint, "text_encoder_2", transformers.CLIPTextModelWithProjection.from_pretrained, **eager),
    )


def load_unet(checkpoint: Checkpoint) -> Any:
    return _load(checkpoint, "unet", diffusers.UNet2DConditionModel.from_pretrained)


def load_vae(checkpoint: Checkpoint) -> Any:
    kind = checkpoint.vae.get("_class_name", "AutoencoderKL")
    return _load(checkpoint, "vae", getattr(diffusers, kind).from_pretrained)


def _load(checkpoint: Checkpoint, part: str, from_pretrained: Callable[..., Any], **options: Any) -> Any:
    """Raises: ExportError if a weight is missing, unknown or of another shape, or a file is cut."""
    folder = checkpoint.folder / part
    try:
        with _quiet():
            module, info = from_pretrained(
                folder,
                dtype=torch.float32,
                variant=checkpoint.variants[part],
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
                **options,
            )
    except Exception as exc:  # safetensors, diffusers and transformers each raise their own kinds for a damaged file
        raise ExportError(f"{folder} cannot be loaded: {exc}; fetch the checkpoint again") from exc
    for problem in ("missing_keys", "mismatched_keys", "unexpected_keys", "error_msgs"):
        if keys := sorted(map(str, info.get(problem) or ())):
            raise ExportError(
                f"{folder}: {len(keys)} {problem.replace('_', ' ')}, first {keys[0]}; "
                "weights and config.json do not belong together"
            )
    return module.eval().requires_grad_(False)


@contextmanager
def _quiet() -> Iterator[None]:
    """What the loaders log about keys comes as an error from us; progress bars of a tiny file say nothing."""
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    levels = [logger.level for logger in loggers]
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if bars:
            transformers.utils.logging.enable_progress_bar()

"""nitro-rt: one-to-four-step text-to-image from an engine bundle, without torch.

    from nitro_rt import Pipeline

    with Pipeline.load("engines/nitro-emoji-1step") as pipe:
        result = pipe("a red apple", seed=7)

Names are imported at first use, so that `import nitro_rt` and the command line start at once.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nitro_rt.bundle import Bundle, open_bundle
    from nitro_rt.errors import (
        BackendUnavailable,
        BuildError,
        BundleError,
        CaptureError,
        ConfigError,
        DeadlineExceeded,
        DeviceLost,
        EngineMismatch,
        ExportError,
        ModelNotFound,
        NitroError,
        PipelineClosed,
        QueueFull,
        ShapeError,
        TrainingError,
    )
    from nitro_rt.pipeline import ComputeTypeDiffers, Pipeline
    from nitro_rt.result import Result
    from nitro_rt.tokenizer import PromptTruncated

__all__ = [
    "BackendUnavailable",
    "BuildError",
    "Bundle",
    "BundleError",
    "CaptureError",
    "ComputeTypeDiffers",
    "ConfigError",
    "DeadlineExceeded",
    "DeviceLost",
    "EngineMismatch",
    "ExportError",
    "ModelNotFound",
    "NitroError",
    "Pipeline",
    "PipelineClosed",
    "PromptTruncated",
    "QueueFull",
    "Result",
    "ShapeError",
    "TrainingError",
    "open_bundle",
]

_HOME = {
    "Bundle": "bundle",
    "ComputeTypeDiffers": "pipeline",
    "Pipeline": "pipeline",
    "PromptTruncated": "tokenizer",
    "Result": "result",
    "open_bundle": "bundle",
}
"""Name -> module; all others are errors."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'nitro_rt' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"nitro_rt.{_HOME.get(name, 'errors')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

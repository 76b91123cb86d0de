"""ONNX Runtime's execution providers that a bundle may ask for, and why one is not to be had.

ONNX Runtime has two wheels with one import name: `onnxruntime` runs on the CPU, `onnxruntime-gpu` on both. Installed together
they overwrite each other's files, so the mending command removes both first.
"""

from __future__ import annotations

from collections.abc import Sequence

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}
"""What `--provider` says -> ONNX Runtime's name, which a bundle keeps in its engine options."""
GPU_PROVIDERS = (PROVIDERS["cuda"], PROVIDERS["tensorrt"])
INSTALL = "pip uninstall onnxruntime onnxruntime-gpu, then pip install 'nitro-rt[cuda]'"
"""What mends a missing GPU provider."""


def missing_provider(provider: str, available: Sequence[str]) -> str | None:
    """Why this ONNX Runtime does not have `provider`, and what mends it; None if it has.

    Args: available: what `onnxruntime.get_available_providers()` says, which is what it was built with.
    """
    if provider in available:
        return None
    mend = INSTALL if provider in GPU_PROVIDERS else "pip install 'nitro-rt[cpu]'"
    return f"this ONNX Runtime has no {provider}, it has {', '.join(available)}; {mend}"

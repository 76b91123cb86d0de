"""ONNX Runtime's execution providers that a bundle may ask for: what each is told, and why one is not to be had.

ONNX Runtime has two wheels with one import name: `onnxruntime` runs on the CPU, `onnxruntime-gpu` on both. Installed together
they overwrite each other's files, so the mending command removes both first.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nitro_rt.bundle import Bundle
from nitro_rt.errors import BackendUnavailable

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}
"""What `--provider` says -> ONNX Runtime's name, which a bundle keeps in its engine options."""
CPU, CUDA, TENSORRT = PROVIDERS.values()
GPU_PROVIDERS = (CUDA, TENSORRT)
INSTALL = "pip uninstall onnxruntime onnxruntime-gpu, then pip install 'nitro-rt[cuda]'"
"""What mends a missing GPU provider."""
REFUSES_GRAPHS = "graph capture feature"
"""Stands in what ONNX Runtime says where it cannot put a graph into a CUDA graph."""
_WARNING, _FATAL = 2, 4
"""ONNX Runtime's severities; the first is its default."""


@dataclass(frozen=True, kw_only=True)
class Placement:
    """How a provider is to run a graph on its GPU; the CPU's takes none of it."""

    device_id: int = 0
    """CUDA's number of the GPU."""
    own_graph: bool = False
    """Let ONNX Runtime capture the graph's kernels into a CUDA graph at the second run and replay it from then on."""
    cache: Path | None = None
    """Where the TensorRT provider keeps the engines that it builds; None keeps none."""


def provider_of(bundle: Bundle) -> str | None:
    """What the bundle's engines ask for; None for another backend's."""
    return bundle.manifest.decode.options.get("provider", CPU) if bundle.backend == "onnxruntime" else None


def provider_list(provider: str, compute_dtype: str, placement: Placement) -> list[tuple[str, dict[str, str]]]:
    """What `InferenceSession(providers=...)` is given, in order of precedence.

    The TensorRT provider leaves what it does not know to the CUDA provider. Names of the options:
    onnxruntime.ai/docs/execution-providers/CUDA-ExecutionProvider.html and TensorRT-ExecutionProvider.html
    """
    device = {"device_id": str(placement.device_id)}
    # Otherwise float32 matrices would be multiplied with 10 bits of mantissa on GPUs from sm80 on.
    cuda = device | ({"use_tf32": "0"} if compute_dtype == "float32" else {})
    if provider == TENSORRT:
        tensorrt = device | {"trt_fp16_enable": str(int(compute_dtype == "float16"))}
        if placement.own_graph:
            tensorrt["trt_cuda_graph_enable"] = "1"
        if placement.cache is not None:
            tensorrt |= {"trt_engine_cache_enable": "1", "trt_engine_cache_path": str(placement.cache)}
        return [(TENSORRT, tensorrt), (CUDA, cuda)]
    if provider == CUDA:
        return [(CUDA, cuda | ({"enable_cuda_graph": "1"} if placement.own_graph else {}))]
    return [(provider, {})]


def missing_provider(provider: str, available: Sequence[str]) -> str | None:
    """Why this ONNX Runtime does not have `provider`, and what mends it; None if it has.

    Args: available: what `onnxruntime.get_available_providers()` says, which is what it was built with.
    """
    if provider in available:
        return None
    mend = INSTALL if provider in GPU_PROVIDERS else "pip install 'nitro-rt[cpu]'"
    return f"this ONNX Runtime has no {provider}, it has {', '.join(available)}; {mend}"


def not_started(provider: str, why: str) -> str:
    """What to say where a provider is there and does not start; ONNX Runtime itself would carry on with the CPU.

    Args: why: what it said, or what libraries it did not find.
    """
    mend = "pip install 'nitro-rt[cuda]' brings CUDA 13 and cuDNN 9, nitro-rt doctor shows the driver"
    if provider == TENSORRT:
        mend = (
            "it needs the TensorRT that this onnxruntime-gpu was built with (1.31: TensorRT 10, so pip install "
            f"'tensorrt-cu13<11' in an environment without nitro-rt[tensorrt]); {mend}"
        )
    return f"{provider} does not start ({why}); {mend}"


def start_session(onnxruntime: Any, model: str | bytes, settings: Any, asked: Sequence[tuple[str, dict[str, str]]]) -> Any:
    """An `InferenceSession` on these providers and no other.

    ONNX Runtime's Python class prints a box and takes another provider, its C++ side goes on with the CPU and says so in its
    log only, so the one is switched off and the other compared with what was asked for.

    Args: model: a path, or the graph's own bytes.
    Raises: BackendUnavailable if the first does not start; what ONNX Runtime raises for the graph.
    """
    provider = asked[0][0]
    on_gpu = provider in GPU_PROVIDERS
    lacking = _preload(onnxruntime, provider) if on_gpu else ""
    try:
        with _quiet(onnxruntime) if on_gpu else contextlib.nullcontext():
            session = onnxruntime.InferenceSession(model, settings, providers=list(asked), enable_fallback=0)
    except RuntimeError as exc:  # of the Python binding, where a provider's libraries do not load; a graph's errors are others
        if not on_gpu or REFUSES_GRAPHS in str(exc):
            raise
        words = " ".join(str(exc).split())
        raise BackendUnavailable(not_started(provider, lacking or words)) from exc
    started = list(session.get_providers())
    if started[: len(asked)] != [name for name, _ in asked]:
        why = lacking or f"ONNX Runtime {onnxruntime.__version__} started {', '.join(started)}"
        raise BackendUnavailable(not_started(provider, why))
    return session


def _preload(onnxruntime: Any, provider: str) -> str:
    """Load CUDA's, cuDNN's and TensorRT's libraries from where pip puts them, which ONNX Runtime does not search by itself.

    Returns: which do not load, from what ONNX Runtime prints; empty where all do.
    """
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        onnxruntime.preload_dlls()
    names = re.findall(r"^Failed to load (\S+?):", said.getvalue(), re.MULTILINE)
    if provider == TENSORRT:
        try:
            importlib.import_module("tensorrt")
        except Exception:  # a broken native library may raise anything
            names.append("tensorrt")
    return f"these libraries do not load: {', '.join(names)}" if names else ""


@contextlib.contextmanager
def _quiet(onnxruntime: Any) -> Iterator[None]:
    """Without ONNX Runtime's own lines about a provider that does not start: we say it in one."""
    onnxruntime.set_default_logger_severity(_FATAL)
    try:
        yield
    finally:
        onnxruntime.set_default_logger_severity(_WARNING)

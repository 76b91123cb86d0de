"""ONNX Runtime: an engine is the exported graph itself, checked, with its weight files beside it.

What a GPU provider makes of a graph it makes when the graph is loaded, so a bundle for it is built without a GPU. What is
checked then is that ONNX Runtime's CPU provider takes the graph; the bundle's `target` names what checked it.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
from onnx import TensorProto, helper

from nitro_engines.backends.base import check_bindings
from nitro_engines.backends.onnx_graph import link_graph
from nitro_engines.files import foreign_errors
from nitro_engines.progress import Progress
from nitro_rt.cpu import cpu_target
from nitro_rt.device import find_driver
from nitro_rt.errors import BackendUnavailable, ConfigError
from nitro_rt.manifest import Graph, TensorSpec
from nitro_rt.providers import CPU, PROVIDERS, Placement, missing_provider, provider_list, start_session

_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(int64)": "int64",
    "tensor(uint8)": "uint8",
}


class OnnxRuntimeBackend:
    """Checks that ONNX Runtime takes the graph as it is."""

    name = "onnxruntime"

    def __init__(self, provider: str = "cpu") -> None:
        """
        Args:
            provider: cpu, cuda or tensorrt.
        Raises: ConfigError for another; BackendUnavailable if this ONNX Runtime has not even the CPU's.
        """
        if provider not in PROVIDERS:
            raise ConfigError(f"--provider {provider!r} is unknown; available: {', '.join(PROVIDERS)}")
        self._provider = PROVIDERS[provider]
        available = onnxruntime.get_available_providers()
        missing = missing_provider(CPU, available)
        if missing is not None:
            raise BackendUnavailable(f"--backend onnxruntime: {missing}")
        is_here = self._provider in available and (provider == "cpu" or bool(find_driver().gpus))
        self._checked_with = self._provider if is_here else CPU

    def toolchain(self) -> dict[str, str]:
        return {"onnxruntime": str(onnxruntime.__version__), "onnx": str(onnx.__version__)}

    def target(self) -> dict[str, str]:
        if self._provider == CPU:
            return cpu_target()
        return {"device": "cuda", "provider": self._provider, "checked_with": self._checked_with}

    def options(self, graph_dtype: str) -> dict[str, str]:
        return {"provider": self._provider}

    def compute_dtype(self, graph_dtype: str) -> str:
        if graph_dtype == "bfloat16":
            raise ConfigError(
                f"ONNX Runtime's {CPU}, which checks every graph, has no bfloat16 kernels for MatMul and Conv; "
                "say --precision fp16 or fp32, or --backend openvino"
            )
        if self._provider != CPU:
            return graph_dtype
        return "float16" if graph_dtype == "float16" and _has_fp16_kernels() else "float32"

    def compile(self, onnx_path: Path, graph: Graph, work: Path, progress: Progress | None = None) -> list[Path]:
        files = link_graph(onnx_path, graph, work)
        with foreign_errors(f"preparing {onnx_path.name} for ONNX Runtime", work):
            session = _session(str(files[0]), provider_list(self._checked_with, graph.compute_dtype, Placement()))
        check_bindings([_spec(node) for node in session.get_inputs()], graph.inputs, "inputs", onnx_path)
        check_bindings([_spec(node) for node in session.get_outputs()], graph.outputs, "outputs", onnx_path)
        return files


def _session(
    model: str | bytes, asked: Sequence[tuple[str, dict[str, str]]], level: Any = None, optimised: Path | None = None
) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = level or onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if optimised:
        options.optimized_model_filepath = str(optimised)
    return start_session(onnxruntime, model, options, asked)


def _spec(node: Any) -> TensorSpec:
    return TensorSpec(name=node.name, dtype=_DTYPES.get(node.type, node.type), shape=tuple(node.shape))


@functools.cache
def _has_fp16_kernels() -> bool:
    """Whether this build multiplies float16 matrices as such; on x86 it puts casts to float32 around them."""
    tensors = [helper.make_tensor_value_info(name, TensorProto.FLOAT16, [8, 8]) for name in "xwy"]
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "probe", tensors[:2], tensors[2:])
    probe = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    with tempfile.TemporaryDirectory() as folder:
        optimised = Path(folder) / "probe.onnx"
        level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        _session(probe.SerializeToString(), [(CPU, {})], level, optimised)
        return all(node.op_type != "Cast" for node in onnx.load(str(optimised)).graph.node)

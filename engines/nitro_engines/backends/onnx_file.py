"""ONNX Runtime: an engine is the exported graph itself, checked, with its weight files beside it."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
from onnx import TensorProto, helper

from nitro_engines.backends.base import check_bindings
from nitro_engines.backends.onnx_graph import link_graph
from nitro_engines.files import foreign_errors
from nitro_engines.host import cpu_target
from nitro_rt.errors import BackendUnavailable, BuildError, ConfigError
from nitro_rt.manifest import Graph, TensorSpec

PROVIDER = "CPUExecutionProvider"
_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(int64)": "int64",
    "tensor(uint8)": "uint8",
}


class OnnxRuntimeBackend:
    """Checks that ONNX Runtime takes the graph as it is."""

    name = "onnxruntime"

    def __init__(self) -> None:
        if PROVIDER not in onnxruntime.get_available_providers():
            raise BackendUnavailable(f"this onnxruntime lacks {PROVIDER}, it has {onnxruntime.get_available_providers()}")

    def toolchain(self) -> dict[str, str]:
        return {"onnxruntime": str(onnxruntime.__version__), "onnx": str(onnx.__version__)}

    def target(self) -> dict[str, str]:
        return cpu_target()

    def options(self, graph_dtype: str) -> dict[str, str]:
        return {"provider": PROVIDER}

    def compute_dtype(self, graph_dtype: str) -> str:
        if graph_dtype == "bfloat16":
            raise ConfigError(
                "ONNX Runtime's CPU provider has no bfloat16 kernels for MatMul and Conv; say --precision fp16 or fp32, "
                "or --backend openvino"
            )
        return "float16" if graph_dtype == "float16" and _has_fp16_kernels() else "float32"

    def compile(self, onnx_path: Path, graph: Graph, work: Path) -> list[Path]:
        files = link_graph(onnx_path, graph, work)
        with foreign_errors(f"preparing {onnx_path.name} for ONNX Runtime", work):
            session = _session(str(files[0]))
        if session.get_providers() != [PROVIDER]:
            raise BuildError(f"ONNX Runtime took {session.get_providers()} instead of {PROVIDER}")
        check_bindings([_spec(node) for node in session.get_inputs()], graph.inputs, "inputs", onnx_path)
        check_bindings([_spec(node) for node in session.get_outputs()], graph.outputs, "outputs", onnx_path)
        return files


def _session(model: str | bytes, level: Any = None, optimised: Path | None = None) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = level or onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if optimised:
        options.optimized_model_filepath = str(optimised)
    return onnxruntime.InferenceSession(model, options, providers=[PROVIDER])


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
        _session(probe.SerializeToString(), onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC, optimised)
        return all(node.op_type != "Cast" for node in onnx.load(str(optimised)).graph.node)

"""ONNX Runtime: an engine is the ONNX graph itself, checked, with its large weights in a file beside it.

A graph names its weights' file inside itself. Bundles name files by content, so that inner name is rewritten to the
content name. Inlining the weights would be simpler, but ends at protobuf's 2 GiB, and step counts could not share
them: the large weights of all `denoise` graphs are the same bytes in the same order, hence one file.
"""

from __future__ import annotations

import functools
import hashlib
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from nitro_engines.backends.base import check_bindings
from nitro_engines.backends.onnx_graph import dtype_name
from nitro_engines.files import foreign_errors
from nitro_engines.host import cpu_target
from nitro_rt.errors import BackendUnavailable, BuildError
from nitro_rt.manifest import Graph, TensorSpec

PROVIDER = "CPUExecutionProvider"
_MIN_EXTERNAL_BYTES = 16384
"""Smaller initializers stay in the graph: among them are the tables in which step counts differ."""
_ALIGNMENT = 64


class OnnxRuntimeBackend:
    """Checks graphs and makes their weights shareable."""

    name = "onnxruntime"

    def __init__(self) -> None:
        if PROVIDER not in onnxruntime.get_available_providers():
            raise BackendUnavailable(f"this onnxruntime lacks {PROVIDER}, it has {onnxruntime.get_available_providers()}")

    def toolchain(self) -> dict[str, str]:
        return {"onnxruntime": str(onnxruntime.__version__), "onnx": str(onnx.__version__)}

    def target(self) -> dict[str, str]:
        return cpu_target()

    def options(self, precision: str) -> dict[str, str]:
        return {"provider": PROVIDER}

    def compute_dtype(self, precision: str) -> str:
        return "float16" if precision == "fp16" and _has_fp16_kernels() else "float32"

    def compile(self, onnx_path: Path, graph: Graph, work: Path) -> list[Path]:
        with foreign_errors(f"preparing {onnx_path.name} for ONNX Runtime", work):
            model = onnx.load(str(onnx_path))
            weights = _externalise(model, work)
            engine = work / "engine.onnx"
            engine.write_bytes(model.SerializeToString(deterministic=True))
            session = _session(str(engine))
        if session.get_providers() != [PROVIDER]:
            raise BuildError(f"ONNX Runtime took {session.get_providers()} instead of {PROVIDER}")
        check_bindings(_specs(model.graph.input), graph.inputs, "inputs", onnx_path)
        check_bindings(_specs(model.graph.output), graph.outputs, "outputs", onnx_path)
        return [engine, *weights]


def _externalise(model: onnx.ModelProto, work: Path) -> list[Path]:
    """Move the large initializers of `model` into one file named by its content; [] if there are none."""
    large = [tensor for tensor in model.graph.initializer if _num_bytes(tensor) >= _MIN_EXTERNAL_BYTES]
    if not large:
        return []
    digest, places = hashlib.sha256(), []
    unnamed = work / "weights"
    with unnamed.open("wb") as file:
        for tensor in large:
            content = tensor.raw_data if tensor.HasField("raw_data") else numpy_helper.to_array(tensor).tobytes()
            padded = content + bytes(-len(content) % _ALIGNMENT)
            places.append((file.tell(), len(content)))
            file.write(padded)
            digest.update(padded)
    weights = unnamed.rename(work / f"{digest.hexdigest()}.bin")
    for tensor, (offset, length) in zip(large, places, strict=True):
        _point_to(tensor, weights.name, offset, length)
    return [weights]


def _point_to(tensor: TensorProto, location: str, offset: int, length: int) -> None:
    name, data_type, dims = tensor.name, tensor.data_type, list(tensor.dims)
    tensor.Clear()
    tensor.name, tensor.data_type = name, data_type
    tensor.dims.extend(dims)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(length))):
        tensor.external_data.add(key=key, value=value)


def _num_bytes(tensor: TensorProto) -> int:
    if tensor.data_type == TensorProto.STRING:
        return 0
    return int(np.prod(tensor.dims, dtype=np.int64)) * np.dtype(helper.tensor_dtype_to_np_dtype(tensor.data_type)).itemsize


def _session(model: str | bytes, level: Any = None, optimised: Path | None = None) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = level or onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if optimised:
        options.optimized_model_filepath = str(optimised)
    return onnxruntime.InferenceSession(model, options, providers=[PROVIDER])


def _specs(values: Any) -> list[TensorSpec]:
    specs = []
    for value in values:
        kind = value.type.tensor_type
        if any(not dim.HasField("dim_value") for dim in kind.shape.dim):
            raise BuildError(f"{value.name} has a dynamic shape; engines are static, export again")
        shape = tuple(dim.dim_value for dim in kind.shape.dim)
        specs.append(TensorSpec(name=value.name, dtype=dtype_name(kind.elem_type), shape=shape))
    return specs


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

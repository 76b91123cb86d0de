"""Reading ONNX graphs without their weights: bindings, and which number types the weights have."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx

from nitro_rt.errors import BuildError
from nitro_rt.manifest import Graph

_FLOATS = {onnx.TensorProto.FLOAT: "float32", onnx.TensorProto.FLOAT16: "float16", onnx.TensorProto.BFLOAT16: "bfloat16"}
_WANTED = {"fp32": "float32", "fp16": "float16"}


def check_graph(path: Path, graph: Graph, precision: str) -> None:
    """ONNX's own checker, and the built precision: a float32 graph would become a float32 engine without an error.

    A float16 graph may keep some constants in float32 (the schedule's arithmetic is), but not most of its weights.
    Raises: BuildError.
    """
    try:
        onnx.checker.check_model(str(path))
    except Exception as exc:  # the checker raises several unrelated types
        raise BuildError(f"{path.name} is not a valid ONNX graph: {' '.join(str(exc).split())}; export again") from exc
    num_bytes = float_weight_bytes(path)
    total, right = sum(num_bytes.values()), num_bytes.get(_WANTED[precision], 0)
    if total and 2 * right < total:
        found = ", ".join(f"{count} bytes {dtype}" for dtype, count in sorted(num_bytes.items()))
        raise BuildError(f"{path.name} was exported as {precision}, but its weights are {found}; export again")


def float_weight_bytes(path: Path) -> dict[str, int]:
    """Bytes of the floating-point initializers, by NumPy's dtype name; external data is not read."""
    counts: dict[str, int] = {}
    for tensor in onnx.load(str(path), load_external_data=False).graph.initializer:
        dtype = _FLOATS.get(tensor.data_type)
        if dtype:
            width = 4 if dtype == "float32" else 2
            counts[dtype] = counts.get(dtype, 0) + width * math.prod(tensor.dims)
    return counts


def dtype_name(elem_type: int) -> str:
    """NumPy's name of an ONNX element type."""
    return str(np.dtype(onnx.helper.tensor_dtype_to_np_dtype(elem_type)))

"""Reading ONNX graphs without their weights: validity, number types, and where the weights are."""

from __future__ import annotations

import math
from pathlib import Path

import onnx

from nitro_engines.files import link_or_copy, storage_errors
from nitro_export import structure
from nitro_rt.errors import BuildError
from nitro_rt.manifest import Graph

_FLOATS = {onnx.TensorProto.FLOAT: "float32", onnx.TensorProto.FLOAT16: "float16", onnx.TensorProto.BFLOAT16: "bfloat16"}
QUANTISED = {"int8": onnx.TensorProto.INT8, "fp8": onnx.TensorProto.FLOAT8E4M3FN}
"""Precision -> the type of its weights."""
MULTIPLYING = ("MatMul", "Gemm", "Conv")
"""Operators with the weights: first input the activations, second the weights."""


def load_structure(path: Path) -> onnx.ModelProto:
    """The graph; weights in other files are not read. Raises: BuildError if the file is no ONNX graph."""
    try:
        return structure.load_structure(path)
    except Exception as exc:  # protobuf's error, or the file system's
        raise BuildError(f"{path.name} cannot be read as an ONNX graph: {' '.join(str(exc).split())}; export again") from exc


def check_graph(path: Path, graph: Graph, precision: str | None = None) -> None:
    """ONNX's own checker, and the built precision: a float32 graph would become a float32 engine without an error.

    A float16 graph may keep some constants in float32 (the schedule's arithmetic is), but not most of its weights; a
    quantised one may keep sensitive operators in its float type, but not most of them.

    Args:
        precision: int8 or fp8 where this graph should be quantised; None: it should not.
    Raises: BuildError.
    """
    model = load_structure(path)
    try:
        structure.check_structure(path)
    except Exception as exc:  # the checker raises several unrelated types
        raise BuildError(f"{path.name} is not a valid ONNX graph: {' '.join(str(exc).split())}; export again") from exc
    num_bytes = float_weight_bytes(path)
    if 2 * num_bytes.get(graph.compute_dtype, 0) < sum(num_bytes.values()):
        found = ", ".join(f"{count} bytes {dtype}" for dtype, count in sorted(num_bytes.items()))
        raise BuildError(f"{path.name} should compute in {graph.compute_dtype}, but its weights are {found}; export again")
    if precision in QUANTISED:
        share = quantised_share(model, precision)
        if share < 0.5:
            raise BuildError(
                f"{path.name} should be quantised to {precision}, but only {share:.0%} of the weights that it multiplies "
                "by are (weight and activation both between QuantizeLinear and DequantizeLinear); quantise it again"
            )


def quantised_share(model: onnx.ModelProto, precision: str) -> float:
    """How much of the weights, by number, is multiplied as `precision`, from 0 to 1; 1 where nothing is multiplied."""
    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    makers = {name: node for node in graph.node for name in node.output}
    total = quantised = 0
    for node in graph.node:
        if node.op_type not in MULTIPLYING:
            continue
        passed, name = [], node.input[1]
        while name in makers and makers[name].op_type in ("Transpose", "DequantizeLinear", "Cast", "Reshape"):
            passed.append(makers[name].op_type)
            name = makers[name].input[0]
        if name not in weights:
            continue
        numbers = math.prod(weights[name].dims)
        total += numbers
        maker = makers.get(node.input[0])
        if weights[name].data_type == QUANTISED[precision] and "DequantizeLinear" in passed:
            quantised += numbers if maker is not None and maker.op_type == "DequantizeLinear" else 0
    return quantised / total if total else 1.0


def float_weight_bytes(path: Path) -> dict[str, int]:
    """Bytes of the floating-point initializers, by NumPy's dtype name; external data is not read."""
    counts: dict[str, int] = {}
    for tensor in load_structure(path).graph.initializer:
        dtype = _FLOATS.get(tensor.data_type)
        if dtype:
            width = 4 if dtype == "float32" else 2
            counts[dtype] = counts.get(dtype, 0) + width * math.prod(tensor.dims)
    return counts


def weight_bytes(path: Path) -> int:
    """Bytes of all initializers that are numbers of a network; those in other files are not read.

    Raises: BuildError if the file is no ONNX graph.
    """
    return sum(
        math.prod(tensor.dims) * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        for tensor in load_structure(path).graph.initializer
        if tensor.data_type not in (onnx.TensorProto.INT64, onnx.TensorProto.INT32, onnx.TensorProto.BOOL)
    )


def link_graph(onnx_path: Path, graph: Graph, work: Path) -> list[Path]:
    """The graph and its weight files in `work`, as hard links where the file system has them; the graph first.

    A graph names its weight files inside itself, and a bundle names files by content. The exporter names them by content
    too, so they move as they are, whatever their size, and the denoisers of several step counts share them.
    Raises: BuildError if the graph points to a file of another name, or links cannot be made.
    """
    known = {f"{reference.sha256}{Path(reference.path).suffix}" for reference in graph.files[1:]}
    unknown = sorted(external_files(onnx_path) - known)
    if unknown:
        raise BuildError(
            f"{onnx_path.name} keeps weights in {unknown[0]!r}, which is no content name of export.json, "
            f"found {', '.join(sorted(known)) or 'none'}; export again"
        )
    paths: list[Path] = []
    with storage_errors(f"linking {onnx_path.name}", work):
        for reference in graph.files:
            source = onnx_path.parent / reference.path
            paths.append(work / (source.name if paths else "engine.onnx"))
            link_or_copy(source, paths[-1])
    return paths


def external_files(path: Path) -> set[str]:
    """Names of the files that the graph keeps weights in, as they stand inside it."""
    tensors = load_structure(path).graph.initializer
    return {entry.value for tensor in tensors for entry in tensor.external_data if entry.key == "location"}

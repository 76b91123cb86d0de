"""The work of a stage, counted in its ONNX graph: floating-point operations and bytes, without loading weights.

Counted are the operators that multiply matrices: MatMul, Gemm, Conv and ConvTranspose, two operations for each multiplication
with its addition, as torch's flop counter does. Norms, activations and resizing are not: they are a percent of the operations,
and what they cost is bytes.

Two counts of bytes: `io_bytes`, the weights, inputs and outputs of the whole graph once, which nothing can avoid; and
`operator_bytes`, every matrix operator reading its operands and writing its result once, with all else fused into them and
attention scores never stored (as flash attention does).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Shape = tuple[int, ...]

WEIGHTED = ("Gemm", "Conv", "ConvTranspose")
QUANTISED_DTYPES = {"int8": "int8", "uint8": "int8", "float8e4m3fn": "fp8"}
POINTWISE = frozenset({"Add", "Sub", "Mul", "Div", "Softmax", "Cast", "Where", "IsNaN", "Clip", "Max", "Min"})
"""What lies between the two products of attention, and is fused with them."""


class NotCountable(Exception):
    """The graph does not say a shape."""


@dataclass(frozen=True, kw_only=True)
class Operator:
    """One product of matrices."""

    kind: str
    """Its ONNX operator."""
    dtype: str
    """Of what is multiplied: float32, float16, bfloat16; int8 or fp8 where both operands come from DequantizeLinear."""
    flops: int
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one run of a graph has to do."""

    operators: tuple[Operator, ...]
    io_bytes: int
    weight_bytes: int

    @property
    def flops(self) -> int:
        return sum(operator.flops for operator in self.operators)

    @property
    def operator_bytes(self) -> int:
        return sum(operator.num_bytes for operator in self.operators)

    def flops_by(self, key: str) -> dict[str, int]:
        """Sums by an attribute of the operators: `kind`, `dtype`."""
        found: dict[str, int] = {}
        for operator in self.operators:
            name = str(getattr(operator, key))
            found[name] = found.get(name, 0) + operator.flops
        return found


def work_of_file(path: Path) -> Work:
    """Count an ONNX file; weights in other files are not read.

    Raises: NotCountable; ModuleNotFoundError without the package onnx.
    """
    from nitro_export.structure import load_structure

    return work_of(load_structure(path))


def work_of(model: Any) -> Work:
    """Count an `onnx.ModelProto` with static shapes, with or without its weights. `model` loses notes that contradict it.

    Raises: NotCountable.
    """
    import onnx

    # Quantised weights keep their names, and the note of what type they had before. Inference stumbles over it.
    weights = {tensor.name for tensor in model.graph.initializer}
    kept = [value for value in model.graph.value_info if value.name not in weights]
    del model.graph.value_info[:]
    model.graph.value_info.extend(kept)
    try:
        graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    except onnx.shape_inference.InferenceError as exc:
        raise NotCountable(f"the shapes in the graph cannot be inferred: {exc}") from exc
    return _Counter(graph).count()


@dataclass
class _Counter:
    """Walks one graph."""

    graph: Any
    shapes: dict[str, Shape] = field(init=False)
    dtypes: dict[str, str] = field(init=False)
    weights: set[str] = field(init=False)

    def __post_init__(self) -> None:
        self.shapes, self.dtypes = {}, {}
        for value in (*self.graph.input, *self.graph.value_info, *self.graph.output):
            tensor = value.type.tensor_type
            self.dtypes[value.name] = _dtype_name(tensor.elem_type)
            if all(dimension.HasField("dim_value") for dimension in tensor.shape.dim):
                self.shapes[value.name] = tuple(dimension.dim_value for dimension in tensor.shape.dim)
        for tensor in self.graph.initializer:
            self.shapes[tensor.name] = tuple(tensor.dims)
            self.dtypes[tensor.name] = _dtype_name(tensor.data_type)
        self.weights = {tensor.name for tensor in self.graph.initializer}
        self._producers = {name: node for node in self.graph.node for name in node.output}
        self._consumers: dict[str, list[Any]] = {}
        for node in self.graph.node:
            for name in node.input:
                self._consumers.setdefault(name, []).append(node)

    def count(self) -> Work:
        products = [node for node in self.graph.node if node.op_type in (*WEIGHTED, "MatMul")]
        fused = {name for node in products if node.op_type == "MatMul" for name in self._scores(node)}
        operators = tuple(self._operator(node, fused) for node in products)
        weight_bytes = sum(self._bytes(name) for name in self.weights)
        ends = [value.name for value in (*self.graph.input, *self.graph.output) if value.name not in self.weights]
        return Work(
            operators=operators, io_bytes=weight_bytes + sum(self._bytes(name) for name in ends), weight_bytes=weight_bytes
        )

    def _operator(self, node: Any, fused: set[str]) -> Operator:
        ends = [name for name in (*node.input, *node.output) if name]
        return Operator(
            kind=node.op_type,
            dtype=self._dtype(node),
            flops=self._flops(node),
            num_bytes=sum(self._stored_bytes(name) for name in ends if name not in fused),
        )

    def _flops(self, node: Any) -> int:
        out = math.prod(self._shape(node.output[0]))
        if node.op_type == "MatMul":
            return 2 * out * self._shape(node.input[0])[-1]
        if node.op_type == "Gemm":
            transposed = any(attribute.name == "transA" and attribute.i for attribute in node.attribute)
            return 2 * out * self._shape(node.input[0])[0 if transposed else 1]
        kernel = self._shape(node.input[1])
        if node.op_type == "Conv":  # [out, in / groups, k, k]
            return 2 * out * math.prod(kernel[1:])
        return 2 * math.prod(self._shape(node.input[0])) * math.prod(kernel[1:])  # ConvTranspose: [in, out / groups, k, k]

    def _dtype(self, node: Any) -> str:
        """What is multiplied. Quantised operators read both operands through DequantizeLinear."""
        stored = {self.dtypes.get(self._stored(name), "") for name in node.input[:2]}
        kinds = {QUANTISED_DTYPES.get(dtype, "") for dtype in stored}
        if len(kinds) == 1 and "" not in kinds:
            return kinds.pop()
        return self.dtypes.get(node.output[0]) or self.dtypes.get(node.input[0], "float32")

    def _stored(self, name: str) -> str:
        """The tensor in memory that an operand is made from on the fly: through DequantizeLinear and what moves nothing."""
        while (node := self._producers.get(name)) is not None and node.op_type in ("DequantizeLinear", "Transpose", "Reshape"):
            name = node.input[0]
        return name

    def _stored_bytes(self, name: str) -> int:
        stored = self._stored(name)
        return self._bytes(stored if stored in self.shapes else name)

    def _scores(self, node: Any) -> Iterator[str]:
        """Between the two products of attention: what this MatMul writes and what the next reads, if that is what they are."""
        if any(self._stored(name) in self.weights for name in node.input):
            return
        passed = [node.output[0]]
        while len(consumers := self._consumers.get(passed[-1], [])) == 1 and consumers[0].op_type in POINTWISE:
            passed.append(consumers[0].output[0])
        follows = [other for other in consumers if other.op_type == "MatMul"]
        softened = any(self._producers[name].op_type == "Softmax" for name in passed)
        if softened and len(follows) == 1:
            yield from (passed[0], passed[-1])

    def _shape(self, name: str) -> Shape:
        if name not in self.shapes:
            raise NotCountable(f"the graph does not say the shape of {name!r}")
        return self.shapes[name]

    def _bytes(self, name: str) -> int:
        return math.prod(self._shape(name)) * _item_bytes(self.dtypes[name])


def _dtype_name(code: int) -> str:
    """ONNX's name of a type in NumPy's spelling."""
    import onnx

    name = str(onnx.TensorProto.DataType.Name(code)).lower()
    return {"float": "float32", "double": "float64"}.get(name, name)


_ITEM_BYTES: Mapping[str, int] = {
    "float32": 4, "float16": 2, "bfloat16": 2, "float8e4m3fn": 1, "int8": 1, "uint8": 1, "bool": 1,
    "int32": 4, "uint32": 4, "int64": 8, "uint64": 8, "float64": 8,
}  # fmt: skip


def _item_bytes(dtype: str) -> int:
    if dtype not in _ITEM_BYTES:
        raise NotCountable(f"the size of {dtype} is not known")
    return _ITEM_BYTES[dtype]

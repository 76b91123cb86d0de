"""INT8 linear layers as 1x1 convolutions, for processors whose INT8 matrix products are slower than their float ones.

Without dot products of bytes (AVX2 alone), OpenVINO multiplies INT8 matrices at 110 to 147 GOP/s where float32 reaches 134 to
156, but has a kernel for INT8 1x1 convolutions that reaches 200 to 300 (docs/quantisation.md). Tokens are the places of an
image: [batch, tokens, channels] is [batch, channels, height, width] with channels last, which the kernel reads as it lies.
The weights stay where they are, in the same bytes.
"""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper

from nitro_engines.backends.onnx_graph import load_structure

Shape = tuple[int, ...]


def linears_as_convolutions(path: Path, out: Path) -> int:
    """Write the graph to `out` with every linear layer that is INT8 on both sides as a convolution; nothing if it has none.

    Left as they are: products without a constant, layers in floats or FP8, and those whose inputs are no
    [batch, tokens, channels] or whose tokens make no rectangle (a prime number of them).
    Args:
        out: its external weights are those of `path`, still to be put beside it.
    Returns: how many layers became convolutions.
    Raises: BuildError if `path` is no ONNX graph.
    """
    model = load_structure(path)
    if not any(_is_int8_matrix(tensor) for tensor in model.graph.initializer):
        return 0  # before shapes are inferred, which takes longest
    graph = _Rewriter(model)
    found = sum(graph.rewrite(node) for node in list(model.graph.node))
    if found:
        graph.finish()
        onnx.save(model, str(out))
    return found


class _Rewriter:
    """One graph, and what of it is still used."""

    def __init__(self, model: ModelProto) -> None:
        self._graph = model.graph
        self._shapes = _shapes(model)
        self._weights = {tensor.name: tensor for tensor in model.graph.initializer}
        self._makers = {name: node for node in model.graph.node for name in node.output}
        self._uses = Counter(name for node in model.graph.node for name in node.input)
        self._instead: dict[str, list[NodeProto]] = {}
        """Output of a linear layer -> the nodes that come in its place."""
        self._images: dict[tuple[str, ...], str] = {}
        """What a DequantizeLinear reads -> the same numbers as an image; layers that are given one tensor share it."""
        self._reshaped: set[str] = set()
        """Weights that are [out, in, 1, 1] now, and what dequantises them."""

    def rewrite(self, node: NodeProto) -> bool:
        """Whether `node` is such a layer; what comes in its place is then noted."""
        if node.op_type != "MatMul":
            return False
        given, turned = (self._makers.get(name) for name in node.input)
        weight, shape = self._weight_of(turned), self._shape_of_codes(given)
        if weight is None or given is None or turned is None or len(shape) != 3 or _divisor(shape[1]) == 1:
            return False
        name, values = node.output[0], turned.input[0]
        before = self._as_image(given, shape)
        back = self._constant(f"{name}.tokens", (*shape[:2], weight.dims[0]))
        self._instead[name] = [
            *before,
            helper.make_node("Conv", [self._images[tuple(given.input)], values], [f"{name}.image"], kernel_shape=[1, 1]),
            # Not reshaped first: OpenVINO would carry the scales of the weights across it, away from the convolution.
            helper.make_node("Transpose", [f"{name}.image"], [f"{name}.channels_last"], perm=[0, 2, 3, 1]),
            helper.make_node("Reshape", [f"{name}.channels_last", back], [name], name=node.name),
        ]
        weight.dims.extend((1, 1))
        self._reshaped |= {weight.name, values}
        return True

    def _as_image(self, given: NodeProto, shape: Shape) -> list[NodeProto]:
        """What turns the codes that `given` dequantises into an image, and dequantises that; nothing if it is there."""
        read, name = tuple(given.input), given.output[0]
        if read in self._images:
            return []
        self._images[read] = f"{name}.image"
        batch, tokens, channels = shape
        places = self._constant(f"{name}.places", (batch, channels, _divisor(tokens), tokens // _divisor(tokens)))
        return [
            helper.make_node("Transpose", read[:1], [f"{name}.channels_first"], perm=[0, 2, 1]),
            helper.make_node("Reshape", [f"{name}.channels_first", places], [f"{name}.codes_image"]),
            helper.make_node("DequantizeLinear", [f"{name}.codes_image", *read[1:]], [f"{name}.image"]),
        ]

    def finish(self) -> None:
        """Put the noted nodes in their places, and drop what nothing reads any more."""
        nodes = [new for node in self._graph.node for new in self._instead.get(node.output[0], [node])]
        outputs = {value.name for value in self._graph.output}
        kept: list[NodeProto] = []
        used: set[str] = set(outputs)
        for node in reversed(nodes):
            if used.intersection(node.output):
                kept.append(node)
                used.update(node.input)
        del self._graph.node[:]
        self._graph.node.extend(reversed(kept))
        made = {name for node in kept for name in node.output} - self._reshaped
        notes = [note for note in self._graph.value_info if note.name in made]
        del self._graph.value_info[:]
        self._graph.value_info.extend(notes)

    def _shape_of_codes(self, node: NodeProto | None) -> Shape:
        """Of what a DequantizeLinear with one scale reads from a QuantizeLinear; empty for any other node."""
        if node is None or node.op_type != "DequantizeLinear" or self._shapes.get(node.input[1]) not in ((), (1,)):
            return ()
        maker = self._makers.get(node.input[0])
        return self._shapes.get(node.input[0], ()) if maker is not None and maker.op_type == "QuantizeLinear" else ()

    def _weight_of(self, node: NodeProto | None) -> TensorProto | None:
        """The INT8 matrix [out, in] that a Transpose of a DequantizeLinear reads, if nothing else does."""
        if node is None or node.op_type != "Transpose" or self._uses[node.output[0]] != 1:
            return None
        maker = self._makers.get(node.input[0])
        if maker is None or maker.op_type != "DequantizeLinear" or self._uses[maker.output[0]] != 1:
            return None
        weight = self._weights.get(maker.input[0])
        if weight is None or not _is_int8_matrix(weight):
            return None
        by_row = any(attribute.name == "axis" and attribute.i == 0 for attribute in maker.attribute)
        return weight if by_row and self._uses[maker.input[0]] == 1 else None

    def _constant(self, name: str, numbers: tuple[int, ...]) -> str:
        self._graph.initializer.append(helper.make_tensor(name, TensorProto.INT64, (len(numbers),), numbers))
        return name


def _is_int8_matrix(weight: TensorProto) -> bool:
    """Whether these are a linear layer's weights: those of convolutions have four dimensions."""
    return weight.data_type == TensorProto.INT8 and len(weight.dims) == 2


def _shapes(model: ModelProto) -> dict[str, Shape]:
    """Static shapes of all tensors, by name."""
    copy = ModelProto()
    copy.CopyFrom(model)
    weights = {tensor.name for tensor in copy.graph.initializer}
    # Quantised weights keep their names, and notes of the type they had before, over which inference stumbles.
    kept = [value for value in copy.graph.value_info if value.name not in weights]
    del copy.graph.value_info[:]
    copy.graph.value_info.extend(kept)
    graph = onnx.shape_inference.infer_shapes(copy, data_prop=True).graph
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        dims = value.type.tensor_type.shape.dim
        if all(dim.HasField("dim_value") for dim in dims):
            shapes[value.name] = tuple(dim.dim_value for dim in dims)
    return shapes


def _divisor(number: int) -> int:
    """The largest one that is not above the root: of a square image's places its side."""
    return next(height for height in range(math.isqrt(number), 0, -1) if number % height == 0)

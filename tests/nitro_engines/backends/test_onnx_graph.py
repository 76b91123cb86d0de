"""The built precision is asserted: a graph that is not what its manifest says is refused, whatever it would build."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from nitro_engines.backends.onnx_graph import QUANTISED, check_graph, quantised_share
from nitro_engines.graphs import read_graphs
from nitro_rt.errors import BuildError
from nitro_rt.manifest import Graph

MakeGraphs = Callable[..., Path]
WIDTHS = {"a": 8, "b": 8, "c": 32}
"""Of three matrices, 16 rows each: the last has two thirds of the weights."""


def write(folder: Path, precision: str, quantised: str, *, bare_activations: str = "") -> tuple[Path, Graph]:
    """x @ a, x @ b, x @ transposed c, in float16; the matrices in `quantised` between Q and DQ."""
    kind = QUANTISED[precision]
    narrow = helper.tensor_dtype_to_np_dtype(kind)
    nodes, tensors = [], []

    def tensor(name: str, kind: int, value: np.ndarray) -> None:
        tensors.append(helper.make_tensor(name, kind, value.shape, value.tobytes(), raw=True))

    tensor("scale", TensorProto.FLOAT16, np.array(0.1, np.float16))
    tensor("zero", kind, np.array(0, narrow))
    nodes.append(helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["x_q"]))
    nodes.append(helper.make_node("DequantizeLinear", ["x_q", "scale", "zero"], ["x_dq"]))
    for name, width in WIDTHS.items():
        shape = (width, 16) if name == "c" else (16, width)
        weight = name
        if name in quantised:
            tensor(name, kind, np.ones(shape, narrow))
            nodes.append(helper.make_node("DequantizeLinear", [name, "scale", "zero"], [f"{name}_dq"]))
            weight = f"{name}_dq"
        else:
            tensor(name, TensorProto.FLOAT16, np.ones(shape, np.float16))
        if name == "c":
            nodes.append(helper.make_node("Transpose", [weight], ["c_T"], perm=[1, 0]))
            weight = "c_T"
        activation = "x" if name in bare_activations else "x_dq"
        nodes.append(helper.make_node("MatMul", [activation, weight], [f"y_{name}"]))
    ports = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT16, [4, width]) for name, width in (("x", 16),)}
    outputs = [helper.make_tensor_value_info(f"y_{name}", TensorProto.FLOAT16, [4, width]) for name, width in WIDTHS.items()]
    model = helper.make_model(
        helper.make_graph(nodes, "g", list(ports.values()), outputs, tensors),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )
    path = folder / "denoise-1.onnx"
    onnx.save(model, path)
    return path, Graph(files=(), inputs=(), outputs=(), parity_max_abs=None, compute_dtype="float16")


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_a_quantised_graph_passes(tmp_path: Path, precision: str) -> None:
    path, graph = write(tmp_path, precision, "ac")
    check_graph(path, graph, precision)
    assert quantised_share(onnx.load(path), precision) == pytest.approx(5 / 6)


@pytest.mark.parametrize(
    ("quantised", "bare", "share"),
    [("", "", "0%"), ("ab", "", "33%"), ("abc", "c", "33%")],
    ids=["nothing", "the largest is left out", "weights only"],
)
def test_a_graph_whose_big_operators_are_not_quantised_is_refused(
    tmp_path: Path, quantised: str, bare: str, share: str
) -> None:
    path, graph = write(tmp_path, "int8", quantised, bare_activations=bare)
    check_graph(path, graph)
    with pytest.raises(BuildError, match=f"should be quantised to int8, but only {share} of the weights"):
        check_graph(path, graph, "int8")


def test_int8_weights_are_no_fp8(tmp_path: Path) -> None:
    path, graph = write(tmp_path, "int8", "abc")
    with pytest.raises(BuildError, match="should be quantised to fp8, but only 0%"):
        check_graph(path, graph, "fp8")


@pytest.mark.parametrize("said", ["float16", "bfloat16"])
def test_a_float32_graph_is_no_narrower_one(make_graphs: MakeGraphs, said: str) -> None:
    graphs = make_graphs()
    graph = dataclasses.replace(read_graphs(graphs).decode, compute_dtype=said)
    with pytest.raises(BuildError, match=f"decode.onnx should compute in {said}, but its weights are .* bytes float32"):
        check_graph(graphs / "decode.onnx", graph)

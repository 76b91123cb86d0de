"""A float16 graph widened for a CPU that computes in float32: the same numbers, matrices narrow until they are packed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

openvino = pytest.importorskip("openvino")
onnx = pytest.importorskip("onnx")

from onnx import TensorProto, helper  # noqa: E402

from nitro_rt.openvino_model import DECOMPRESSION, read_model  # noqa: E402

F32 = {"INFERENCE_PRECISION_HINT": "f32"}


@pytest.fixture(scope="module", params=["float16", "bfloat16"])
def graph(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """float32 in and, through matrices (one transposed), a convolution and a table, out in float32 and in the narrow type."""
    kind = {"float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}[request.param]
    narrow = helper.tensor_dtype_to_np_dtype(kind)
    random = np.random.default_rng(0)
    shapes = {"a": (16, 16), "b": (16, 16), "kernel": (4, 4, 3, 3), "bias": (16,)}
    tensors = [
        helper.make_tensor(name, kind, shape, random.standard_normal(shape).astype(narrow).tobytes(), raw=True)
        for name, shape in shapes.items()
    ]
    nodes = [
        helper.make_node("Cast", ["x"], ["x_narrow"], to=kind),
        helper.make_node("Conv", ["x_narrow", "kernel"], ["seen"], pads=[1, 1, 1, 1]),
        helper.make_node("MatMul", ["seen", "a"], ["first"]),
        helper.make_node("Add", ["first", "bias"], ["biased"]),
        helper.make_node("Transpose", ["b"], ["b_T"], perm=[1, 0]),
        helper.make_node("MatMul", ["biased", "b_T"], ["narrow"]),
        helper.make_node("Cast", ["narrow"], ["wide"], to=TensorProto.FLOAT),
    ]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4, 16, 16])]
    outputs = [
        helper.make_tensor_value_info(name, t, [1, 4, 16, 16]) for name, t in (("wide", TensorProto.FLOAT), ("narrow", kind))
    ]
    model = helper.make_model(
        helper.make_graph(nodes, "g", inputs, outputs, tensors), opset_imports=[helper.make_opsetid("", 20)], ir_version=10
    )
    path = tmp_path_factory.mktemp("graph") / f"{request.param}.onnx"
    onnx.save(model, path)
    return path


def test_widened_it_computes_the_same(graph: Path) -> None:
    core = openvino.Core()
    x = np.random.default_rng(1).standard_normal((1, 4, 16, 16)).astype(np.float32)
    found = []
    for widen in (False, True):
        model = read_model(core, (graph,), widen=widen)
        compiled = core.compile_model(model, "CPU", F32)
        assert [port.get_any_name() for port in compiled.outputs] == ["wide", "narrow"]
        assert [port.get_element_type().get_type_name() for port in compiled.outputs][1] != "f32"  # the contract's type
        found.append(np.array(compiled({"x": x})[0]))
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5, atol=1e-4)


def test_only_matrices_are_left_for_the_plugin_to_unpack(graph: Path) -> None:
    model = read_model(openvino.Core(), (graph,), widen=True)
    marked = [
        node.input_value(0).get_node().get_friendly_name() for node in model.get_ops() if DECOMPRESSION in node.get_rt_info()
    ]
    assert sorted(marked) == ["a", "b"]

"""INT8 linear layers become 1x1 convolutions that compute the same, and nothing else is touched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
from onnx import helper, numpy_helper

from nitro_engines.backends import onnx_pointwise
from nitro_engines.backends.onnx_pointwise import linears_as_convolutions
from nitro_engines.backends.openvino_graph import OpenVinoBackend
from nitro_rt.manifest import FileRef, Graph, TensorSpec, sha256_of

BATCH, TOKENS, CHANNELS = 2, 12, 8


def quantised_linear(name: str, given: str, num_out: int, initializers: list[Any], codes: str | None = None) -> list[Any]:
    """What the quantiser writes for one layer; `codes`: of another layer that is given the same tensor."""
    random = np.random.default_rng(len(initializers))
    arrays = {
        f"{name}.weight": random.integers(-63, 64, (num_out, CHANNELS)).astype(np.int8),
        f"{name}.weight_scale": random.uniform(0.001, 0.01, num_out).astype(np.float32),
        f"{name}.input_scale": np.float32(0.02),
        f"{name}.input_zero_point": np.uint8(120),
    }
    initializers += [numpy_helper.from_array(np.asarray(array), key) for key, array in arrays.items()]
    scales = [f"{name}.input_scale", f"{name}.input_zero_point"]
    nodes = [] if codes else [helper.make_node("QuantizeLinear", [given, *scales], [f"{name}.codes"])]
    if codes:
        scales = [f"{codes}.input_scale", f"{codes}.input_zero_point"]
    return [
        *nodes,
        helper.make_node("DequantizeLinear", [f"{codes or name}.codes", *scales], [f"{name}.input"]),
        helper.make_node("DequantizeLinear", [f"{name}.weight", f"{name}.weight_scale"], [f"{name}.values"], axis=0),
        helper.make_node("Transpose", [f"{name}.values"], [f"{name}.turned"], perm=[1, 0]),
        helper.make_node("MatMul", [f"{name}.input", f"{name}.turned"], [name], name=f"node_{name}"),
    ]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Two layers that share an input, one with a prime number of tokens, one in floats, and a product of activations."""
    initializers: list[Any] = [numpy_helper.from_array(np.ones((CHANNELS, 4), np.float32), "float.weight")]
    nodes = [
        *quantised_linear("query", "x", 6, initializers),
        *quantised_linear("key", "x", 6, initializers, codes="query"),
        *quantised_linear("prime", "y", 4, initializers),
        helper.make_node("MatMul", ["x", "float.weight"], ["float"]),
        helper.make_node("Transpose", ["key"], ["key_turned"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["query", "key_turned"], ["scores"]),
    ]
    ends = {"x": (BATCH, TOKENS, CHANNELS), "y": (BATCH, 7, CHANNELS)}
    made = {"scores": (BATCH, TOKENS, TOKENS), "prime": (BATCH, 7, 4), "float": (BATCH, TOKENS, 4)}
    inputs, outputs = (
        [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name, shape in values.items()]
        for values in (ends, made)
    )
    graph = helper.make_graph(nodes, "layers", inputs, outputs, initializers)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), tmp_path / "layers.onnx")
    return tmp_path / "layers.onnx"


def example() -> dict[str, Any]:
    random = np.random.default_rng(0)
    return {
        "x": random.standard_normal((BATCH, TOKENS, CHANNELS)).astype(np.float32),
        "y": random.standard_normal((BATCH, 7, CHANNELS)).astype(np.float32),
    }


def run(path: Path) -> list[Any]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"]).run(None, example())


def kinds(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path).graph.node]


def test_layers_become_convolutions_and_compute_the_same(path: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    assert linears_as_convolutions(path, out) == 2
    onnx.checker.check_model(onnx.load(out), full_check=True)
    # Left: the prime number of tokens, the layer in floats, the scores. The shared input is moved once.
    assert (kinds(out).count("Conv"), kinds(out).count("MatMul")) == (2, 3)
    assert kinds(out).count("QuantizeLinear") == 2 and kinds(out).count("DequantizeLinear") == 2 + 1 + 2
    for expected, found in zip(run(path), run(out), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)  # sums of 8 products in another order


def test_weights_stay_in_their_bytes(path: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    linears_as_convolutions(path, out)
    before, after = ({t.name: t for t in onnx.load(each).graph.initializer} for each in (path, out))
    assert before["query.weight"].raw_data == after["query.weight"].raw_data
    assert list(after["query.weight"].dims) == [6, CHANNELS, 1, 1] and list(after["prime.weight"].dims) == [4, CHANNELS]
    assert set(after) - set(before) == {"query.input.places", "query.tokens", "key.tokens"}


def test_a_weight_that_something_else_reads_stays_a_matrix(path: Path, tmp_path: Path) -> None:
    model = onnx.load(path)
    model.graph.node.append(helper.make_node("Identity", ["query.values"], ["seen"]))
    model.graph.output.append(helper.make_tensor_value_info("seen", onnx.TensorProto.FLOAT, (6, CHANNELS)))
    onnx.save(model, path)
    assert linears_as_convolutions(path, tmp_path / "out.onnx") == 1
    for expected, found in zip(run(path), run(tmp_path / "out.onnx"), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_a_graph_without_such_layers_is_not_looked_into(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = onnx.load(path)
    extractor = onnx.utils.Extractor(model)
    onnx.save(extractor.extract_model(["x"], ["float"]), path)  # the layer in floats alone
    monkeypatch.setattr(onnx_pointwise, "_Rewriter", lambda model: pytest.fail("the shapes were inferred"))
    assert linears_as_convolutions(path, tmp_path / "out.onnx") == 0
    assert not (tmp_path / "out.onnx").exists()


def test_onnx_is_in_the_keys_of_the_engines_that_it_writes() -> None:
    assert OpenVinoBackend().toolchain()["onnx"] == onnx.__version__


@pytest.mark.parametrize(("features", "convolutions"), [("avx2", 2), ("avx2 avx_vnni", 0)])
def test_openvino_engines_have_them_where_the_cpu_has_no_dot_products(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, features: str, convolutions: int
) -> None:
    monkeypatch.setattr(OpenVinoBackend, "target", lambda self: {"features": features})
    before, work = path.read_bytes(), tmp_path / "work"
    work.mkdir()
    (engine,) = OpenVinoBackend().compile(path, graph_of(path), work)
    assert kinds(engine).count("Conv") == convolutions and path.read_bytes() == before
    assert [entry.name for entry in work.iterdir()] == ["engine.onnx"]
    core = openvino.Core()
    options = {"INFERENCE_PRECISION_HINT": "f32"}
    expected, found = (core.compile_model(core.read_model(each), "CPU", options)(example()) for each in (path, engine))
    for name in ("scores", "prime", "float"):
        # With 7-bit weights no sum of two products leaves 16 bits, so both forms are exact up to rounding.
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, atol=1e-4)


def graph_of(path: Path) -> Graph:
    model = onnx.load(path).graph
    inputs, outputs = (
        tuple(
            TensorSpec(name=v.name, dtype="float32", shape=tuple(d.dim_value for d in v.type.tensor_type.shape.dim))
            for v in values
        )
        for values in (model.input, model.output)
    )
    reference = FileRef(path=path.name, sha256=sha256_of(path), num_bytes=path.stat().st_size)
    return Graph(files=(reference,), inputs=inputs, outputs=outputs, parity_max_abs=None, compute_dtype="float32")

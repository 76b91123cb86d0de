"""Each of the three guards lets the right engine pass and stops a float32 one that was to be float16."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from nitro_engines.backends import load_backend
from nitro_engines.backends.built_precision import check_inspection, check_network, check_plan_size
from nitro_engines.backends.onnx_graph import weight_bytes
from nitro_rt.errors import BuildError
from nitro_rt.manifest import FileRef, Graph, TensorSpec

MIB = 1 << 20


def write_matmul(folder: Path, kind: int, width: int) -> tuple[Path, Graph]:
    """One matrix product; the manifest's graph says float16 whatever it is."""
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    weights = np.random.default_rng(0).standard_normal((width, width)).astype(dtype)
    values = [helper.make_tensor_value_info(name, kind, (1, width)) for name in ("x", "y")]
    nodes = [helper.make_node("MatMul", ["x", "weights"], ["y"])]
    graph = helper.make_graph(nodes, "product", values[:1], values[1:], [numpy_helper.from_array(weights, "weights")])
    path = folder / "product.onnx"
    onnx.save_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), str(path))
    specs = [TensorSpec(name=name, dtype=str(dtype), shape=(1, width)) for name in ("x", "y")]
    reference = FileRef(path=path.name, sha256="0" * 64, num_bytes=path.stat().st_size)
    return path, Graph(
        files=(reference,), inputs=(specs[0],), outputs=(specs[1],), parity_max_abs=None, compute_dtype="float16"
    )


def test_the_types_of_the_parsed_network() -> None:
    check_network({"float16": 330}, "float16", "denoise-1.onnx")
    check_network({"float16": 95, "float32": 5}, "float16", "denoise-1.onnx")
    check_network({}, "float16", "text.onnx")  # nothing is multiplied
    with pytest.raises(BuildError, match="denoise-1.onnx should .* its 330 .* 30 in float16, 300 in float32"):
        check_network({"float32": 300, "float16": 30}, "float16", "denoise-1.onnx")


@pytest.mark.parametrize(
    ("what", "num_bytes", "weights", "num_layers"),
    [  # measured with TensorRT-RTX 1.7 for sm89; of SDXL the numbers of layers are estimated
        ("text of nitro-emoji, fp16", 5_739_348, 3_031_280, 432),
        ("denoise of nitro-emoji, fp16", 45_308_460, 29_466_350, 2764),
        ("denoise of nitro-emoji, fp32", 72_948_364, 58_932_568, 2726),
        ("decode of nitro-emoji, fp16", 6_580_044, 3_405_448, 592),
        ("denoise of the tiny checkpoint, fp16", 21_560_812, 2_735_990, 3496),
        ("denoise of SDXL, fp16", 5_180_000_000, 5_134_927_368, 11_000),
        ("decode of SDXL, fp16", 102_000_000, 99_000_000, 600),
    ],
)
def test_the_size_of_plans_that_are_right(what: str, num_bytes: int, weights: int, num_layers: int) -> None:
    check_plan_size(num_bytes, weights, num_layers, "float16", what)


@pytest.mark.parametrize(
    ("what", "num_bytes", "weights", "num_layers"),
    [
        ("denoise of SDXL", 10_270_000_000, 5_134_927_368, 11_000),
        ("decode of SDXL", 201_000_000, 99_000_000, 600),
        ("a detector", 111_750_000, 59_000_000, 500),  # roboflow/rf-detr#1453
    ],
)
def test_a_float32_plan_is_too_large_for_float16(what: str, num_bytes: int, weights: int, num_layers: int) -> None:
    with pytest.raises(BuildError, match=f"the plan of {what} has .* too large: its weights are stored in a wider type"):
        check_plan_size(num_bytes, weights, num_layers, "float16", what)


def test_a_plan_without_its_weights_is_too_small() -> None:
    with pytest.raises(BuildError, match="too small: it lacks weights"):
        check_plan_size(20 * MIB, 100 * MIB, 500, "float16", "denoise-1.onnx")


def layers(*dtypes: str, kind: str = "gemm") -> str:
    tensors = [{"Name": "x", "Dimensions": [1, 8], "Format/Datatype": dtype} for dtype in dtypes]
    listed: list[Any] = [{"Name": f"{kind}_{i}", "LayerType": kind, "Inputs": [tensor]} for i, tensor in enumerate(tensors)]
    return json.dumps({"Layers": [*listed, {"LayerType": "Reformat", "Inputs": [{"Format/Datatype": "Float"}]}, "a name only"]})


@pytest.mark.parametrize("words", ["Half", "Row major linear FP16 format", "Channel major FP16 format where channel % 8 == 0"])
@pytest.mark.parametrize("kind", ["gemm", "CaskConvolution", "CaskGemmMatrixMultiply", "fusion_mha"])
def test_the_inspectors_answer(words: str, kind: str) -> None:
    assert check_inspection(layers(words, words, kind=kind), "float16", "denoise-1.onnx") == ""
    with pytest.raises(BuildError, match="denoise-1.onnx should compute in bfloat16, .* of 2 multiplications 2 in float16"):
        check_inspection(layers(words, words, kind=kind), "bfloat16", "denoise-1.onnx")


@pytest.mark.parametrize("words", ["BF16", "BFloat16", "Row major linear BFloat16 format"])
def test_the_inspector_tells_bfloat16_from_float16(words: str) -> None:
    assert check_inspection(layers(words, words), "bfloat16", "denoise-1.onnx") == ""
    with pytest.raises(BuildError, match="denoise-1.onnx should compute in float16, .* of 2 multiplications 2 in bfloat16"):
        check_inspection(layers(words, words), "float16", "denoise-1.onnx")


@pytest.mark.parametrize("words", ["Float", "Row major linear FP32", "float32"])
def test_the_inspector_finds_float32(words: str) -> None:
    with pytest.raises(BuildError, match="should compute in float16, .* 1 in float16, 2 in float32"):
        check_inspection(layers("Half", words, words), "float16", "denoise-1.onnx")


def test_an_answer_that_tells_nothing_is_said() -> None:
    for text in ('{"Layers": []}', '{"Layers": ["names", "only"]}', layers("N/A due to dynamic shapes")):
        assert "names no multiplication" in check_inspection(text, "float16", "text.onnx")


@pytest.mark.parametrize(("kind", "width"), [(TensorProto.FLOAT, 4), (TensorProto.FLOAT16, 2)])
def test_the_bytes_of_weights(tmp_path: Path, kind: int, width: int) -> None:
    path, _ = write_matmul(tmp_path, kind, 64)
    assert weight_bytes(path) == 64 * 64 * width


@pytest.mark.trt
def test_a_float32_network_is_stopped_before_the_build(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    path, graph = write_matmul(tmp_path, TensorProto.FLOAT, 64)
    backend = load_backend("tensorrt-rtx", ("sm89",))
    with pytest.raises(BuildError, match="product.onnx should compute in float16, .* 1 convolutions .* 1 in float32"):
        backend.compile(path, graph, tmp_path)
    assert not (tmp_path / "engine.plan").exists()
    assert backend.compile(path, dataclasses.replace(graph, compute_dtype="float32"), tmp_path)


@pytest.mark.trt
def test_a_float32_plan_is_stopped_by_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The network's types are not looked at, as if TensorRT had changed them behind them: 24 MiB of weights become 48."""
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    path, graph = write_matmul(tmp_path, TensorProto.FLOAT, 3584)
    monkeypatch.setattr("nitro_engines.backends.onnx_graph.weight_bytes", lambda path: weight_bytes(path) // 2)
    with pytest.raises(BuildError, match="the plan of product.onnx has .* too large"):
        load_backend("tensorrt-rtx", ("sm89",)).compile(path, dataclasses.replace(graph, compute_dtype="float32"), tmp_path)

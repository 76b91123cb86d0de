"""The quantised graphs: explicit Q/DQ by the recipe, near the parent, run in INT8, and whole or absent."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from nitro_export.parent import Parent
from nitro_export.quantise import QuantisationRecipe, calibrate, quantise_graphs
from nitro_export.quantise.formats import INT8
from nitro_export.quantise.qdq import quantised_weight
from nitro_export.quantise.weight_file import read_tensor
from nitro_rt.errors import BundleError, ConfigError, ExportError
from nitro_rt.manifest import EXPORT_FILE, FileRef, GraphsManifest, check_file, from_json, sha256_of, to_json

GRAPHS = ("denoise-1", "denoise-2", "denoise-3", "denoise-4", "decode")
PSNR_DB = 30.0
"""Measured: 35.8 for one step, 36.6 for four. A wrong scale on one layer of the decoder gives less than 25."""


def _manifest(folder: Path) -> GraphsManifest:
    return from_json(GraphsManifest, (folder / EXPORT_FILE).read_text(), where="export.json")


def _psnr(found: np.ndarray, expected: np.ndarray) -> float:
    assert found.shape == expected.shape and expected.std() > 20
    return float(10 * np.log10(255**2 / np.mean((found.astype(np.float64) - expected) ** 2)))


@pytest.mark.parametrize("steps", [1, 4])
def test_images_are_near_the_parents(
    int8_graphs: Path, draw: Callable[..., Any], reference: Callable[..., Any], steps: int
) -> None:
    prompt = "the blue cat, and the dog"  # not among those of calibration
    found = draw(int8_graphs, _manifest(int8_graphs), [prompt], seed=7, steps=steps)
    assert _psnr(found, reference(prompt, seed=7, steps=steps)) >= PSNR_DB


def test_the_folder_is_a_graphs_folder(float_graphs: Path, int8_graphs: Path, recipe: QuantisationRecipe) -> None:
    before, after = _manifest(float_graphs), _manifest(int8_graphs)
    assert (after.precision, after.text, after.tokenizers) == ("int8", before.text, before.tokenizers)
    assert after.quantisation is not None and QuantisationRecipe.from_dict(after.quantisation) == recipe
    listed = {EXPORT_FILE}
    for graph in (after.text, *after.denoise.values(), after.decode):
        listed |= {check_file(int8_graphs, reference).name for reference in graph.files}
    listed |= {check_file(int8_graphs, tokenizer.file).name for tokenizer in after.tokenizers}
    assert {path.name for path in int8_graphs.iterdir()} == listed
    for graph in (*after.denoise.values(), after.decode):
        assert graph.compute_dtype == "float32" and graph.parity_max_abs is None and "images" in graph.note
        [data] = graph.files[1:]
        assert data.path == f"{data.sha256}.data"
    assert len({graph.files[1] for graph in after.denoise.values()}) == 1  # one file for all step counts
    assert after.denoise[1].files[1].num_bytes < 0.35 * before.denoise[1].files[1].num_bytes


@pytest.mark.parametrize("name", GRAPHS)
def test_every_layer_is_quantised_as_its_recipe_says(int8_graphs: Path, recipe: QuantisationRecipe, name: str) -> None:
    graph = onnx.load(int8_graphs / f"{name}.onnx", load_external_data=False).graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    prefix = "vae." if name == "decode" else "network."
    layers = [layer for layer in recipe.layers if layer.name.startswith(prefix)]
    quantised = {name for name, tensor in tensors.items() if tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) > 1}
    assert quantised == {f"{layer.name}.weight" for layer in layers}
    axes = {
        node.input[0]: [attribute.i for attribute in node.attribute if attribute.name == "axis"]
        for node in graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in quantised
    }
    assert axes == dict.fromkeys(quantised, [0])
    for weight in quantised:
        assert list(tensors[f"{weight}_scale"].dims) == list(tensors[weight].dims)[:1]
    zero_points = [tensor for tensor in graph.initializer if tensor.name.endswith("input_zero_point")]
    assert zero_points and all(read_tensor(tensor, int8_graphs).item() == 0 for tensor in zero_points)
    for layer in layers:
        if f"{layer.name}.input_scale" in tensors:  # the others share a tensor with one that has it
            scale = read_tensor(tensors[f"{layer.name}.input_scale"], int8_graphs).item()
            assert scale == pytest.approx(max(-layer.low, layer.high) / 127, rel=1e-6)
    assert all(tensor.data_type == onnx.TensorProto.FLOAT for tensor in graph.initializer if tensor.name.endswith(".bias"))


def test_smoothing_moves_into_norms_where_it_can(float_graphs: Path, int8_graphs: Path, recipe: QuantisationRecipe) -> None:
    layers = {layer.name: layer for layer in recipe.layers}
    block = "network.unet.mid_block.attentions.0.transformer_blocks.0"
    graphs = [onnx.load(folder / "denoise-1.onnx", load_external_data=False).graph for folder in (float_graphs, int8_graphs)]
    before, after = ({tensor.name: tensor for tensor in graph.initializer} for graph in graphs)
    factors = layers[f"{block}.attn1.to_q"].factors()
    assert factors is not None and layers[f"{block}.attn1.to_k"].smoothing == layers[f"{block}.attn1.to_q"].smoothing
    for name in (f"{block}.norm1.weight", f"{block}.norm1.bias"):
        floats, folded = read_tensor(before[name], float_graphs), read_tensor(after[name], int8_graphs)
        assert torch.equal(folded * factors, floats)
    assert f"{block}.attn1.to_q.smoothing" not in after
    assert any(name.endswith("ff.net.2.smoothing") for name in after)  # no norm in front: a Mul


def test_openvino_multiplies_in_int8(int8_graphs: Path) -> None:
    ov = pytest.importorskip("openvino")
    compiled = ov.Core().compile_model(int8_graphs / "decode.onnx", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = []
    for node in compiled.get_runtime_model().get_ops():
        info = node.get_rt_info()
        if info["layerType"].value in ("Convolution", "FullyConnected"):
            found.append(info["runtimePrecision"].value)
    assert len(found) == 31 and sum(kind in ("i8", "u8") for kind in found) == 30  # post_quant_conv is too small


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"checkpoint_sha256": "0" * 64}, "calibrated on the checkpoint 000000000000"),
        ({"shift": 500}, "for shift 500"),
        ({"noise_levels": (249,)}, "also visit 62, 124, 187"),
    ],
)
def test_a_recipe_for_something_else(
    float_graphs: Path, recipe: QuantisationRecipe, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        quantise_graphs(float_graphs, tmp_path / "out", dataclasses.replace(recipe, **change))
    assert not list(tmp_path.iterdir())


def test_a_layer_that_is_not_there_leaves_nothing(float_graphs: Path, recipe: QuantisationRecipe, tmp_path: Path) -> None:
    stranger = dataclasses.replace(recipe.layers[0], name="network.unet.nowhere")
    with pytest.raises(ExportError, match="lacks 1 of the recipe's .* layers: network.unet.nowhere"):
        quantise_graphs(float_graphs, tmp_path / "out", dataclasses.replace(recipe, layers=(*recipe.layers, stranger)))
    assert not [path for path in tmp_path.iterdir() if not path.name.endswith(".lock")]


def _text(manifest: GraphsManifest, reference: FileRef) -> GraphsManifest:
    return dataclasses.replace(manifest, text=dataclasses.replace(manifest.text, files=(reference,)))


def _tokenizer(manifest: GraphsManifest, reference: FileRef) -> GraphsManifest:
    first, second = manifest.tokenizers
    return dataclasses.replace(manifest, tokenizers=(dataclasses.replace(first, file=reference), second))


@pytest.mark.parametrize("change", [_text, _tokenizer])
def test_files_outside_of_the_folder_are_refused(
    float_graphs: Path, recipe: QuantisationRecipe, tmp_path: Path, change: Callable[..., GraphsManifest]
) -> None:
    folder = Path(shutil.copytree(float_graphs, tmp_path / "graphs"))
    (tmp_path / "outside").write_bytes(b"{}")
    reference = FileRef(path="../outside", sha256=sha256_of(tmp_path / "outside"), num_bytes=2)
    (folder / EXPORT_FILE).write_text(to_json(change(_manifest(folder), reference)))
    with pytest.raises(BundleError, match=r"names the file '\.\./outside', which leaves the folder"):
        quantise_graphs(folder, tmp_path / "out", recipe)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("pick", [lambda m: m.text.files[1], lambda m: m.tokenizers[1].file, lambda m: m.denoise[1].files[1]])
def test_changed_files_are_refused(
    float_graphs: Path, recipe: QuantisationRecipe, tmp_path: Path, pick: Callable[[GraphsManifest], FileRef]
) -> None:
    folder = Path(shutil.copytree(float_graphs, tmp_path / "graphs"))
    path = folder / pick(_manifest(folder)).path
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(BundleError, match=f"{path.name} has sha256"):
        quantise_graphs(folder, tmp_path / "out", recipe)
    assert not (tmp_path / "out").exists()


def test_quantised_graphs_are_not_quantised_again(int8_graphs: Path, recipe: QuantisationRecipe, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="only float ones"):
        quantise_graphs(int8_graphs, tmp_path / "out", recipe)


def test_weights_of_seven_bits_stay_within_them(float_graphs: Path, recipe: QuantisationRecipe, tmp_path: Path) -> None:
    quantise_graphs(float_graphs, tmp_path / "out", dataclasses.replace(recipe, weight_bits=7))
    graph = onnx.load(tmp_path / "out" / "decode.onnx", load_external_data=False).graph
    codes = [read_tensor(t, tmp_path / "out") for t in graph.initializer if t.name.endswith(".weight") and t.data_type == 3]
    assert len(codes) == 30 and max(int(weight.abs().max()) for weight in codes) == 63


def test_a_weights_codes_are_those_of_its_smoothed_values() -> None:
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    factors = torch.exp2(torch.tensor([0.0, 1, -1, 2, 0, 0]))
    codes, scales = quantised_weight(weight, factors, INT8)
    assert codes.dtype == torch.int8 and (codes.abs().amax(dim=1) == 127).all()
    assert ((codes * scales[:, None] - weight * factors).abs() <= 0.5001 * scales[:, None]).all()


@pytest.mark.slow
@pytest.mark.trt
@pytest.mark.parametrize("precision", ["int8", "fp8"])
@pytest.mark.parametrize("compute", ["fp32", "fp16"])
def test_tensorrt_rtx_compiles_them(
    tiny_kl: Path,
    parent_of: Callable[[Path], Parent],
    exported: Callable[..., tuple[Path, GraphsManifest]],
    tmp_path: Path,
    precision: str,
    compute: str,
) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    floats = exported(tiny_kl, steps=(1,), shift=250, precision=compute)[0]
    recipe = calibrate(parent_of(tiny_kl), steps=(1,), precision=precision, shift=250, num_prompts=2)
    quantise_graphs(floats, tmp_path / "out", recipe)
    for name in ("denoise-1", "decode"):
        logger = trt.Logger(trt.Logger.ERROR)
        builder = trt.Builder(logger)
        network = builder.create_network(0)
        parser = trt.OnnxParser(network, logger)
        assert parser.parse_from_file(str(tmp_path / "out" / f"{name}.onnx")), parser.get_error(0)
        config = builder.create_builder_config()
        config.num_compute_capabilities = 1
        config.set_compute_capability(trt.ComputeCapability.SM89, 0)
        assert builder.build_serialized_network(network, config) is not None

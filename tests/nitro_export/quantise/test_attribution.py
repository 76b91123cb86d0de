"""Planted errors are found and named; as calibration left them, no operator is suspected."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from nitro_export.parent import Parent
from nitro_export.quantise import QuantisationRecipe, attribute
from nitro_export.quantise.weight_file import read_tensor
from nitro_rt.errors import BundleError, ConfigError
from nitro_rt.manifest import EXPORT_FILE, GraphsManifest, from_json, to_json

BLOCK = "network.unet.mid_block.attentions.0.transformer_blocks.0"


def _multiply(path: Path, name: str, factor: float) -> None:
    """An initializer of the graph in `path`, inline afterwards."""
    model = onnx.load(path, load_external_data=False)
    [tensor] = [tensor for tensor in model.graph.initializer if tensor.name == name]
    value = read_tensor(tensor, path.parent) * factor
    tensor.CopyFrom(onnx.numpy_helper.from_array(value.numpy().astype("float32"), name))
    path.unlink()  # the fixture's is a hard link's other end, perhaps
    onnx.save(model, path)


def test_a_planted_wrong_scale_is_found_and_named(
    tiny_kl: Path, int8_graphs: Path, parent_of: Callable[[Path], Parent], tmp_path: Path
) -> None:
    damaged = Path(shutil.copytree(int8_graphs, tmp_path / "damaged"))
    planted = {
        "network.unet.down_blocks.1.resnets.0.conv2": ("denoise-4", "input_scale", 8.0),
        f"{BLOCK}.attn1.to_out.0": ("denoise-4", "weight_scale", 0.5),
        "vae.decoder.up_blocks.1.resnets.0.conv1": ("decode", "weight_scale", 8.0),
    }
    for name, (graph, number, factor) in planted.items():
        _multiply(damaged / f"{graph}.onnx", f"{name}.{number}", factor)
    _multiply(damaged / "denoise-4.onnx", f"{BLOCK}.norm3.weight", 2.0)  # smoothing was folded into it
    found = attribute(damaged, parent_of(tiny_kl))
    assert len(found) == 10
    assert {error.name for error in found[:4]} == {*planted, f"{BLOCK}.ff.net.0.proj"}
    assert [error.suspicious for error in found] == [True] * 4 + [False] * 6
    assert found[0].sqnr_db == min(error.sqnr_db for error in found)


def test_nothing_is_suspected_as_calibration_left_it(
    tiny_kl: Path, int8_graphs: Path, recipe: QuantisationRecipe, parent_of: Callable[[Path], Parent]
) -> None:
    found = attribute(int8_graphs, parent_of(tiny_kl), worst=None)
    assert {error.name for error in found} == {layer.name for layer in recipe.layers}
    assert not any(error.suspicious for error in found)
    # The same prompts, seed and rows: the very numbers of calibration, but for the headroom's rounding.
    assert max(abs(error.sqnr_db - error.expected_db) for error in found) < 0.01
    assert list(found) == sorted(found, key=lambda error: error.sqnr_db)


def test_refused(
    tiny_kl: Path, float_graphs: Path, int8_graphs: Path, parent_of: Callable[[Path], Parent], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="nothing in them is quantised"):
        attribute(float_graphs, parent_of(tiny_kl))
    folder = Path(shutil.copytree(int8_graphs, tmp_path / "own-prompts"))
    manifest = from_json(GraphsManifest, (folder / EXPORT_FILE).read_text(), where="export.json")
    assert manifest.quantisation is not None
    changed = manifest.quantisation | {"prompts_sha256": "0" * 64}
    (folder / EXPORT_FILE).write_text(to_json(dataclasses.replace(manifest, quantisation=changed)))
    with pytest.raises(ConfigError, match="prompts of its own"):
        attribute(folder, parent_of(tiny_kl))
    outside = dataclasses.replace(manifest.decode.files[0], path="../decode.onnx")
    decode = dataclasses.replace(manifest.decode, files=(outside, *manifest.decode.files[1:]))
    (folder / EXPORT_FILE).write_text(to_json(dataclasses.replace(manifest, decode=decode)))
    with pytest.raises(BundleError, match="which leaves the folder"):
        attribute(folder, parent_of(tiny_kl))

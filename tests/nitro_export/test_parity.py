"""The check after the export: a wrong graph and an overflowing network are found."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from nitro_export import PRECISIONS, parity, read_checkpoint
from nitro_export.graph import WeightFiles, graphs_from_stages
from nitro_export.loading import empty_part_of_graph, load_part
from nitro_export.stages import DecodeStage
from nitro_rt.errors import ExportError

LATENTS = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def stage(tiny_tiny: Path) -> DecodeStage:
    return DecodeStage(load_part(read_checkpoint(tiny_tiny), "vae"), latent_size=8, size_px=64, batch=1).eval()


@pytest.fixture
def graph(tiny_tiny: Path, tmp_path: Path) -> Path:
    """The stage's graph in float32."""
    vae, stored = empty_part_of_graph(read_checkpoint(tiny_tiny), "vae")
    empty = DecodeStage(vae, latent_size=8, size_px=64, batch=1).eval()
    weights = {f"vae.{name}": tensor for name, tensor in stored.items()}
    return graphs_from_stages(WeightFiles(folder=tmp_path), {"decode": empty}, weights, torch.float32)["decode"][0]


def test_there_is_a_tolerance_for_each_stage_and_precision() -> None:
    assert set(parity.TOLERANCES) == set(itertools.product(("text", "denoise", "decode"), PRECISIONS))


def test_a_changed_graph_is_found(stage: DecodeStage, graph: Path) -> None:
    path = graph
    expected = parity.references(stage, [(LATENTS,)])
    assert parity.check_graph("decode", path, stage, [(LATENTS,)], expected, precision="fp32") <= 1
    model = parity.widened(path)  # weights inside, so that one can be changed
    weight = next(tensor for tensor in model.graph.initializer if len(tensor.dims) == 4)
    weight.CopyFrom(numpy_helper.from_array(1.3 * numpy_helper.to_array(weight), weight.name))
    onnx.save(model, path)
    with pytest.raises(ExportError, match="differs from torch"):
        parity.check_graph("decode", path, stage, [(LATENTS,)], expected, precision="fp32")
    path.write_bytes(b"no graph")
    with pytest.raises(ExportError, match="refuses the graph"):
        parity.check_graph("decode", path, stage, [(LATENTS,)], expected, precision="fp32")


def test_a_decoder_that_overflows_in_float16_is_refused(stage: DecodeStage) -> None:
    layers = stage.vae.decoder.layers
    layers[0].weight.data *= 1e5  # float32 carries it, and the last layer takes it back
    layers[0].bias.data *= 1e5
    layers[-1].weight.data *= 1e-5
    expected = parity.references(stage, [(LATENTS,)])
    assert np.isfinite(stage.levels(LATENTS).numpy()).all()
    stage.narrow(torch.float16)
    with pytest.raises(ExportError, match=r"overflows in fp16.*sdxl-vae-fp16-fix"):
        parity.check_narrow("decode", stage, [(LATENTS,)], expected, precision="fp16")


@pytest.mark.parametrize(("precision", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_a_sound_decoder_passes_narrowed(stage: DecodeStage, precision: str, dtype: torch.dtype) -> None:
    expected = parity.references(stage, [(LATENTS,)])
    stage.narrow(dtype)
    parity.check_narrow("decode", stage, [(LATENTS,)], expected, precision=precision)


def test_a_reference_that_is_not_finite_is_refused(stage: DecodeStage, graph: Path) -> None:
    with pytest.raises(ExportError, match="not finite"):
        parity.check_graph("decode", graph, stage, [(LATENTS,)], [(np.full((1, 64, 64, 3), np.nan),)], precision="fp32")

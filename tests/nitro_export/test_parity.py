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
from nitro_export.graph import graphs_from_stages
from nitro_export.loading import load_vae
from nitro_export.stages import DecodeStage
from nitro_rt.errors import ExportError

LATENTS = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def stage(tiny_tiny: Path) -> DecodeStage:
    return DecodeStage(load_vae(read_checkpoint(tiny_tiny)), latent_size=8, size_px=64, batch=1).eval()


def test_there_is_a_tolerance_for_each_stage_and_precision() -> None:
    assert set(parity.TOLERANCES) == set(itertools.product(("text", "denoise", "decode"), PRECISIONS))


def test_a_changed_graph_is_found(stage: DecodeStage, tmp_path: Path) -> None:
    path = graphs_from_stages(tmp_path, {"decode": stage}, (LATENTS,))["decode"][0]
    expected = parity.references(stage, [(LATENTS,)])
    assert parity.check_graph("decode", path, stage, [(LATENTS,)], expected, precision="fp32") <= 1
    model = onnx.load(path)
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
    stage.halve()
    with pytest.raises(ExportError, match=r"overflows.*sdxl-vae-fp16-fix"):
        parity.check_half("decode", stage, [(LATENTS,)], expected)


def test_a_sound_decoder_passes_in_float16(stage: DecodeStage) -> None:
    expected = parity.references(stage, [(LATENTS,)])
    stage.halve()
    parity.check_half("decode", stage, [(LATENTS,)], expected)


def test_a_reference_that_is_not_finite_is_refused(stage: DecodeStage, tmp_path: Path) -> None:
    path = graphs_from_stages(tmp_path, {"decode": stage}, (LATENTS,))["decode"][0]
    with pytest.raises(ExportError, match="not finite"):
        parity.check_graph("decode", path, stage, [(LATENTS,)], [(np.full((1, 64, 64, 3), np.nan),)], precision="fp32")

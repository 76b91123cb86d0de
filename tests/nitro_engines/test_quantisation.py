"""Quantised builds: from a checkpoint to a gated INT8 bundle, and a wrong scale that does not get past the gate."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest

import nitro_export.quantise
import nitro_rt.noise
from nitro_engines import BuildRequest, EngineCache, build, quantisation
from nitro_engines.gate import QualityMissed
from nitro_engines.quantisation import quantisation_of
from nitro_engines.speed import not_measured
from nitro_export.quantise import calibration
from nitro_rt import Pipeline

PLANTED = "network.unet.conv_out"


def _request(checkpoint: Path, out: Path) -> BuildRequest:
    return BuildRequest(model=str(checkpoint), precision="int8", gate_prompts=1, out=out)


def _everything_quantised(**arguments: Any) -> Any:
    """A tiny network's layers all count as small; here all are wanted."""
    return calibration.calibrate(**arguments, num_prompts=2, min_share=0.0, min_sqnr_db=-100.0)


def test_a_quantised_bundle_and_one_with_a_wrong_scale(tiny_kl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nitro_export.quantise, "calibrate", lambda parent, **rest: _everything_quantised(parent=parent, **rest))
    cache, lines = EngineCache(tmp_path / "cache"), list[str]()
    result = build(_request(tiny_kl, tmp_path / "sound"), lines.append, cache)
    manifest = result.manifest
    assert manifest.quantisation is not None and manifest.quantisation["precision"] == "int8"
    assert manifest.denoise[1].precision == manifest.decode.precision == "int8"
    assert manifest.quality_gate[0].passed and manifest.quality_gate[0].limits.psnr_db > 20
    assert [line for line in lines if line.startswith("speed")] == [not_measured("int8", "openvino")]
    with Pipeline.load(tmp_path / "sound") as pipe:
        assert len(pipe("a red apple", seed=0).images) == 1
    again = build(_request(tiny_kl, tmp_path / "again"), lines.append, cache)
    assert again.manifest.engine_key == manifest.engine_key and set(again.stages.values()) == {"cached"}

    rewrite = nitro_export.quantise.quantise_graphs

    def with_a_wrong_scale(graphs: Path, out: Path, recipe: Any, **rest: Any) -> Any:
        layers = tuple(
            dataclasses.replace(layer, low=layer.low / 40, high=layer.high / 40) if layer.name == PLANTED else layer
            for layer in recipe.layers
        )
        assert layers != recipe.layers
        return rewrite(graphs, out, dataclasses.replace(recipe, layers=layers), **rest)

    monkeypatch.setattr(nitro_export.quantise, "quantise_graphs", with_a_wrong_scale)
    # Its graphs would otherwise be found in the cache.
    monkeypatch.setattr(quantisation.Quantisation, "fields", lambda self: {"planted": True})
    with pytest.raises(QualityMissed, match=rf"Operators with the largest error: {PLANTED} "):
        build(_request(tiny_kl, tmp_path / "wrong"), lines.append, cache)
    assert not (tmp_path / "wrong").exists()
    allowing = dataclasses.replace(_request(tiny_kl, tmp_path / "allowed"), allow_quality_loss=True)
    monkeypatch.setattr(sys.modules["nitro_engines.build"], "worst_operators", lambda *_: "the worst operators")  # as above
    assert build(allowing, lines.append, cache).published and lines.count("the worst operators") == 1
    assert not build(allowing, lines.append, cache).published  # nothing new to say, so the parent need not draw
    assert lines.count("the worst operators") == 1


@pytest.mark.parametrize(
    ("features", "backend", "precision", "bits"),
    [
        ("avx2", "openvino", "int8", 7),
        ("avx2 avx_vnni", "openvino", "int8", 8),
        ("avx2", "onnxruntime", "int8", 8),
        ("avx2", "tensorrt-rtx", "int8", 8),
        ("avx2", "openvino", "fp8", 8),
    ],
)
def test_weights_keep_a_bit_free_where_products_saturate(
    monkeypatch: pytest.MonkeyPatch, features: str, backend: str, precision: str, bits: int
) -> None:
    monkeypatch.setattr(quantisation, "cpu_target", lambda: {"features": features})
    found = quantisation_of(precision, backend)
    assert found is not None and (found.precision, found.weight_bits) == (precision, bits)


@pytest.mark.parametrize(
    ("backend", "provider", "precision", "symmetric"),
    [
        ("openvino", None, "int8", False),
        ("onnxruntime", None, "int8", False),
        ("onnxruntime", "cpu", "int8", False),
        ("onnxruntime", "tensorrt", "int8", True),
        ("tensorrt", None, "int8", True),
        ("tensorrt-rtx", None, "int8", True),
        ("openvino", None, "fp8", True),
    ],
)
def test_activations_have_a_zero_point_of_their_own_where_the_backend_reads_one(
    backend: str, provider: str | None, precision: str, symmetric: bool
) -> None:
    found = quantisation_of(precision, backend, provider)
    assert found is not None and found.symmetric is symmetric and found.fields()["symmetric"] is symmetric


def test_other_noise_is_calibrated_with_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = quantisation_of("int8", "openvino")
    assert found is not None
    before = found.fields()
    (tmp_path / "noise.py").write_text("")
    monkeypatch.setattr(nitro_rt.noise, "__file__", str(tmp_path / "noise.py"))
    assert found.fields() != before


def test_float_precisions_quantise_nothing() -> None:
    assert [quantisation_of(precision, "openvino") for precision in ("fp32", "fp16", "bf16")] == [None] * 3

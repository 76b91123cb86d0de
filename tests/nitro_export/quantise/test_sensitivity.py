"""Smoothing, ranges and the list of layers that stay: each choice is the better one on planted inputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from nitro_export.quantise.formats import FP8, INT8
from nitro_export.quantise.ranges import Recorder
from nitro_export.quantise.recipe import QuantisedLayer
from nitro_export.quantise.sensitivity import Formats, quantised_layers, sensitive, sqnr_db
from nitro_export.quantise.smooth import exponents

INT8_FORMATS = Formats(activations=INT8, weights=INT8)


def _layer(given: Tensor, *, smoothed: bool, formats: Formats = INT8_FORMATS, headroom: float = 1.0) -> QuantisedLayer:
    torch.manual_seed(1)
    layer = nn.Linear(given.shape[-1], 32, bias=False)
    recorder = Recorder(seed=0, rows_per_call=64)
    with recorder.watching({"linear": layer}), torch.no_grad():
        layer(given)
    record = recorder.records["linear"]
    weights = {"linear": lambda: layer.weight.detach()}
    [found] = quantised_layers(record, weights, formats, smoothed=smoothed, headroom=headroom, shares={"linear": 1.0})
    return found


def test_smoothing_moves_outlying_channels_into_the_weights() -> None:
    torch.manual_seed(0)
    given = torch.randn(400, 64)
    given[:, 3] *= 100
    plain, smoothed = _layer(given, smoothed=False), _layer(given, smoothed=True)
    assert plain.alpha is None and plain.factors() is None
    assert smoothed.alpha is not None and smoothed.sqnr_db > plain.sqnr_db + 3
    factors = smoothed.factors()
    assert factors is not None and torch.equal(factors.log2(), factors.log2().round()) and factors.argmax() == 3
    weights = torch.randn(8, 64)
    assert torch.equal((given / factors) * factors, given) and torch.equal((weights * factors) / factors, weights)


def test_smoothing_is_left_out_where_it_gains_nothing() -> None:
    assert _layer(torch.ones(64, 16) * torch.randn(64, 1), smoothed=True).alpha is None


def test_a_lone_outlier_is_clipped_when_that_makes_less_noise() -> None:
    torch.manual_seed(0)
    given = torch.randn(200, 1024)
    given[100, 500] = 12.0
    assert _layer(given, smoothed=False).clip < 1
    assert _layer(torch.rand(2000, 64) - 0.5, smoothed=False).clip >= 0.9


def test_headroom_widens_the_range() -> None:
    torch.manual_seed(0)
    given = torch.randn(100, 16)
    plain, wide = _layer(given, smoothed=False), _layer(given, smoothed=False, headroom=1.5)
    assert wide.high / wide.clip == pytest.approx(1.5 * plain.high / plain.clip, rel=1e-5)


def test_fp8_is_measured_as_such() -> None:
    torch.manual_seed(0)
    given = torch.randn(400, 64)
    # 3 bits behind the point: 2^-4 relative error at most, and both factors have it.
    assert 24 < _layer(given, smoothed=False, formats=Formats(activations=FP8, weights=FP8)).sqnr_db < 32
    assert _layer(given, smoothed=False).sqnr_db > 35


def test_unused_channels_need_no_factor() -> None:
    found = exponents(torch.tensor([1.0, 0.0, 8.0]), torch.tensor([1.0, 1.0, 0.0]), 0.5)
    assert found.tolist()[1:] == [0, 0]


def test_sqnr() -> None:
    signal = torch.ones(100)
    assert sqnr_db(signal, signal) == 200 and sqnr_db(0 * signal, signal) == -200
    assert sqnr_db(signal, 1.1 * signal) == pytest.approx(20, abs=1e-3)


def _found(name: str, sqnr: float, share: float) -> QuantisedLayer:
    return QuantisedLayer(name=name, low=-1, high=1, clip=1, alpha=None, smoothing="", sqnr_db=sqnr, share=share)


def test_the_worst_stay_while_the_budget_lasts_and_small_ones_anyway() -> None:
    layers = [
        *(_found(f"good {index}", 40, 0.1) for index in range(5)),
        _found("worst", 5, 0.08),
        _found("bad, too large", 6, 0.3),
        _found("bad", 10, 0.02),
        _found("tiny", 45, 1e-6),
    ]
    kept = sensitive(layers, min_sqnr_db=20, max_kept_share=0.1, min_share=1e-4)
    assert {name: layer.reason for name, layer in kept.items()} == {"tiny": "small", "worst": "sensitive", "bad": "sensitive"}
    assert kept["worst"].sqnr_db == 5 and kept["worst"].share == 0.08


def test_where_all_are_alike_none_stays() -> None:
    layers = [_found(f"layer {index}", 30 + index / 10, 0.05) for index in range(20)]
    bounds = {"min_sqnr_db": 36.0, "max_kept_share": 0.1, "min_share": 1e-4}
    assert sensitive(layers, **bounds) == {}
    assert list(sensitive([*layers, _found("twice the noise", 27.8, 0.05)], **bounds)) == ["twice the noise"]
    assert sensitive([*layers, _found("a little more", 28.3, 0.05)], **bounds) == {}

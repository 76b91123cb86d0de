"""What quantising one layer costs, measured on what it is given; which range and smoothing cost least; which layers stay.

Shapes: N rows, K numbers in a row, C input channels, O output channels.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nitro_export.quantise.formats import NumberFormat, activation_scale, channel_scales
from nitro_export.quantise.ranges import InputRecord
from nitro_export.quantise.recipe import KeptLayer, QuantisedLayer, packed
from nitro_export.quantise.smooth import ALPHAS, exponents

CLIPS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
"""Shares of the largest magnitude that are tried as the range."""
STANDS_OUT_DB = 2.75
"""Below the median of its stage: almost twice the noise of an ordinary layer. With 3 dB two layers of nitro-emoji's denoiser
less stay, and of 640 pictures the worst falls from 34.7 to 26.9 dB."""
SILENCE_DB = 200.0
"""Of an output without any noise; JSON knows no infinity."""


@dataclass(frozen=True, kw_only=True)
class Formats:
    """What inputs and weights become."""

    activations: NumberFormat
    weights: NumberFormat


def sqnr_db(signal: Tensor, found: Tensor) -> float:
    """Signal to noise in decibels, from -SILENCE_DB to SILENCE_DB."""
    power, noise = signal.double().square().sum().item(), (found.double() - signal.double()).square().sum().item()
    if noise == 0:
        return SILENCE_DB
    return max(-SILENCE_DB, min(SILENCE_DB, 10 * math.log10(power / noise))) if power > 0 else -SILENCE_DB


def quantised_layers(
    record: InputRecord,
    weights: Mapping[str, Callable[[], Tensor]],
    formats: Formats,
    *,
    smoothed: bool,
    headroom: float,
    shares: Mapping[str, float],
) -> list[QuantisedLayer]:
    """The layers that are given one tensor, with the smoothing and then the range that make the least noise in their outputs.

    Args:
        weights: reads each layer's weights, [O, K] float32 over the record's rows; one layer is in memory at a time.
        smoothed: whether SmoothQuant is tried (linear layers).
        headroom: see `QuantisationRecipe`.
    """
    rows = record.rows()
    smoothings = [_choice(record, None, None, 1.0, headroom)]
    if smoothed:
        assert record.amax_C is not None
        amax_of_weights_C = torch.stack([read().abs().amax(dim=0) for read in weights.values()]).amax(dim=0)
        smoothings += [
            _choice(record, alpha, exponents(record.amax_C, amax_of_weights_C, alpha), 1.0, headroom) for alpha in ALPHAS
        ]
    best = _least_noise(rows, weights, formats, smoothings)[0] if smoothed else smoothings[0]
    ranges = [_choice(record, best.alpha, best.exponents, clip, headroom) for clip in CLIPS]
    choice, found = _least_noise(rows, weights, formats, ranges)
    return [
        QuantisedLayer(
            name=name,
            low=choice.low,
            high=choice.high,
            clip=choice.clip,
            alpha=choice.alpha,
            smoothing="" if choice.exponents is None else packed(choice.exponents),
            sqnr_db=round(found[name], 3),
            share=_rounded(shares[name]),
        )
        for name in weights
    ]


def sensitive(
    layers: Sequence[QuantisedLayer], *, min_sqnr_db: float, max_kept_share: float, min_share: float
) -> dict[str, KeptLayer]:
    """Which layers of one stage stay as they are, and why.

    Too small ones stay whatever they cost; of the others, those under `min_sqnr_db` that also stand out, worst first, while
    the budget lasts. Where all layers are alike, the picture would hardly gain by any of them.
    """
    kept = {layer.name: _kept(layer, "small") for layer in layers if layer.share < min_share}
    found = [layer.sqnr_db for layer in layers if layer.name not in kept]
    bar_db = min(min_sqnr_db, statistics.median(found) - STANDS_OUT_DB) if found else min_sqnr_db
    budget = max_kept_share
    for layer in sorted(layers, key=lambda layer: (layer.sqnr_db, layer.name)):
        if layer.sqnr_db >= bar_db:
            break
        if layer.name not in kept and layer.share <= budget:
            budget -= layer.share
            kept[layer.name] = _kept(layer, "sensitive")
    return kept


@dataclass(frozen=True, kw_only=True)
class _Choice:
    alpha: float | None
    exponents: Tensor | None
    low: float
    high: float
    clip: float

    def factors(self) -> Tensor | None:
        return None if self.exponents is None else torch.exp2(self.exponents)


def _choice(record: InputRecord, alpha: float | None, factors: Tensor | None, clip: float, headroom: float) -> _Choice:
    low, high = record.low, record.high
    if factors is not None:
        # Signs are known per tensor only: after smoothing the range is taken as the magnitude on the sides in use.
        assert record.amax_C is not None
        amax = (record.amax_C / torch.exp2(factors)).max().item()
        low, high = (-amax if low < 0 else 0.0), (amax if high > 0 else 0.0)
    limit = clip * max(-low, high) or 1.0  # an input that is always 0 needs some range
    return _Choice(
        alpha=alpha,
        exponents=factors,
        low=_rounded(headroom * max(low, -limit)),
        high=_rounded(headroom * (min(high, limit) or limit)),
        clip=clip,
    )


def _least_noise(
    rows: Tensor, weights: Mapping[str, Callable[[], Tensor]], formats: Formats, choices: Sequence[_Choice]
) -> tuple[_Choice, dict[str, float]]:
    """The choice with the smallest sum of relative noise, so that one bad layer outweighs many good ones, and each SQNR."""
    found: list[dict[str, float]] = [{} for _ in choices]
    for name, read in weights.items():
        weights_OK = read()
        output = rows @ weights_OK.T
        for choices_of_one in _by_smoothing(choices):
            # As the graph computes it: the input divided and rounded, the weights multiplied and rounded.
            factors = choices[choices_of_one[0]].factors()
            smoothed_OK = weights_OK if factors is None else weights_OK * factors
            rounded_OK = formats.weights.rounded(smoothed_OK, channel_scales(smoothed_OK, formats.weights)[:, None])
            for index in choices_of_one:
                found[index][name] = sqnr_db(output, _rounded_rows(rows, choices[index], formats.activations) @ rounded_OK.T)
    noises = [sum(10 ** (-value / 10) for value in values.values()) for values in found]
    best = noises.index(min(noises))
    return choices[best], found[best]


def _by_smoothing(choices: Sequence[_Choice]) -> list[list[int]]:
    """Indices of `choices`, those with the same smoothing together: they share rounded weights."""
    groups: dict[float | None, list[int]] = {}
    for index, choice in enumerate(choices):
        groups.setdefault(choice.alpha, []).append(index)
    return list(groups.values())


def _rounded_rows(rows: Tensor, choice: _Choice, kind: NumberFormat) -> Tensor:
    factors = choice.factors()
    return kind.rounded(rows if factors is None else rows / factors, *activation_scale(choice.low, choice.high, kind))


def _kept(layer: QuantisedLayer, reason: str) -> KeptLayer:
    return KeptLayer(name=layer.name, reason=reason, sqnr_db=layer.sqnr_db, share=layer.share)


def _rounded(value: float) -> float:
    """Six digits: what the last bits of a sum were on one machine decides nothing."""
    return float(f"{value:.6g}")

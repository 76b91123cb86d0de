"""What may be said of a set of samples: percentiles where there are enough of them, and intervals of the median."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95
"""Confidence of every interval."""
PERCENTILES = {"p50": 50.0, "p90": 90.0, "p95": 95.0, "p99": 99.0}
NEEDED = {"p50": 1, "p90": 10, "p95": 20, "p99": 100}
"""The fewest samples of which one, on average, lies beyond the percentile: with fewer it would be the largest, or invented."""
NEEDED_FOR_INTERVAL = 6
"""The fewest samples whose extremes hold the median with 95 % confidence: 1 - 2 / 2**6."""
RULE = (
    "percentiles are interpolated linearly between samples; p90 needs 10 samples, p95 20, p99 100; the 95 % interval of the "
    "median is made of order statistics (binomial, distribution-free, takes samples as independent) and needs 6"
)


@dataclass(frozen=True, kw_only=True)
class Summary:
    """One quantity over many samples. What too few samples cannot say is None, and `reasons` says so."""

    num_samples: int
    mean: float
    min: float
    max: float
    p50: float
    p50_low: float | None
    """The 95 % interval of the median, from here ..."""
    p50_high: float | None
    """... to here."""
    p90: float | None
    p95: float | None
    p99: float | None
    reasons: dict[str, str]
    """Name of a missing figure -> why it is missing."""


def summary_of(values: Sequence[float]) -> Summary:
    """The figures of at least one sample."""
    assert values
    count = len(values)
    found = {name: float(np.percentile(values, percent)) for name, percent in PERCENTILES.items() if count >= NEEDED[name]}
    reasons = {name: f"needs {NEEDED[name]} samples, there are {count}" for name in PERCENTILES if name not in found}
    interval = median_interval(values)
    if interval is None:
        reasons["p50_low"] = reasons["p50_high"] = f"needs {NEEDED_FOR_INTERVAL} samples, there are {count}"
    return Summary(
        num_samples=count,
        mean=float(np.mean(values)),
        min=min(values),
        max=max(values),
        p50=found["p50"],
        p50_low=interval[0] if interval else None,
        p50_high=interval[1] if interval else None,
        p90=found.get("p90"),
        p95=found.get("p95"),
        p99=found.get("p99"),
        reasons=reasons,
    )


def median_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Order statistics that hold the median with 95 % confidence; None where there are too few samples.

    Source: David & Nagaraja 2003, Order Statistics, section 7.1: how many samples lie below the median is binomial.
    """
    count = len(values)
    if count < NEEDED_FOR_INTERVAL:
        return None
    below = np.cumsum([math.comb(count, k) / 2**count for k in range(count // 2)])
    # The largest k with P(fewer than k + 1 samples below the median) at most half of what may be missed.
    place = int(np.searchsorted(below, (1 - LEVEL) / 2, side="right")) - 1
    ordered = sorted(values)
    return ordered[place], ordered[count - 1 - place]


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """Ours over theirs, pair by pair: below 1 ours is faster."""

    median: float
    low: float | None
    """The 95 % interval of the median ratio."""
    high: float | None
    num_pairs: int


def ratio_of(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """Of samples taken in turns: the two of a pair saw the same machine."""
    ratios = [left / right for left, right in zip(ours, theirs, strict=True)]
    interval = median_interval(ratios)
    low, high = interval if interval else (None, None)
    return Ratio(median=float(np.median(ratios)), low=low, high=high, num_pairs=len(ratios))

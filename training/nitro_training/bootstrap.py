"""Bootstrap intervals: a score computed again on resampled prompts, many times, with a seed.

A statistic is an array [1 + R]: first its value on the images as they are, then on each of R resamples. Ratios and
differences of two such arrays, drawn with the same weights, are paired by prompt: what makes a prompt hard cancels.

Source: Efron & Tibshirani 1993, "An introduction to the bootstrap", chapters 8 and 13 (percentile intervals).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
LEVEL = 0.95
"""The share of resamples that an interval holds."""


@dataclass(frozen=True)
class Interval:
    """A value and its percentile interval."""

    value: float
    low: float
    high: float


def resample(groups_N: Sequence[int] | NDArray[np.int64], num_resamples: int, generator: np.random.Generator) -> Array:
    """Weights [1 + R, N]: how often each image counts; the first row is all ones.

    Args:
        groups_N: images with an equal number belong together (several images of one prompt) and are drawn together:
            they say less than as many images of different prompts.
    """
    _, member_N = np.unique(np.asarray(groups_N), return_inverse=True)
    num_groups = int(member_N.max()) + 1
    counts = generator.multinomial(num_groups, np.full(num_groups, 1 / num_groups), size=num_resamples)
    return np.concatenate([np.ones((1, len(member_N))), counts[:, member_N].astype(np.float64)])


def mean(values_N: NDArray[np.generic], weights_RN: Array) -> Array:
    """The weighted mean, as a statistic."""
    result: Array = weights_RN @ values_N.astype(np.float64) / weights_RN.sum(1)
    return result


def recentred(statistic_R: Array) -> Array:
    """The resampled values moved so that their mean is the value itself.

    For distances between distributions: a resample repeats images, so its cloud is thinner and its distance larger than
    that of as many different images; an interval around the raw resamples would lie above the value.
    """
    value, resampled = statistic_R[0], statistic_R[1:]
    return np.concatenate([[value], np.clip(resampled + (value - resampled.mean()), 0.0, None)])


def interval(statistic_R: Array) -> Interval:
    """The value with the middle `LEVEL` of its resamples."""
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(statistic_R[1:], [tail, 100 - tail])
    return Interval(float(statistic_R[0]), float(low), float(high))


def ratio_interval(above_R: Array, below_R: Array) -> Interval | None:
    """Of the quotient; None where the denominator is 0, or is in so many resamples that the interval has no end."""
    if below_R[0] == 0 or (below_R[1:] == 0).mean() > (1 - LEVEL) / 2:
        return None
    kept = below_R != 0
    return interval(above_R[kept] / below_R[kept])

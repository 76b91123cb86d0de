"""Is one set of processes slower than another? Intervals of a ratio from few independent units.

The times of one process hang together: where its memory lies, what else ran in those minutes. So the unit is the process, not
the image, and a unit's figure is the median of its images. Where there are too few processes the unit is a batch of consecutive
images, long enough that neighbours inside it do not matter (the method of batch means); the chance of the process itself is
then not in the interval.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MIN_PROCESSES = 3
NUM_BATCHES = 6
_T_95 = (6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833, 1.812, 1.796, 1.782, 1.771, 1.761, 1.753)
"""Student's t for 95 % on one side, for 1 to 15 degrees of freedom: "slower" is a question with one side."""
_Z_95 = 1.645
MAX_LOOKS = 3
"""At units measured in turns: a comparison may stop at the first that decides it."""
_T_98 = (19.082, 5.34, 3.741, 3.187, 2.912, 2.75, 2.642, 2.567, 2.51, 2.466, 2.432, 2.404, 2.38, 2.36, 2.343, 2.329, 2.316)
"""Student's t for 98 1/3 %: a third of the 5 % for each look, so that all together are wrong as seldom (Bonferroni)."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """New over old: above 1 is slower."""

    ratio: float
    low: float
    """With 95 % confidence the true ratio is at least this ..."""
    high: float
    """... and with 95 % confidence at most this."""


def welch(old_logs: Sequence[float], new_logs: Sequence[float]) -> Change:
    """The ratio of two sets of units, each given by its logarithm, with different spreads allowed.

    Source: Welch 1947, "The generalization of 'Student's' problem when several different population variances are involved".
    """
    parts = [float(np.var(logs, ddof=1)) / len(logs) for logs in (old_logs, new_logs)]
    error = math.sqrt(sum(parts))
    weights = sum(part**2 / (len(logs) - 1) for part, logs in zip(parts, (old_logs, new_logs), strict=True))
    freedom = sum(parts) ** 2 / weights if weights else float("inf")
    return _change(float(np.mean(new_logs) - np.mean(old_logs)), _quantile(freedom) * error)


def paired(ratio_logs: Sequence[float]) -> Change:
    """The ratio from 2 to 18 units that were measured in turns, each given by the logarithm of its ratio.

    The bounds hold with 95 % confidence for the first `MAX_LOOKS` times that the same units, and more, are looked at.
    """
    error = math.sqrt(float(np.var(ratio_logs, ddof=1)) / len(ratio_logs))
    return _change(float(np.mean(ratio_logs)), _T_98[len(ratio_logs) - 2] * error)


def batch_logs(values: Sequence[float]) -> list[float]:
    """Consecutive values in `NUM_BATCHES` batches, each by the logarithm of its median."""
    return [math.log(float(np.median(batch))) for batch in np.array_split(np.asarray(values), NUM_BATCHES)]


def _change(log_ratio: float, reach: float) -> Change:
    return Change(ratio=math.exp(log_ratio), low=math.exp(log_ratio - reach), high=math.exp(log_ratio + reach))


def _quantile(freedom: float) -> float:
    """Rounded down to whole degrees of freedom, which is the wider side."""
    whole = max(1, math.floor(min(freedom, 1e6)))
    return _T_95[whole - 1] if whole <= len(_T_95) else _Z_95 + 1.7 / whole

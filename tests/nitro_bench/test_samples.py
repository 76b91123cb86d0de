from __future__ import annotations

import math

import numpy as np
import pytest

from nitro_bench.samples import NEEDED, median_interval, ratio_of, summary_of


def test_figures_of_known_samples() -> None:
    found = summary_of([float(value) for value in range(1, 102)])
    assert (found.num_samples, found.mean, found.min, found.max, found.p50) == (101, 51.0, 1.0, 101.0, 51.0)
    assert (found.p90, found.p95, found.p99) == (91.0, 96.0, 100.0)
    assert found.reasons == {}
    assert found.p50_low is not None and found.p50_high is not None and found.p50_low < 51 < found.p50_high


@pytest.mark.parametrize(("name", "needed"), [("p90", 10), ("p95", 20), ("p99", 100)])
def test_a_percentile_is_not_made_of_too_few_samples(name: str, needed: int) -> None:
    assert NEEDED[name] == needed
    few, enough = summary_of([1.0] * (needed - 1)), summary_of([1.0] * needed)
    assert getattr(few, name) is None and few.reasons[name] == f"needs {needed} samples, there are {needed - 1}"
    assert getattr(enough, name) == 1.0 and name not in enough.reasons


def test_five_samples_have_no_interval_and_six_have_their_extremes() -> None:
    assert median_interval([1.0, 2.0, 3.0, 4.0, 5.0]) is None
    assert "p50_low" in summary_of([1.0] * 5).reasons
    assert median_interval([3.0, 1.0, 2.0, 6.0, 5.0, 4.0]) == (1.0, 6.0)


@pytest.mark.parametrize("count", [6, 9, 25, 60, 101])
def test_the_interval_is_the_narrowest_that_covers_enough(count: int) -> None:
    low, high = median_interval(list(map(float, range(count)))) or (math.nan, math.nan)
    place = int(low)
    assert high == count - 1 - place

    def missed(skipped: int) -> float:
        return 2 * sum(math.comb(count, k) for k in range(skipped + 1)) / 2**count

    assert missed(place) <= 0.05 < missed(place + 1)


def test_the_interval_holds_the_median_of_skewed_samples_often_enough() -> None:
    rng = np.random.default_rng(1)
    inside = 0
    for _ in range(400):
        low, high = median_interval(rng.exponential(size=40).tolist()) or (0.0, 0.0)
        inside += low <= math.log(2) <= high
    assert inside >= 368  # 95 % and more; 92 % leaves four standard deviations for chance


def test_ratios_are_taken_pair_by_pair() -> None:
    # The machine slows down threefold half-way: medians of the sides would say nothing, pairs do.
    theirs = [10.0] * 6 + [30.0] * 6
    ours = [value / 2 for value in theirs]
    found = ratio_of(ours, theirs)
    assert (found.median, found.low, found.high, found.num_pairs) == (0.5, 0.5, 0.5, 12)
    assert ratio_of([1.0], [2.0]).low is None

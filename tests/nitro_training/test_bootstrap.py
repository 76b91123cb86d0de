"""Bootstrap intervals: their coverage, and what pairs and groups do to them."""

from __future__ import annotations

import numpy as np

from nitro_training import bootstrap, frechet


def test_an_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    """200 experiments with a coin of 0.3: 95 % intervals of 80 throws hold 0.3 in 88 to 99 % of them."""
    generator = np.random.default_rng(0)
    held = 0
    for _ in range(200):
        throws = generator.random(80) < 0.3
        found = bootstrap.interval(bootstrap.mean(throws, bootstrap.resample(range(80), 400, generator)))
        held += found.low <= 0.3 <= found.high
    assert 0.88 <= held / 200 <= 0.99


def test_the_value_is_that_of_the_images_as_they_are() -> None:
    weights = bootstrap.resample([5, 5, 7, 9], 100, np.random.default_rng(0))
    assert bootstrap.interval(bootstrap.mean(np.array([1, 0, 1, 1]), weights)).value == 0.75


def test_equal_seeds_give_equal_weights() -> None:
    first, second, other = (bootstrap.resample(range(9), 50, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert np.array_equal(first, second) and not np.array_equal(first, other)


def test_images_of_one_prompt_are_drawn_together() -> None:
    groups = np.repeat(np.arange(20), 5)
    weights = bootstrap.resample(groups, 300, np.random.default_rng(0))
    assert all(np.ptp(weights[:, groups == group], axis=1).max() == 0 for group in range(20))
    answers = np.repeat(np.random.default_rng(1).random(20) < 0.5, 5)  # five images of a prompt are all right or all wrong
    alone = bootstrap.resample(range(100), 300, np.random.default_rng(0))
    together, apart = (bootstrap.interval(bootstrap.mean(answers, w)) for w in (weights, alone))
    assert together.high - together.low > 1.7 * (apart.high - apart.low)


def test_paired_ratios_are_narrower_than_unpaired_ones() -> None:
    generator = np.random.default_rng(2)
    teacher = generator.random(200) < 0.6
    student = teacher & (generator.random(200) < 0.9)
    weights, others = (bootstrap.resample(range(200), 500, generator) for _ in range(2))
    paired = bootstrap.ratio_interval(bootstrap.mean(student, weights), bootstrap.mean(teacher, weights))
    unpaired = bootstrap.ratio_interval(bootstrap.mean(student, weights), bootstrap.mean(teacher, others))
    assert paired is not None and unpaired is not None and paired.value == unpaired.value
    assert paired.high <= 1.0 and paired.high - paired.low < 0.6 * (unpaired.high - unpaired.low)


def test_no_ratio_to_nothing() -> None:
    weights = bootstrap.resample(range(30), 200, np.random.default_rng(0))
    one, none = np.arange(30) == 0, np.zeros(30)
    for below in (none, one):  # the single one is missing in a third of the resamples
        assert bootstrap.ratio_interval(bootstrap.mean(one, weights), bootstrap.mean(below, weights)) is None


def test_the_interval_of_a_distance_holds_its_value() -> None:
    """Resamples of a cloud lie farther from everything than the cloud itself, because they repeat images."""
    generator = np.random.default_rng(3)
    reference = frechet.moments(generator.normal(size=(2000, 1, 12)))
    features = generator.normal(size=(60, 1, 12))
    raw = frechet.distance(reference, frechet.moments(features, bootstrap.resample(range(60), 300, generator)))
    plain, moved = bootstrap.interval(raw), bootstrap.interval(bootstrap.recentred(raw))
    assert plain.low > plain.value, "the reason for moving"
    assert 0 < moved.low < moved.value < moved.high and moved.value == plain.value

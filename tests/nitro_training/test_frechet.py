"""The Frechet distance against closed forms."""

from __future__ import annotations

import numpy as np
import pytest

from nitro_rt.errors import ShapeError
from nitro_training.frechet import Moments, distance, moments, square_root


def test_equal_clouds_have_no_distance() -> None:
    cloud = moments(np.random.default_rng(0).normal(size=(50, 2, 8)))
    assert distance(cloud, cloud) == pytest.approx(0.0, abs=1e-9)


def test_fewer_images_than_components_is_no_trouble() -> None:
    cloud = moments(np.random.default_rng(0).normal(size=(5, 1, 16)))
    assert distance(cloud, cloud) == pytest.approx(0.0, abs=1e-6)


def test_known_gaussians_give_the_closed_form() -> None:
    """Of commuting covariances: |m1 - m2|^2 + sum (s1 - s2)^2 over the deviations along the shared axes."""
    axes = np.linalg.qr(np.random.default_rng(1).normal(size=(4, 4)))[0]
    first, second = np.array([1.0, 2.0, 3.0, 0.5]), np.array([2.0, 2.0, 1.0, 0.0])
    shift = np.array([1.0, -2.0, 0.0, 0.5])
    found = distance(Moments(np.zeros(4), axes * first**2 @ axes.T), Moments(shift, axes * second**2 @ axes.T))
    assert found == pytest.approx(shift @ shift + np.square(first - second).sum())


def test_the_cross_term_does_not_need_equal_axes() -> None:
    """tr((A B)^1/2) of two covariances that do not commute, by the eigenvalues of their product."""
    generator = np.random.default_rng(2)
    a, b = (matrix @ matrix.T for matrix in generator.normal(size=(2, 5, 5)))
    cross = np.sqrt(np.linalg.eigvals(a @ b).real).sum()
    expected = np.trace(a) + np.trace(b) - 2 * cross
    assert distance(Moments(np.zeros(5), a), Moments(np.zeros(5), b)) == pytest.approx(expected)


def test_a_sample_approaches_its_gaussian() -> None:
    """Two samples of N(0, I) and N(2, I) in three dimensions: 3 * 2^2."""
    generator = np.random.default_rng(3)
    first, second = generator.normal(size=(20000, 1, 3)), 2 + generator.normal(size=(20000, 1, 3))
    assert distance(moments(first), moments(second)) == pytest.approx(12.0, rel=0.03)


def test_moments_are_numpys() -> None:
    features = np.random.default_rng(4).normal(size=(30, 3, 5)) + 100
    found = moments(features)
    np.testing.assert_allclose(found.mean_D, features.reshape(-1, 5).mean(0))
    np.testing.assert_allclose(found.covariance_DD, np.cov(features.reshape(-1, 5).T), atol=1e-9)


def test_weights_count_as_repeated_images() -> None:
    generator = np.random.default_rng(5)
    features = generator.normal(size=(6, 2, 3))
    weights = np.array([[2, 0, 1, 0, 3, 0], [1, 1, 1, 1, 1, 1]])
    found = moments(features, weights)
    for row, weight in enumerate(weights):
        expected = moments(np.repeat(features, weight, axis=0))
        np.testing.assert_allclose(found.mean_D[row], expected.mean_D)
        np.testing.assert_allclose(found.covariance_DD[row], expected.covariance_DD, atol=1e-12)
    both = distance(moments(features), found)
    assert both.shape == (2,) and both[1] == pytest.approx(0.0, abs=1e-9) and both[0] > 0.01


def test_the_square_root_squares_to_the_matrix() -> None:
    matrix = np.cov(np.random.default_rng(6).normal(size=(4, 9)))
    np.testing.assert_allclose(square_root(matrix) @ square_root(matrix), matrix, atol=1e-12)


def test_one_feature_has_no_covariance() -> None:
    with pytest.raises(ShapeError, match=r"at least two rows, got \[1, 1, 8\]"):
        moments(np.zeros((1, 1, 8)))

"""The Frechet distance between two clouds of features, each taken as a Gaussian, and how it moves under resampling.

Shapes: N images, P features of one image (its patches), D components, R resamples. All arithmetic is float64.

    d^2 = |m1 - m2|^2 + tr(C1 + C2 - 2 (C1^1/2 C2 C1^1/2)^1/2)

Source: Dowson & Landau 1982, "The Frechet distance between multivariate normal distributions". With other features this
formula is called FID; ours are in-domain features, so the numbers must never be read as FID.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nitro_rt.errors import ShapeError

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Moments:
    """Mean and covariance of a cloud, or of R clouds at once."""

    mean_D: Array
    """[D], or [R, D]."""
    covariance_DD: Array
    """[D, D], or [R, D, D]."""


def moments(features_NPD: NDArray[np.floating], weights_RN: NDArray[np.floating] | None = None) -> Moments:
    """Mean and unbiased covariance of all features.

    Args:
        features_NPD: P features of each of N images.
        weights_RN: how often each image counts, per resample; the result then has a leading R.
    Raises: ShapeError for fewer than two features, or features that are not [N, P, D].
    """
    if features_NPD.ndim != 3 or features_NPD.shape[0] * features_NPD.shape[1] < 2:
        raise ShapeError(f"moments need features [N, P, D] with at least two rows, got {list(features_NPD.shape)}")
    features = features_NPD.astype(np.float64)
    num_images, num_each, dim = features.shape
    weights = np.ones((1, num_images)) if weights_RN is None else np.asarray(weights_RN, dtype=np.float64)
    count = weights.sum(1) * num_each
    # Around the common mean, so that the difference of the two second moments below does not cancel.
    centre = features.mean((0, 1))
    features = features - centre
    mean = weights @ features.sum(1) / count[:, None]
    outer = np.einsum("npd,npe->nde", features, features).reshape(num_images, dim * dim)
    second = (weights @ outer / count[:, None]).reshape(-1, dim, dim)
    covariance = (second - mean[:, :, None] * mean[:, None, :]) * (count / (count - 1))[:, None, None]
    mean = mean + centre
    return Moments(mean, covariance) if weights_RN is not None else Moments(mean[0], covariance[0])


def distance(first: Moments, second: Moments) -> Array:
    """The squared Frechet distance, a scalar or [R]; 0 for equal moments. Either side may have a leading R."""
    root = square_root(first.covariance_DD)
    inner = root @ second.covariance_DD @ root
    eigenvalues = np.linalg.eigvalsh((inner + np.swapaxes(inner, -1, -2)) / 2)
    cross = np.sqrt(np.clip(eigenvalues, 0, None)).sum(-1)
    gap = np.square(first.mean_D - second.mean_D).sum(-1)
    result: Array = gap + _trace(first.covariance_DD) + _trace(second.covariance_DD) - 2 * cross
    return np.maximum(result, 0.0)  # rounding may leave it a little below


def square_root(matrix_DD: Array) -> Array:
    """The symmetric square root of a positive semi-definite matrix, or of a stack of them, by its eigenvectors.

    Eigenvalues below zero are rounding (a covariance of fewer images than components has zeros) and count as zero.
    """
    values, vectors = np.linalg.eigh(matrix_DD)
    scaled = vectors * np.sqrt(np.clip(values, 0, None))[..., None, :]
    root: Array = scaled @ np.swapaxes(vectors, -1, -2)
    return root


def _trace(matrix_DD: Array) -> Array:
    traces: Array = np.trace(matrix_DD, axis1=-2, axis2=-1)
    return traces

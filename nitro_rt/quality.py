"""How far images are from their references: PSNR, SSIM, and the limits that each precision must keep.

Shapes: N images, H height, W width, 3 channels, last; uint8 throughout.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nitro_rt.errors import BundleError, ShapeError

Images = NDArray[np.uint8]
Float64 = NDArray[np.float64]

PEAK = 255.0
EQUAL_DB = 100.0
"""The PSNR of equal images, whose true value is infinite: JSON has no infinity, and one level in 1e5 values is 98 dB."""
WINDOW, SIGMA = 11, 1.5
K1, K2 = 0.01, 0.03
SATURATED = 0.98
"""Share of values at 0 or 255 from which a picture counts as saturated."""


@dataclass(frozen=True, kw_only=True)
class QualityLimits:
    """What every image of a bundle must reach."""

    psnr_db: float
    """Least PSNR of an image."""
    ssim: float
    """Least SSIM of an image."""
    reason: str


LIMITS = {
    "fp32": QualityLimits(
        psnr_db=55.0,
        ssim=0.999,
        reason="only the order of sums differs, and a rounding to uint8 here and there: 88 dB measured",
    ),
    "fp16": QualityLimits(psnr_db=40.0, ssim=0.99, reason="weights and activations of 11 bits: 61 dB measured"),
    "bf16": QualityLimits(psnr_db=32.0, ssim=0.96, reason="weights and activations of 8 bits: 51 dB measured"),
    "int8": QualityLimits(
        psnr_db=22.0, ssim=0.88, reason="256 levels per channel of weights and per activation: 35 dB measured, the worst of 960"
    ),
    "fp8": QualityLimits(psnr_db=20.0, ssim=0.85, reason="weights and activations of 4 bits (E4M3): 28 dB measured"),
}
"""Precision -> limits: below the worst image measured on nitro-emoji and on a random checkpoint, since deeper networks
add up more error. docs/quality.md has the figures."""

_PRECISION_OF = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


def limits_of(precisions: Iterable[str], compute_dtypes: Iterable[str]) -> QualityLimits:
    """The limits of a bundle: those of its least precise stage, as built (fp16, int8) or as computed here (bfloat16).

    Raises: BundleError for a precision that has no limits.
    """
    names = {*precisions, *(_PRECISION_OF.get(dtype, dtype) for dtype in compute_dtypes)}
    unknown = sorted(names - set(LIMITS))
    if unknown:
        raise BundleError(f"there are no quality limits for {unknown[0]!r}; known: {', '.join(LIMITS)}")
    return min((LIMITS[name] for name in names), key=lambda limits: limits.psnr_db)


@dataclass(frozen=True, kw_only=True)
class Spread:
    """One figure over several images."""

    worst: float
    mean: float
    median: float


@dataclass(frozen=True, kw_only=True)
class QualityResult:
    """How near to its references a bundle came at one step count, as its manifest records it."""

    num_steps: int
    num_images: int
    psnr_db: Spread
    ssim: Spread
    limits: QualityLimits
    passed: bool
    loss_allowed: bool
    """Published all the same, because --allow-quality-loss was said."""
    judged_on: str
    """The backend that drew. It is the bundle's own, but for engines that the building machine cannot run: the same graphs
    are then judged on another backend."""
    compute_dtypes: dict[str, str]
    """Stage -> what it was computed in."""
    size_px: int = 0
    """Edge of the images in pixels; 0 stands for the bundle's first size."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Images against their references, one by one."""

    psnr_db_N: tuple[float, ...]
    ssim_N: tuple[float, ...]

    @property
    def worst_psnr_db(self) -> float:
        return min(self.psnr_db_N)

    @property
    def worst_ssim(self) -> float:
        return min(self.ssim_N)

    def passes(self, limits: QualityLimits) -> bool:
        """Whether every image keeps both limits."""
        return self.worst_psnr_db >= limits.psnr_db and self.worst_ssim >= limits.ssim

    def psnr_db(self) -> Spread:
        return _spread(self.psnr_db_N, 2)

    def ssim(self) -> Spread:
        return _spread(self.ssim_N, 4)

    def sentence(self, limits: QualityLimits) -> str:
        """One line for people: the worst image beside the limits."""
        return (
            f"PSNR {self.worst_psnr_db:.1f} dB (limit {limits.psnr_db:g}), SSIM {self.worst_ssim:.4f} (limit {limits.ssim:g}), "
            f"the worst of {len(self.psnr_db_N)} image{'s' * (len(self.psnr_db_N) > 1)}"
        )


def compare(images_NHW3: Images, references_NHW3: Images) -> Comparison:
    """Compare images with their references.

    Raises: ShapeError if shapes or types differ, or there is nothing to compare.
    """
    _require_pictures(images_NHW3, references_NHW3)
    pairs = list(zip(images_NHW3, references_NHW3, strict=True))
    return Comparison(
        psnr_db_N=tuple(psnr_db(image, reference) for image, reference in pairs),
        ssim_N=tuple(ssim(image, reference) for image, reference in pairs),
    )


def psnr_db(image_HW3: Images, reference_HW3: Images) -> float:
    """Peak signal-to-noise ratio in dB, at most `EQUAL_DB`, which is also what equal images give."""
    error = float(((image_HW3.astype(np.float64) - reference_HW3) ** 2).mean())
    return EQUAL_DB if error == 0 else min(EQUAL_DB, float(10 * np.log10(PEAK**2 / error)))


def ssim(image_HW3: Images, reference_HW3: Images) -> float:
    """Structural similarity, the mean over pixels and channels; 1 for equal images.

    An 11x11 Gaussian window with sigma 1.5, at the places where it fits whole.
    Raises: ShapeError if an image is smaller than the window.
    Source: Wang, Bovik, Sheikh & Simoncelli 2004, "Image quality assessment: from error visibility to structural
        similarity", IEEE TIP 13(4), section III.B, with its constants.
    """
    if min(image_HW3.shape[:2]) < WINDOW:
        raise ShapeError(
            f"SSIM needs images of at least {WINDOW}x{WINDOW} pixels, got {image_HW3.shape[1]}x{image_HW3.shape[0]}"
        )
    total = 0.0
    for channel in range(image_HW3.shape[2]):  # one at a time: five filtered maps of a large image are much
        total += _ssim_channel(image_HW3[..., channel].astype(np.float64), reference_HW3[..., channel].astype(np.float64))
    return total / int(image_HW3.shape[2])


def require_sound(references_NHW3: NDArray[Any], what: str) -> None:
    """Refuse references that would judge nothing: NaN or infinity, one colour, or almost only 0 and 255.

    Args:
        references_NHW3: pictures, uint8 or floats from 0 to 255.
        what: for the message.
    Raises: BundleError naming the first image.
    """
    for index, picture_HW3 in enumerate(references_NHW3):
        fault = _fault(picture_HW3)
        if fault:
            raise BundleError(
                f"{what}: reference {index + 1} of {len(references_NHW3)} {fault}, so nothing can be judged by it; "
                "the checkpoint is broken or overflows, repair or fetch it again"
            )


def _fault(picture_HW3: NDArray[Any]) -> str | None:
    if not np.isfinite(picture_HW3).all():
        return "holds NaN or infinity"
    if (picture_HW3 == picture_HW3[0, 0]).all():
        return f"is uniform (colour {picture_HW3[0, 0].tolist()})"
    saturated = float(((picture_HW3 <= 0) | (picture_HW3 >= PEAK)).mean())
    if saturated >= SATURATED:
        return f"is saturated ({saturated:.1%} of its values are 0 or 255)"
    return None


def _ssim_channel(left_HW: Float64, right_HW: Float64) -> float:
    mean_left, mean_right = _blurred(left_HW), _blurred(right_HW)
    variance_left = _blurred(left_HW**2) - mean_left**2
    variance_right = _blurred(right_HW**2) - mean_right**2
    covariance = _blurred(left_HW * right_HW) - mean_left * mean_right
    c1, c2 = (K1 * PEAK) ** 2, (K2 * PEAK) ** 2
    similar = (2 * mean_left * mean_right + c1) * (2 * covariance + c2)
    different = (mean_left**2 + mean_right**2 + c1) * (variance_left + variance_right + c2)
    return float((similar / different).mean())


def _blurred(map_HW: Float64) -> Float64:
    """Weighted by the window wherever it fits whole: [H - 10, W - 10]. The window is a product, so rows, then columns."""
    offsets = np.arange(WINDOW) - WINDOW // 2
    weights = np.exp(-(offsets**2) / (2 * SIGMA**2))
    weights /= weights.sum()
    for _ in range(2):
        length = len(map_HW) - WINDOW + 1
        filtered = weights[0] * map_HW[:length]
        for start in range(1, WINDOW):
            filtered += weights[start] * map_HW[start : start + length]
        map_HW = filtered.T
    return map_HW


def _require_pictures(images_NHW3: Images, references_NHW3: Images) -> None:
    for name, pictures in (("images", images_NHW3), ("references", references_NHW3)):
        if pictures.dtype != np.uint8 or pictures.ndim != 4 or pictures.shape[3] != 3:
            raise ShapeError(f"the {name} to compare are {pictures.dtype} {list(pictures.shape)}, expected uint8 [N, H, W, 3]")
    if images_NHW3.shape != references_NHW3.shape or not len(images_NHW3):
        raise ShapeError(
            f"images {list(images_NHW3.shape)} cannot be compared with references {list(references_NHW3.shape)}: "
            "shapes must agree, and there must be at least one image"
        )


def _spread(values_N: tuple[float, ...], digits: int) -> Spread:
    """Rounded, so that what differs by nothing that matters is the same text."""
    return Spread(
        worst=round(min(values_N), digits),
        mean=round(statistics.fmean(values_N), digits),
        median=round(statistics.median(values_N), digits),
    )

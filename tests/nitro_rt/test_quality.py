"""PSNR and SSIM against scikit-image's figures, the limits, and the refusal of references that judge nothing."""

from __future__ import annotations

import numpy as np
import pytest

from nitro_rt.errors import BundleError, ShapeError
from nitro_rt.quality import EQUAL_DB, LIMITS, compare, limits_of, psnr_db, require_sound, ssim


def pair(seed: int, height: int, width: int, noise: int) -> tuple[np.ndarray, np.ndarray]:
    """A wavy picture, and the same with seeded noise."""
    random = np.random.RandomState(seed)
    y, x = np.mgrid[:height, :width]
    clean = np.stack([127 + 90 * np.sin(x / 5 + c) * np.cos(y / 7 - c) for c in range(3)], -1)
    noisy = clean + random.randint(-noise, noise + 1, clean.shape)
    return tuple(np.clip(np.rint(picture), 0, 255).astype(np.uint8) for picture in (clean, noisy))  # type: ignore[return-value]


# scikit-image 0.26.0: structural_similarity(gaussian_weights=True, sigma=1.5, use_sample_covariance=False, channel_axis=-1,
# data_range=255) and peak_signal_noise_ratio(data_range=255).
@pytest.mark.parametrize(
    ("arguments", "expected_ssim", "expected_db"),
    [
        ((0, 32, 40, 4), 0.9859672970561801, 39.88341147676413),
        ((1, 64, 64, 30), 0.6223450570341585, 23.194808475521597),
        ((2, 11, 13, 90), 0.11878999040742948, 14.235016851607421),
    ],
)
def test_figures_are_scikit_images(arguments: tuple[int, int, int, int], expected_ssim: float, expected_db: float) -> None:
    clean, noisy = pair(*arguments)
    assert ssim(noisy, clean) == pytest.approx(expected_ssim, abs=1e-12)
    assert psnr_db(noisy, clean) == pytest.approx(expected_db, abs=1e-12)


def test_equal_images() -> None:
    clean, _ = pair(0, 16, 16, 1)
    assert ssim(clean, clean) == pytest.approx(1.0, abs=1e-12) and psnr_db(clean, clean) == EQUAL_DB


def test_a_comparison_is_as_good_as_its_worst_image() -> None:
    good, bad = pair(0, 32, 32, 2), pair(0, 32, 32, 8)
    found = compare(np.stack([good[1], good[0], bad[1]]), np.stack([good[0], good[0], bad[0]]))
    assert found.psnr_db().worst == round(psnr_db(bad[1], bad[0]), 2) and found.psnr_db().median > 40
    assert found.psnr_db_N[1] == EQUAL_DB and found.passes(LIMITS["int8"])
    assert not found.passes(LIMITS["fp16"]) and "the worst of 3 images" in found.sentence(LIMITS["fp16"])


@pytest.mark.parametrize(
    ("images", "references"),
    [
        (np.zeros((1, 16, 16, 3), np.float32), np.zeros((1, 16, 16, 3), np.uint8)),
        (np.zeros((2, 16, 16, 3), np.uint8), np.zeros((1, 16, 16, 3), np.uint8)),
        (np.zeros((0, 16, 16, 3), np.uint8), np.zeros((0, 16, 16, 3), np.uint8)),
        (np.zeros((1, 8, 16, 3), np.uint8), np.zeros((1, 8, 16, 3), np.uint8)),
    ],
)
def test_what_cannot_be_compared(images: np.ndarray, references: np.ndarray) -> None:
    with pytest.raises(ShapeError):
        compare(images, references)


def test_the_least_precise_part_decides_the_limits() -> None:
    assert limits_of(["fp32", "fp32"], ["float32"]) == LIMITS["fp32"]
    assert limits_of(["fp16", "int8"], ["float32"]) == LIMITS["int8"]
    assert limits_of(["fp16"], ["float32", "bfloat16"]) == LIMITS["bf16"]
    with pytest.raises(BundleError, match="no quality limits for 'int4'"):
        limits_of(["int4"], [])


def test_limits_fall_with_the_precision() -> None:
    limits = [LIMITS[precision] for precision in ("fp32", "fp16", "bf16", "int8", "fp8")]
    assert [limit.psnr_db for limit in limits] == sorted((limit.psnr_db for limit in limits), reverse=True)
    assert [limit.ssim for limit in limits] == sorted((limit.ssim for limit in limits), reverse=True)


def test_sound_references_pass() -> None:
    clean, noisy = pair(0, 32, 32, 30)
    on_white = np.full((32, 32, 3), 255, np.uint8)  # an icon: most of it is background
    on_white[12:20, 12:20] = clean[:8, :8]
    require_sound(np.stack([clean, noisy, on_white]), "here")


@pytest.mark.parametrize(
    ("fault", "message"),
    [("nan", "holds NaN or infinity"), ("uniform", r"is uniform \(colour \[7.*\]\)"), ("saturated", "is saturated")],
)
def test_references_that_judge_nothing_are_refused(fault: str, message: str) -> None:
    pictures = np.stack(pair(0, 32, 32, 5)).astype(np.float64)
    if fault == "nan":
        pictures[1, 3, 4, 0] = np.nan
    elif fault == "uniform":
        pictures[1] = 7
    else:
        pictures[1] = np.where(pictures[1] > 127, 255, 0)
    with pytest.raises(BundleError, match=f"the parent: reference 2 of 2 {message}"):
        require_sound(pictures, "the parent")

"""The full check of a bundle, ending where the backend runs here with images, compared with its float32 parent's."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from nitro_rt.bundle import Bundle, open_bundle
from nitro_rt.device import RUNTIMES
from nitro_rt.errors import BackendUnavailable, BundleError, EngineMismatch
from nitro_rt.pipeline import ComputeTypeDiffers, Pipeline
from nitro_rt.quantisation import quantised_operators
from nitro_rt.references import compare_with_parent, limits_here, references_at, result_of

SMOKE_PROMPT, SMOKE_SEED = "a red apple", 0


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that was looked at."""

    name: str
    status: str
    """`ok`, or `skipped` where this machine cannot do it."""
    detail: str
    figures: dict[str, Any] = field(default_factory=dict)
    """What the detail says, for programs; empty where it is words only."""


def verify_bundle(folder: str | os.PathLike[str]) -> Iterator[Check]:
    """Check a bundle, one result after another.

    Raises: ModelNotFound, BundleError, EngineMismatch, ShapeError for the first thing that is wrong.
    """
    bundle = open_bundle(folder)
    yield _ok("manifest", f"schema version {bundle.manifest.schema_version}, sha256 {bundle.digest}")
    bundle.verify()
    mib = sum(file.num_bytes for file in bundle.files()) / 2**20
    yield _ok("files", f"{len(bundle.files())} files, {mib:.2f} MiB: sizes and digests as recorded, none missing, none extra")
    steps, shift = ", ".join(map(str, bundle.built_steps)), bundle.manifest.schedule.shift
    yield _ok("schedule", f"the constants of {steps} steps at shift {shift} equal the table recomputed")
    operators = quantised_operators(bundle)
    if operators is not None:
        yield Check(name="operators", status="ok", detail=operators.sentence(), figures=asdict(operators))
    yield from _drawings(bundle)


def _drawings(bundle: Bundle) -> Iterator[Check]:
    """Per step count, one image that must not be uniform and the comparison with the parent's; the pipeline itself refuses
    NaN and infinity."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ComputeTypeDiffers)
            for size_px in bundle.manifest.sizes_px:
                with Pipeline.of(bundle.at_size(size_px)) as pipe:
                    for num_steps in bundle.built_steps:
                        at = f"{_steps(num_steps)}{f', {size_px} px' if len(bundle.manifest.sizes_px) > 1 else ''}"
                        yield _smoke_image(pipe, num_steps, at)
                        yield _quality(pipe, num_steps, at)
    except BackendUnavailable as exc:
        yield Check(name="image", status="skipped", detail=str(exc))
    except EngineMismatch as exc:
        if bundle.backend not in RUNTIMES:
            raise
        yield Check(name="image", status="skipped", detail=str(exc))


def _smoke_image(pipe: Pipeline, num_steps: int, at: str) -> Check:
    result = pipe(SMOKE_PROMPT, seed=SMOKE_SEED, steps=num_steps)
    pixels_HWC = np.asarray(result.images[0])
    if (pixels_HWC == pixels_HWC[0, 0]).all():
        raise BundleError(
            f"{pipe.bundle.folder} draws a uniform image at {at} (colour {pixels_HWC[0, 0].tolist()}); "
            "its engines are broken or overflow, build again with --precision fp32"
        )
    return _ok(f"image, {at}", f"finite, not uniform, {result.timings_ms['total']:.0f} ms")


def _quality(pipe: Pipeline, num_steps: int, at: str) -> Check:
    name, bundle = f"quality, {at}", pipe.bundle
    if not references_at(bundle, num_steps):
        return Check(name=name, status="skipped", detail="the bundle carries no pictures of its parent to compare with")
    built, limits = result_of(bundle, num_steps), limits_here(pipe, num_steps)
    comparison = compare_with_parent(pipe, num_steps)
    sentence = comparison.sentence(limits)
    if not comparison.passes(limits):
        then = f"where it was built it had PSNR {built.psnr_db.worst:.1f} dB, SSIM {built.ssim.worst:.4f}; " if built else ""
        operators = quantised_operators(bundle)
        then += f"operators: {operators.sentence()}; " if operators is not None else ""
        raise BundleError(
            f"{bundle.folder} misses its quality limits at {at}: {sentence}; {then}"
            "build it again on this machine, or with a higher --precision"
        )
    figures = {"psnr_db": asdict(comparison.psnr_db()), "ssim": asdict(comparison.ssim()), "limits": asdict(limits)}
    allowed = "; published with --allow-quality-loss" if built is not None and built.loss_allowed else ""
    return Check(name=name, status="ok", detail=sentence + allowed, figures=figures)


def _steps(num_steps: int) -> str:
    return f"{num_steps} step{'s' * (num_steps > 1)}"


def _ok(name: str, detail: str) -> Check:
    return Check(name=name, status="ok", detail=detail)

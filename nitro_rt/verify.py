"""The full check of a bundle, ending with an image where the backend runs here."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from nitro_rt.bundle import Bundle, open_bundle
from nitro_rt.device import RUNTIMES
from nitro_rt.errors import BackendUnavailable, BundleError, EngineMismatch
from nitro_rt.pipeline import ComputeTypeDiffers, Pipeline

SMOKE_PROMPT, SMOKE_SEED = "a red apple", 0


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that was looked at."""

    name: str
    status: str
    """`ok`, or `skipped` where this machine cannot do it."""
    detail: str


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
    yield from _smoke(bundle)


def _smoke(bundle: Bundle) -> Iterator[Check]:
    """One image per step count, which must not be uniform; the pipeline itself refuses NaN and infinity."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ComputeTypeDiffers)
            with Pipeline.load(bundle.folder) as pipe:
                for num_steps in bundle.built_steps:
                    yield _smoke_image(pipe, num_steps)
    except BackendUnavailable as exc:
        yield Check(name="image", status="skipped", detail=str(exc))
    except EngineMismatch as exc:
        if bundle.backend not in RUNTIMES:
            raise
        yield Check(name="image", status="skipped", detail=str(exc))


def _smoke_image(pipe: Pipeline, num_steps: int) -> Check:
    result = pipe(SMOKE_PROMPT, seed=SMOKE_SEED, steps=num_steps)
    pixels_HWC = np.asarray(result.images[0])
    if (pixels_HWC == pixels_HWC[0, 0]).all():
        raise BundleError(
            f"{pipe.bundle.folder} draws a uniform image at {num_steps} steps (colour {pixels_HWC[0, 0].tolist()}); "
            "its engines are broken or overflow, build again with --precision fp32"
        )
    return _ok(f"image, {num_steps} step{'s' * (num_steps > 1)}", f"finite, not uniform, {result.timings_ms['total']:.0f} ms")


def _ok(name: str, detail: str) -> Check:
    return Check(name=name, status="ok", detail=detail)

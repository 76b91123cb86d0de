"""A bundle beside the pictures of its float32 parent: the same prompts and seeds drawn, compared, and judged.

Nothing here needs torch: the parent drew when the bundle was built, and its pictures travel in the bundle.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from nitro_rt.bundle import Bundle
from nitro_rt.errors import BundleError
from nitro_rt.manifest import Reference, check_file
from nitro_rt.pipeline import Pipeline
from nitro_rt.quality import Comparison, Images, QualityLimits, QualityResult, compare, limits_of, require_sound

MARGIN_DB, MARGIN_SSIM = 3.0, 0.03
"""How far a bundle published below its limits may fall below what it reached then: other machines round otherwise."""


def references_at(bundle: Bundle, num_steps: int) -> tuple[Reference, ...]:
    """The bundle's references of one step count, in order."""
    return tuple(reference for reference in bundle.manifest.references if reference.steps == num_steps)


def compare_with_parent(pipe: Pipeline, num_steps: int) -> Comparison:
    """Draw the prompts and seeds of the bundle's references at one step count, and compare.

    Raises: BundleError if a reference is missing, damaged, of another size, or says nothing; EngineMismatch as the pipeline.
    """
    references = references_at(pipe.bundle, num_steps)
    expected_NHW3 = pictures(pipe.bundle, references)
    require_sound(expected_NHW3, f"{pipe.bundle.folder}, {num_steps} steps")
    return compare(_drawn(pipe, references, num_steps), expected_NHW3)


def limits_here(pipe: Pipeline, num_steps: int) -> QualityLimits:
    """What the bundle must reach on this machine.

    What it was held to when it was built, or less where this machine computes in a narrower type. A bundle published with
    --allow-quality-loss must come near to what it reached then.
    """
    return limits_at(pipe.bundle, num_steps, pipe.compute_dtypes)


def limits_at(bundle: Bundle, num_steps: int, compute_dtypes: Mapping[str, str]) -> QualityLimits:
    """The same, where a pipeline in another process has told what its stages compute in."""
    found = result_of(bundle, num_steps)
    stages = ("text", f"denoise/{num_steps}", "decode")
    dtypes = {stage: compute_dtypes[stage] for stage in stages}
    here = limits_of((engine.precision for stage, engine in bundle.engines() if stage in stages), dtypes.values())
    if found is None:
        return here
    if found.passed:
        return found.limits if dtypes == found.compute_dtypes else min(here, found.limits, key=lambda limits: limits.psnr_db)
    return QualityLimits(
        psnr_db=round(found.psnr_db.worst - MARGIN_DB, 2),
        ssim=round(found.ssim.worst - MARGIN_SSIM, 4),
        reason="published with --allow-quality-loss: what it reached then, less a margin for another machine",
    )


def result_of(bundle: Bundle, num_steps: int) -> QualityResult | None:
    """The newest result of a step count in the manifest."""
    return next((result for result in reversed(bundle.manifest.quality_gate) if result.num_steps == num_steps), None)


def with_steps(bundle: Bundle, num_steps: int) -> Bundle:
    """The bundle as if it held one step count only, so that one denoiser is in memory at a time."""
    manifest = bundle.manifest
    only = dataclasses.replace(
        manifest,
        denoise={num_steps: manifest.denoise[num_steps]},
        schedule=dataclasses.replace(manifest.schedule, steps={num_steps: manifest.schedule.steps[num_steps]}),
    )
    return dataclasses.replace(bundle, manifest=only)


def _drawn(pipe: Pipeline, references: tuple[Reference, ...], num_steps: int) -> Images:
    """[N, H, W, 3] uint8, in as few calls as the bundle's batch allows."""
    batch, images = pipe.bundle.manifest.batch, []
    for first in range(0, len(references), batch):
        part = references[first : first + batch]
        seeds = [reference.seed for reference in part]
        images += pipe([reference.prompt for reference in part], seed=seeds, steps=num_steps).images
    return np.stack([np.asarray(image) for image in images])


def pictures(bundle: Bundle, references: tuple[Reference, ...]) -> Images:
    """[N, H, W, 3] uint8 from the bundle's PNG files. Raises: BundleError if one is missing, damaged or of another size."""
    from PIL import Image

    side = bundle.manifest.sizes_px[0]
    pictures = []
    for reference in references:
        path = check_file(bundle.folder, reference.file)
        try:
            with Image.open(path, formats=["PNG"]) as image:
                picture_HW3 = np.asarray(image)
        except (OSError, ValueError, SyntaxError) as exc:  # Pillow's for what is no PNG, or a damaged one
            raise BundleError(f"{path} is no PNG that can be read: {exc}; build the bundle again") from exc
        if picture_HW3.shape != (side, side, 3) or picture_HW3.dtype != np.uint8:
            raise BundleError(
                f"{path} is a reference of {picture_HW3.dtype} {list(picture_HW3.shape)}, the bundle draws uint8 "
                f"{[side, side, 3]}; build it again"
            )
        pictures.append(picture_HW3)
    return np.stack(pictures)

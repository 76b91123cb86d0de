"""`calibrate`: the parent draws at the noise levels that are served, and what its layers were given decides the recipe."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from nitro_export.checkpoint import checkpoint_sha256
from nitro_export.quantise.drawing import Report, WatchedStage, watched_stages, weights_of
from nitro_export.quantise.formats import activation_format, weight_format
from nitro_export.quantise.prompts import built_in_prompts, prompts_sha256
from nitro_export.quantise.ranges import QUANTISABLE
from nitro_export.quantise.recipe import RECIPE_VERSION, KeptLayer, QuantisationRecipe, QuantisedLayer
from nitro_export.quantise.sensitivity import Formats, quantised_layers, sensitive
from nitro_export.toolchain import toolchain
from nitro_rt.errors import ConfigError, ExportError
from nitro_rt.manifest import SCHEMA_VERSION
from nitro_rt.quality import LIMITS
from nitro_rt.schedule import alphas_cumprod_from_config, step_schedule

if TYPE_CHECKING:
    from nitro_export.parent import Parent

MIN_SQNR_DB = {"int8": 36.0, "fp8": 20.0}
"""INT8's decides: on nitro-emoji 17 layers of the denoiser are under it, 7 % of the multiplications; with these in floats
latents are 1.7 dB nearer to the parent's, and the worst of 96 3.6 dB (docs/quantisation.md)."""
HEADROOM = 1.2
"""On nitro-emoji, with 128 prompts of calibration, 1.2 lifts the worst of 96 unseen latents by 1.8 dB over 1.1 and all of them
by 0.3; 1.0 costs the worst two."""
REPORT_EVERY = 100
"""Layers: of a full-size denoiser these take about a minute."""


def calibrate(
    parent: Parent,
    *,
    steps: Sequence[int],
    precision: str,
    shift: int,
    seed: int = 0,
    prompts: Sequence[str] | None = None,
    num_prompts: int | None = None,
    symmetric: bool = True,
    weight_bits: int = 8,
    headroom: float = HEADROOM,
    min_sqnr_db: float | None = None,
    max_kept_share: float = 0.1,
    min_share: float = 1e-4,
    report: Report = lambda line: None,
) -> QuantisationRecipe:
    """Measure what quantising `denoise` and `decode` takes, at exactly the noise levels that these step counts visit.

    The parent draws each prompt with the largest of `steps`, whose levels are those of all the others; the decoder is given
    what the denoiser gave. Nothing of the network's size is kept: extremes, and a few rows of each layer's input.

    Args:
        parent: the checkpoint in float32; its `size_px` is the calibration's and may be smaller than the built one.
        precision: "int8" or "fp8".
        prompts: None means the built-in ones, drawn with `seed`.
        num_prompts: None means all of `prompts`, or as many built-in ones as `default_num_prompts` says. The last batch of the
            parent is filled up with the first of them.
        symmetric: activations with the zero point 0 (TensorRT demands it); otherwise uint8 with their own.
        weight_bits: 7 for processors whose 8-bit multiplication saturates.
        headroom: what the chosen ranges are widened by, 1 or more: other prompts reach further than those that were drawn.
        min_sqnr_db, max_kept_share, min_share: see `QuantisationRecipe`.
    Returns: the same recipe each time for the same arguments on the same machine.
    Raises: ConfigError for a request that makes no sense; ExportError for a damaged checkpoint.
    """
    formats = Formats(activations=activation_format(precision, symmetric), weights=weight_format(precision, weight_bits))
    chosen = _prompts(prompts, num_prompts, parent.size_px, seed)
    if not 1 <= headroom <= 4:
        raise ConfigError(f"headroom must be from 1 to 4, got {headroom}")
    if not steps or len(set(steps)) != len(steps):
        raise ConfigError(f"steps must name each step count once, got {tuple(steps)}; available: 1, 2, 3, 4")
    alphas = alphas_cumprod_from_config(parent.checkpoint.scheduler)
    schedules = {count: step_schedule(count, shift, alphas) for count in sorted(steps)}
    most = max(schedules)
    noise_levels = schedules[most].shifted_timesteps
    assert all(set(schedule.shifted_timesteps) <= set(noise_levels) for schedule in schedules.values())
    bounds = {
        "min_sqnr_db": MIN_SQNR_DB[precision] if min_sqnr_db is None else min_sqnr_db,
        "max_kept_share": max_kept_share,
        "min_share": min_share,
    }
    layers: list[QuantisedLayer] = []
    kept: list[KeptLayer] = []
    for stage in watched_stages(parent, chosen, schedules, kinds=QUANTISABLE, seed=seed, report=report):
        measured = _measured(stage, formats, headroom, report)
        stays = sensitive(measured, **bounds)
        layers += [layer for layer in measured if layer.name not in stays]
        kept += stays.values()
        report(_summary(stage.name, measured, stays))
    return QuantisationRecipe(
        schema_version=SCHEMA_VERSION,
        recipe_version=RECIPE_VERSION,
        precision=precision,
        weight_bits=weight_bits,
        symmetric=symmetric,
        checkpoint_sha256=checkpoint_sha256(parent.checkpoint.folder),
        calibration_size_px=parent.size_px,
        steps=tuple(schedules),
        noise_levels=noise_levels,
        shift=shift,
        seed=seed,
        headroom=headroom,
        num_prompts=len(chosen),
        prompts_sha256=prompts_sha256(chosen),
        limits={"psnr_db": LIMITS[precision].psnr_db, "ssim": LIMITS[precision].ssim},
        layers=tuple(layers),
        kept=tuple(kept),
        toolchain=toolchain(),
        **bounds,
    )


def default_num_prompts(size_px: int) -> int:
    """128 up to 128 pixels, 4 from 512 on: each costs one pass per noise level, and one through the decoder."""
    return max(4, min(128, 128 * 128**2 // size_px**2)) if size_px < 512 else 4


def _prompts(prompts: Sequence[str] | None, num_prompts: int | None, size_px: int, seed: int) -> tuple[str, ...]:
    if num_prompts is not None and num_prompts < 1:
        raise ConfigError(f"num_prompts must be 1 or more, got {num_prompts}")
    if prompts is None:
        return built_in_prompts(num_prompts or default_num_prompts(size_px), seed)
    if not prompts or len(prompts) < (num_prompts or 0):
        raise ConfigError(f"{len(prompts)} prompts were given to calibrate with, {num_prompts or 'at least 1'} are needed")
    return tuple(prompts[: num_prompts or len(prompts)])


@torch.no_grad()
def _measured(stage: WatchedStage, formats: Formats, headroom: float, report: Report) -> list[QuantisedLayer]:
    """Every layer that ran, quantised alone."""
    records, modules = stage.recorder.records, stage.modules
    total = sum(sum(record.multiplications.values()) for record in records.values())
    num_layers = sum(len(record.multiplications) for record in records.values())
    layers: list[QuantisedLayer] = []
    reported = 0
    for leader, record in records.items():
        if record.amax_C is None or not record.amax_C.isfinite().all():
            raise ExportError(f"{leader} is given NaN or infinity by the parent itself, in float32; the checkpoint is damaged")
        layers += quantised_layers(
            record,
            {name: functools.partial(weights_of, modules[name]) for name in record.multiplications},
            formats,
            smoothed=isinstance(modules[leader], nn.Linear),
            headroom=headroom,
            shares={name: count / total for name, count in record.multiplications.items()},
        )
        if len(layers) >= reported + REPORT_EVERY:
            reported = len(layers)
            report(f"{stage.name}: {reported} of {num_layers} layers measured")
    return layers


def _summary(stage: str, measured: Sequence[QuantisedLayer], stays: Mapping[str, KeptLayer]) -> str:
    quantised = [layer for layer in measured if layer.name not in stays]
    worst = min(quantised, key=lambda layer: layer.sqnr_db, default=None)
    sensitive_ones = [layer for layer in stays.values() if layer.reason == "sensitive"]
    return (
        f"{stage}: {len(quantised)} of {len(measured)} layers quantised, {sum(layer.share for layer in quantised):.1%} of the "
        f"multiplications with weights; {len(sensitive_ones)} stay because they are sensitive"
        + (f"; worst quantised: {worst.name}, {worst.sqnr_db:.1f} dB" if worst else "")
    )

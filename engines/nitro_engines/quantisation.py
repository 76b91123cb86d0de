"""What a quantised build asks for beyond its precision, and the two steps that make its graphs: calibrate, rewrite."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import nitro_export
import nitro_rt.noise
from nitro_engines.cache import EngineCache
from nitro_engines.files import Report, source_sha256
from nitro_engines.keys import Fields, key_of
from nitro_rt.cpu import cpu_target, has_dot_products
from nitro_rt.errors import BundleError

if TYPE_CHECKING:
    from nitro_export.quantise import QuantisationRecipe

QUANTISED = ("int8", "fp8")
BASE_PRECISION = "fp16"
"""What the layers that are not quantised are exported in."""
SATURATING_BACKENDS = ("openvino",)
"""Those whose kernels saturate on a CPU without dot products of bytes. ONNX Runtime's CPU provider multiplies these graphs in
floats (docs/quantisation.md)."""
SYMMETRIC_BACKENDS = ("tensorrt", "tensorrt-rtx")
"""Those that read activations with the zero point 0 only; so does ONNX Runtime on TensorRT."""
MAX_CALIBRATION_PX = 512
"""Larger images are calibrated at this size: ranges are of layers, and a 1024-pixel drawing takes four times as long."""
PIXELS_PER_DRAWING = 8 * 128**2
"""Small images are drawn several at a time, at most eight."""


@dataclass(frozen=True, kw_only=True)
class Quantisation:
    """The arguments of `nitro_export.quantise.calibrate` that a build decides."""

    precision: str
    """int8 or fp8."""
    weight_bits: int
    """7 for CPUs whose 8-bit multiplication saturates; 8 elsewhere."""
    symmetric: bool
    """Activations have the zero point 0; otherwise each tensor has its own, which leaves no codes unused."""
    seed: int = 0

    def fields(self) -> Fields:
        """For keys: the options, and the code that gives them their meaning or draws the noise to calibrate with."""
        package = Path(nitro_export.__file__).parent / "quantise"
        constants = {"max_calibration_px": MAX_CALIBRATION_PX, "pixels_per_drawing": PIXELS_PER_DRAWING}
        code = {"source": source_sha256(package), "noise": source_sha256(Path(nitro_rt.noise.__file__))}
        return dataclasses.asdict(self) | constants | code


def quantisation_of(precision: str, backend: str, provider: str | None = None) -> Quantisation | None:
    """What `precision` means on `backend`, and there on ONNX Runtime's `provider` (None: cpu); None for a float precision."""
    if precision not in QUANTISED:
        return None
    saturates = backend in SATURATING_BACKENDS and not has_dot_products(cpu_target())
    return Quantisation(
        precision=precision,
        weight_bits=7 if saturates and precision == "int8" else 8,
        symmetric=precision == "fp8" or backend in SYMMETRIC_BACKENDS or provider not in (None, "cpu"),
    )


def calibration_batch(size_px: int) -> int:
    """Images per drawing of a calibration at `size_px`."""
    return max(1, min(8, PIXELS_PER_DRAWING // size_px**2))


def recipe_of(
    quantisation: Quantisation,
    fields: Fields,
    checkpoint: Path,
    cache: EngineCache,
    report: Report,
) -> QuantisationRecipe:
    """The recipe for these graphs: from the cache, or measured now on the checkpoint in float32.

    Args:
        fields: what decides the float graphs: checkpoint, shift, steps, size.
    """
    from nitro_export import read_checkpoint
    from nitro_export.parent import Parent
    from nitro_export.quantise import QuantisationRecipe, calibrate

    size_px = min(fields["size_px"], MAX_CALIBRATION_PX)
    names = ("checkpoint", "steps", "shift", "toolchain")
    key = key_of({"recipe": quantisation.fields(), "size_px": size_px, **{name: fields[name] for name in names}})
    with cache.making(key, "this calibration", report) as work:
        known = cache.find_record("recipes", key)
        if known is not None:
            try:
                recipe = QuantisationRecipe.from_dict(known)
                report(f"calibration for {quantisation.precision} from the cache")
                return recipe
            except BundleError as exc:
                report(f"the cached calibration {key[:12]} is damaged and is measured again: {exc}")
        recipe = calibrate(
            Parent(read_checkpoint(checkpoint), size_px=size_px, batch=calibration_batch(size_px)),
            steps=fields["steps"],
            shift=fields["shift"],
            **dataclasses.asdict(quantisation),
            report=report,
        )
        cache.store_record("recipes", key, recipe.as_dict(), work)
        return recipe


def worst_operators(checkpoint: Path, graphs: Path, report: Report) -> str:
    """A sentence that names the ten quantised operators with the largest error: where to look when a bundle misses its gate."""
    from nitro_export import read_checkpoint
    from nitro_export.parent import Parent
    from nitro_export.quantise import QuantisationRecipe, attribute
    from nitro_rt.manifest import EXPORT_FILE, GraphsManifest, from_json

    report("looking for the operators that lose most")
    path = graphs / EXPORT_FILE
    manifest = from_json(GraphsManifest, path.read_text(encoding="utf-8"), where=str(path))
    assert manifest.quantisation is not None
    size_px = QuantisationRecipe.from_dict(manifest.quantisation, where=str(path)).calibration_size_px
    errors = attribute(graphs, Parent(read_checkpoint(checkpoint), size_px=size_px), report=report)
    listed = [f"{error.name} {error.sqnr_db:.1f} dB (calibrated {error.expected_db:.1f})" for error in errors]
    return f"Operators with the largest error: {'; '.join(listed)}"

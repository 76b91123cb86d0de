"""What a bundle's quantisation recipe says of its operators; `nitro_export.quantise` measured it, on inputs of the parent."""

from __future__ import annotations

from dataclasses import dataclass

from nitro_rt.bundle import Bundle
from nitro_rt.errors import BundleError

WORST = 10


@dataclass(frozen=True, kw_only=True)
class OperatorError:
    """One quantised linear layer or convolution."""

    name: str
    sqnr_db: float
    """Signal to quantisation noise of its output when it alone is quantised, as calibration measured it."""


@dataclass(frozen=True, kw_only=True)
class QuantisedOperators:
    """The operators of a quantised bundle."""

    num_quantised: int
    num_kept: int
    """Those that stayed in the float type: sensitive, or too small to gain."""
    worst: tuple[OperatorError, ...]
    """The ten that add the most error, worst first."""

    def sentence(self) -> str:
        """One line for people."""
        listed = "; ".join(f"{error.name} {error.sqnr_db:.1f} dB" for error in self.worst)
        return f"{self.num_quantised} quantised, {self.num_kept} kept; most error by calibration: {listed}"


def quantised_operators(bundle: Bundle) -> QuantisedOperators | None:
    """None where nothing is quantised. Raises: BundleError if the recipe does not say."""
    recipe = bundle.manifest.quantisation
    if recipe is None:
        return None
    try:
        errors = [OperatorError(name=str(layer["name"]), sqnr_db=float(layer["sqnr_db"])) for layer in recipe["layers"]]
        num_kept = len(recipe["kept"])
    except (KeyError, TypeError, ValueError) as exc:
        raise BundleError(
            f"the quantisation recipe in {bundle.folder} does not list its layers, each with name and sqnr_db ({exc!r}); "
            "build the bundle again"
        ) from exc
    errors.sort(key=lambda error: (error.sqnr_db, error.name))
    return QuantisedOperators(num_quantised=len(errors), num_kept=num_kept, worst=tuple(errors[:WORST]))

"""The quantisation recipe: all that decides the numbers of a quantised graph, as JSON that gives the same numbers again."""

from __future__ import annotations

import base64
import dataclasses
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nitro_rt.manifest import from_json, to_json

RECIPE_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class QuantisedLayer:
    """One linear layer or convolution whose input and weights are quantised."""

    name: str
    """The parameter's name in the graph without `.weight`."""
    low: float
    """Of its input after smoothing: what the codes reach down to. With symmetric ranges -high; up to 0 otherwise."""
    high: float
    clip: float
    """Share of the largest input seen that was kept, before headroom: 1 is all, less was better by squared error."""
    alpha: float | None
    """SmoothQuant's migration strength; None where no smoothing was better."""
    smoothing: str
    """Per input channel the exponent of the power of two that its input is divided by: base64 of int8; empty for none."""
    sqnr_db: float
    """Signal to quantisation noise of its output when it alone is quantised."""
    share: float
    """Of its stage's multiplications."""

    def factors(self) -> Tensor | None:
        """[K] float32 powers of two: the input is divided by them, the weights are multiplied. None without smoothing."""
        if not self.smoothing:
            return None
        exponents = np.frombuffer(base64.b64decode(self.smoothing), dtype=np.int8)
        return torch.exp2(torch.from_numpy(exponents.astype(np.float32)))


@dataclass(frozen=True, kw_only=True)
class KeptLayer:
    """One layer that stays as it is."""

    name: str
    reason: str
    """`sensitive`, `small`, or why it cannot be quantised."""
    sqnr_db: float
    """What quantising it would have given."""
    share: float
    """Of its stage's multiplications."""


@dataclass(frozen=True, kw_only=True)
class QuantisationRecipe:
    """What was measured, on what, and what was decided."""

    schema_version: int
    recipe_version: int
    precision: str
    """int8 or fp8 (float8e4m3fn)."""
    weight_bits: int
    """8; 7 for processors whose 8-bit multiplication saturates (AVX2 without VNNI)."""
    symmetric: bool
    """Activations have the zero point 0, which TensorRT demands; otherwise they are uint8 with their own."""
    checkpoint_sha256: str
    calibration_size_px: int
    steps: tuple[int, ...]
    """The step counts that this serves."""
    noise_levels: tuple[int, ...]
    """The shifted timesteps that were run: exactly those that `steps` visit."""
    shift: int
    seed: int
    """Of the noise and of the choice of samples."""
    headroom: float
    """What the ranges were widened by, for prompts that reach further than those that were drawn."""
    num_prompts: int
    prompts_sha256: str
    """Of the prompts, one per line."""
    min_sqnr_db: float
    """Layers under it, and 2.75 dB under the median of their stage, stay as they are, worst first, ..."""
    max_kept_share: float
    """... as long as no more than this share of a stage's multiplications stays."""
    min_share: float
    """A layer with less than this share of its stage's multiplications is too small for a gain."""
    limits: dict[str, float]
    """What a bundle of this precision must reach against its parent in float32: `psnr_db`, `ssim`."""
    layers: tuple[QuantisedLayer, ...]
    kept: tuple[KeptLayer, ...]
    toolchain: dict[str, str]

    def to_json(self) -> str:
        """Canonical: equal recipes give equal bytes."""
        return to_json(self)

    @classmethod
    def from_json(cls, text: str, *, where: str = "the quantisation recipe") -> QuantisationRecipe:
        """Raises: BundleError naming the first field that is wrong."""
        return from_json(cls, text, where=where)

    def as_dict(self) -> dict[str, Any]:
        """For a manifest's `quantisation`, which `from_dict` reads."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any], *, where: str = "the quantisation recipe") -> QuantisationRecipe:
        """Raises: BundleError naming the first field that is wrong."""
        return cls.from_json(json.dumps(data), where=where)


def packed(exponents: Tensor) -> str:
    """[K] whole numbers from -128 to 127, as `QuantisedLayer.smoothing` holds them."""
    return base64.b64encode(exponents.to(torch.int8).numpy().tobytes()).decode("ascii")

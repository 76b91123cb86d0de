"""The two number formats, INT8 and FP8: what their codes are and how a float becomes one.

One arithmetic serves calibration, graphs and attribution: divide by the scale, round half to even, add the zero point, limit
to the format's range. That is ONNX's QuantizeLinear (onnx.ai/onnx/operators/onnx__QuantizeLinear.html).
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx
import torch
from torch import Tensor

from nitro_rt.errors import ConfigError

PRECISIONS = ("int8", "fp8")


@dataclass(frozen=True, kw_only=True)
class NumberFormat:
    """Codes from `lowest` to `highest`, stored as `dtype`."""

    name: str
    dtype: torch.dtype
    onnx_type: int
    lowest: float
    highest: float

    @property
    def is_float(self) -> bool:
        return self.dtype.is_floating_point

    def codes(self, values: Tensor, scale: Tensor, zero_point: int = 0) -> Tensor:
        """Floats to codes; `scale` broadcasts against them."""
        return self._limited(values, scale, zero_point).to(self.dtype)

    def values(self, codes: Tensor, scale: Tensor, zero_point: int = 0) -> Tensor:
        """Codes to the floats that they stand for."""
        return (codes.float() - zero_point) * scale

    def rounded(self, values: Tensor, scale: Tensor, zero_point: int = 0) -> Tensor:
        """The floats that the codes of `values` stand for."""
        codes = self._limited(values, scale, zero_point)
        if self.is_float:
            codes = codes.to(self.dtype).float()
        return codes.sub_(zero_point).mul_(scale)

    def _limited(self, values: Tensor, scale: Tensor, zero_point: int) -> Tensor:
        scaled = values / scale
        if not self.is_float:
            scaled.round_().add_(zero_point)
        return scaled.clamp_(self.lowest, self.highest)


INT8 = NumberFormat(name="int8", dtype=torch.int8, onnx_type=onnx.TensorProto.INT8, lowest=-127, highest=127)
UINT8 = NumberFormat(name="uint8", dtype=torch.uint8, onnx_type=onnx.TensorProto.UINT8, lowest=0, highest=255)
INT7 = NumberFormat(name="int7", dtype=torch.int8, onnx_type=onnx.TensorProto.INT8, lowest=-63, highest=63)
FP8 = NumberFormat(
    name="float8e4m3fn", dtype=torch.float8_e4m3fn, onnx_type=onnx.TensorProto.FLOAT8E4M3FN, lowest=-448, highest=448
)


def weight_format(precision: str, weight_bits: int) -> NumberFormat:
    """How weights are stored. Raises: ConfigError for a pair that is not offered."""
    try:
        return {("int8", 8): INT8, ("int8", 7): INT7, ("fp8", 8): FP8}[precision, weight_bits]
    except KeyError:
        raise ConfigError(
            f"weights in {weight_bits} bits of {precision!r} are not offered; available: int8 with 8 or 7 bits, fp8 with 8"
        ) from None


def activation_format(precision: str, symmetric: bool) -> NumberFormat:
    """How activations are stored. Raises: ConfigError for a pair that is not offered."""
    if precision == "fp8" and not symmetric:
        raise ConfigError("fp8 has no zero point, so its activations are symmetric; choose int8 for ranges with a zero point")
    if precision not in PRECISIONS:
        raise ConfigError(f"precision {precision!r} is no quantised one; available: {', '.join(PRECISIONS)}")
    return FP8 if precision == "fp8" else INT8 if symmetric else UINT8


def channel_scales(weights_OK: Tensor, kind: NumberFormat, dtype: torch.dtype = torch.float32) -> Tensor:
    """[O] scales of a weight matrix, one for each output channel, rounded to `dtype`; 1 for a channel of zeros."""
    amax = weights_OK.abs().amax(dim=1)
    scales = _representable(amax / kind.highest, dtype)
    return torch.where(amax > 0, scales, torch.ones((), dtype=torch.float32))


def activation_scale(low: float, high: float, kind: NumberFormat, dtype: torch.dtype = torch.float32) -> tuple[Tensor, int]:
    """The scale, rounded to `dtype`, and zero point that cover `low` to `high`; both contain 0, which stays exact."""
    assert low <= 0 <= high and high - low > 0, (low, high)
    if kind is not UINT8:
        return _representable(torch.tensor(max(-low, high) / kind.highest, dtype=torch.float64), dtype), 0
    scale = _representable(torch.tensor((high - low) / (kind.highest - kind.lowest), dtype=torch.float64), dtype)
    return scale, round(min(max(-low / scale.item(), kind.lowest), kind.highest))


def _representable(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """As `dtype` holds them, in float32, and never zero: a graph in float16 divides by the float16 scale."""
    return scales.to(dtype).float().clamp_min(torch.finfo(dtype).smallest_normal)

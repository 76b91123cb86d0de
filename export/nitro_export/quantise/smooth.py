"""SmoothQuant: outliers of an activation's channels move into the weights, where each channel has room for them.

Input channel c is divided by s_c = amax(x_c)^alpha / amax(W_c)^(1 - alpha) and the weights' column multiplied by it, which
changes nothing before rounding. Here s is rounded to a power of two: multiplying by it is exact in every float type, and a
recipe needs one byte per channel.

Source: Xiao et al. 2023, "SmoothQuant", arXiv:2211.10438, equation 4.
Shapes: C input channels.
"""

from __future__ import annotations

from torch import Tensor

ALPHAS = (0.3, 0.5, 0.65, 0.8)
"""Tried for each tensor, besides no smoothing at all; the paper uses 0.5 to 0.9."""
MAX_EXPONENT = 12
"""Factors stay within 2^-12 and 2^12, so that smoothed weights stay normal numbers in float16."""


def exponents(amax_C: Tensor, amax_of_weights_C: Tensor, alpha: float) -> Tensor:
    """[C] whole exponents of the factors, from the magnitudes of the input's channels and of the weights they meet.

    Layers that are given the same tensor share its factors: `amax_of_weights_C` is then over all of them.
    """
    factors = alpha * _log2(amax_C) - (1 - alpha) * _log2(amax_of_weights_C)
    # Only their ratios matter: centred, as many channels shrink as grow.
    factors -= factors.median()
    # A channel that is never used, on either side, needs no factor.
    factors[(amax_C == 0) | (amax_of_weights_C == 0)] = 0
    return factors.round().clamp(-MAX_EXPONENT, MAX_EXPONENT)


def _log2(values: Tensor) -> Tensor:
    return values.clamp_min(2.0**-24).log2()

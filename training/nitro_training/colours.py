"""Colour names of pictures: which colour an icon has, and the same icon in another hue.

Shapes: H, W pixels; `rgb_HW3` float in [0, 1]; `mask_HW` bool, true where the icon is.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.float32]
Mask = NDArray[np.bool_]

HUES_DEG = {"red": 0.0, "orange": 28.0, "yellow": 50.0, "green": 125.0, "blue": 215.0, "purple": 275.0, "pink": 328.0}
"""The colours that a hue shift can ask for, with the hue it aims at."""

NAMES = (*HUES_DEG, "brown", "black", "grey", "white")

_HUE_STARTS_DEG = (("red", 0), ("orange", 14), ("yellow", 41), ("green", 68), ("blue", 170), ("purple", 256),
                   ("pink", 300), ("red", 346))  # fmt: skip


def hsv_from_rgb(rgb_HW3: Image) -> Image:
    """Hue in degrees [0, 360), saturation and value in [0, 1], as [H, W, 3]."""
    high, low = rgb_HW3.max(-1), rgb_HW3.min(-1)
    span = high - low
    safe = np.where(span > 0, span, 1.0)
    red, green, blue = np.moveaxis(rgb_HW3, -1, 0)
    sector = np.select(
        [high == red, high == green], [(green - blue) / safe % 6.0, (blue - red) / safe + 2.0], (red - green) / safe + 4.0
    )
    saturation = np.where(high > 0, span / np.where(high > 0, high, 1.0), 0.0)
    return np.stack([np.where(span > 0, sector * 60.0, 0.0), saturation, high], -1).astype(np.float32)


def rgb_from_hsv(hsv_HW3: Image) -> Image:
    """The inverse of `hsv_from_rgb`."""
    hue, saturation, value = np.moveaxis(hsv_HW3, -1, 0)

    def channel(offset: float) -> NDArray[np.float32]:
        k = (offset + hue / 60.0) % 6.0
        return value - value * saturation * np.clip(np.minimum(k, 4.0 - k), 0.0, 1.0)

    return np.stack([channel(5.0), channel(3.0), channel(1.0)], -1).astype(np.float32)


def names_HW(rgb_HW3: Image) -> NDArray[np.str_]:
    """The colour name of every pixel."""
    hue, saturation, value = np.moveaxis(hsv_from_rgb(rgb_HW3), -1, 0)
    names = np.full(hue.shape, "red", dtype="<U6")
    for name, start_deg in _HUE_STARTS_DEG:
        names[hue >= start_deg] = name
    warm = (hue < 41) | (hue >= 346)
    names[warm & (value < 0.68) & (value >= 0.2) & (hue >= 8) & (hue < 41)] = "brown"
    names[warm & (saturation < 0.55) & (value > 0.8) & ((hue < 14) | (hue >= 346))] = "pink"
    names[saturation < 0.16] = "grey"
    names[(saturation < 0.12) & (value > 0.88)] = "white"
    names[value < 0.22] = "black"
    return names


def dominant(rgb_HW3: Image, mask_HW: Mask) -> tuple[str, float]:
    """The most frequent colour name inside the mask and its share of the masked pixels; `("none", 0)` for no pixels."""
    if not mask_HW.any():
        return "none", 0.0
    names, counts = np.unique(names_HW(rgb_HW3)[mask_HW], return_counts=True)
    best = int(counts.argmax())
    return str(names[best]), float(counts[best] / counts.sum())


def shift_hue(rgb_HW3: Image, mask_HW: Mask, target: str) -> Image:
    """The picture with every hue turned by the angle that takes its mean chromatic hue to `target`.

    Yellow and orange read as brown when dark, so the value is raised for them.
    """
    hsv = hsv_from_rgb(rgb_HW3)
    weight = hsv[..., 1] * hsv[..., 2] * mask_HW
    angle = np.deg2rad(hsv[..., 0])
    mean_deg = np.rad2deg(np.arctan2((weight * np.sin(angle)).sum(), (weight * np.cos(angle)).sum()))
    hsv[..., 0] = (hsv[..., 0] + HUES_DEG[target] - mean_deg) % 360.0
    if target in ("yellow", "orange"):
        hsv[..., 2] = np.where(mask_HW, hsv[..., 2] ** 0.6, hsv[..., 2])
    shifted = rgb_from_hsv(hsv)
    return np.where(mask_HW[..., None], shifted, rgb_HW3).astype(np.float32)

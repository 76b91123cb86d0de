"""Warm-up until stable: when do images stop getting faster?"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

WINDOW, SLOW_WINDOW = 5, 1
"""Images per window; one where an image takes longer than `SLOW_MS`."""
SLOW_MS, VERY_SLOW_MS = 2000.0, 20_000.0
"""Of an image of a full-size model on a processor every one more costs a minute, and little is left to warm up."""
TOLERANCE = 0.02
"""Two successive windows whose medians differ by less are the same."""
MAX_WINDOWS, MAX_SLOW_WINDOWS = 12, 3
RULE = (
    f"windows of {WINDOW} images ({SLOW_WINDOW} where an image takes over {SLOW_MS / 1e3:g} s) are drawn until the "
    f"medians of two successive windows differ by less than {TOLERANCE:.0%}, or {MAX_WINDOWS} ({MAX_SLOW_WINDOWS}) are full; "
    f"where an image takes over {VERY_SLOW_MS / 1e3:g} s one image is drawn, and the process's first stands for a window"
)


@dataclass(frozen=True, kw_only=True)
class WarmUp:
    """How warming up ended."""

    num_images: int
    """The first image of the process is not one of them."""
    stable: bool
    """False: the cap was reached first, and times may still be falling or the machine is unsteady."""
    last_change: float
    """Relative difference between the medians of the last two windows."""
    last_ms: float
    """Median of the last window."""


def warm_up(draw: Callable[[int], Sequence[float]], first_image_ms: float) -> WarmUp:
    """Draw until stable.

    Args:
        draw: draws so many images and returns the milliseconds of each.
        first_image_ms: the process's first image, which says whether images are slow.
    """
    slow = first_image_ms > SLOW_MS
    window, cap = (SLOW_WINDOW, MAX_SLOW_WINDOWS) if slow else (WINDOW, MAX_WINDOWS)
    last, change = statistics.median(draw(window)), float("inf")
    if last > VERY_SLOW_MS:
        cap, change = 1, abs(last / first_image_ms - 1)
    num_windows = 1
    while num_windows < cap and change >= TOLERANCE:
        found = statistics.median(draw(window))
        num_windows += 1
        last, change = found, abs(found / last - 1)
    return WarmUp(num_images=num_windows * window, stable=change < TOLERANCE, last_change=change, last_ms=last)

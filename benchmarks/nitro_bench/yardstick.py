"""A fixed piece of work, timed beside the images: how fast was the machine just then?

Another load on the machine, a lower clock or a slower neighbour make it slower as they do the images, so two benchmarks of
different days can be told apart from two different machines.
"""

from __future__ import annotations

import hashlib
import os
import time
from dataclasses import dataclass

NUM_BYTES = 4 << 20
"""About three milliseconds of SHA-256: long for a clock, short beside an image."""
_BLOCK = bytes(NUM_BYTES)


@dataclass(frozen=True, kw_only=True)
class Yardstick:
    """One hash of 4 MiB on one core."""

    wall_ms: float
    cpu_ms: float
    """What the process got of a core for it."""


def measure() -> Yardstick:
    start_s, start_cpu_s = time.perf_counter(), time.thread_time()
    hashlib.sha256(_BLOCK).digest()
    return Yardstick(wall_ms=1e3 * (time.perf_counter() - start_s), cpu_ms=1e3 * (time.thread_time() - start_cpu_s))


def busy_cores() -> float:
    """The load average of the last minute."""
    return os.getloadavg()[0]

"""A fixed piece of work on every core, timed beside the images: how fast was the machine just then?

Another load on the machine, a lower clock or a slower neighbour make it slower as they do the images, so two benchmarks of
different hours can be told apart from two different programs. It must occupy all cores, and for several of the scheduler's
slices: three milliseconds on one core were found to go through undisturbed where images took thrice their time.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from dataclasses import dataclass

NUM_BYTES = 16 << 20
"""Per core; about ten milliseconds of SHA-256, during which Python holds no lock."""
_BLOCK = bytes(NUM_BYTES)


@dataclass(frozen=True, kw_only=True)
class Yardstick:
    """One hash of 16 MiB on each core at once."""

    wall_ms: float
    """Until the last of them ended."""
    cpu_ms: float
    """All of them together."""


def measure() -> Yardstick:
    threads = [threading.Thread(target=_work) for _ in os.sched_getaffinity(0)]
    start_s, start_cpu_s = time.perf_counter(), time.process_time()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return Yardstick(wall_ms=1e3 * (time.perf_counter() - start_s), cpu_ms=1e3 * (time.process_time() - start_cpu_s))


def _work() -> None:
    hashlib.sha256(_BLOCK).digest()

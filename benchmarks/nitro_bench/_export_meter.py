"""Time, processor time and peak memory between marks, in one process.

The kernel's own high-water mark of resident memory is used, and set back at each mark, so nothing is sampled and no peak is
missed. It counts mapped pages of files that are resident, too.
"""

from __future__ import annotations

import os
import resource
import time
from pathlib import Path
from typing import Any

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Meter:
    """Starts when it is made."""

    def __init__(self) -> None:
        self.marks: list[dict[str, Any]] = []
        self._first_s = time.perf_counter()
        self._begin()

    def mark(self, name: str) -> None:
        """End a span that is called `name`; the next one begins."""
        self.marks.append(
            {
                "name": name,
                "seconds": round(time.perf_counter() - self._wall_s, 3),
                "cpu_seconds": round(cpu_seconds() - self._cpu_s, 3),
                "peak_rss_bytes": peak_rss_bytes(),
            }
        )
        self._begin()

    def summary(self) -> dict[str, Any]:
        """All spans so far. The peak is this process's or, where a job runs processes of its own, the largest of them."""
        children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        return {
            "seconds": round(time.perf_counter() - self._first_s, 3),
            "cpu_seconds": round(sum(mark["cpu_seconds"] for mark in self.marks), 3),
            "peak_rss_bytes": max([children, *(mark["peak_rss_bytes"] for mark in self.marks)]),
            "marks": self.marks,
        }

    def _begin(self) -> None:
        _CLEAR.write_text("5")  # sets VmHWM to what is resident now: proc(5)
        self._wall_s, self._cpu_s = time.perf_counter(), cpu_seconds()


def cpu_seconds() -> float:
    """Of this process and of all that it has started and waited for."""
    times = os.times()
    return time.process_time() + times.children_user + times.children_system


def peak_rss_bytes() -> int:
    """Since the last mark, or since the start."""
    # VmHWM and not getrusage: ru_maxrss of a child starts at what its parent had when it forked, and cannot be set back.
    for line in _STATUS.read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM")


def disk_usage(folder: Path) -> dict[str, int]:
    """Bytes of a folder's files: all, and those that no other folder shares by a hard link."""
    stats = [path.stat() for path in folder.rglob("*") if path.is_file()]
    return {
        "num_bytes": sum(stat.st_size for stat in stats),
        "num_bytes_unshared": sum(stat.st_size for stat in stats if stat.st_nlink == 1),
    }

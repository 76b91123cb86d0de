"""The building machine's memory."""

from __future__ import annotations

from pathlib import Path


def available_bytes(root: Path = Path("/")) -> int:
    """Memory that new work may take: what the system calls available, or what is left of this cgroup's limit if less.

    Pages of files are not counted as taken: they are given up when memory is needed.
    """
    available = _kib(root / "proc/meminfo", "MemAvailable")
    group = root / "sys/fs/cgroup"
    try:
        limit, used = int((group / "memory.max").read_text()), int((group / "memory.current").read_text())
    except (OSError, ValueError):  # no cgroup, or "max"
        return available
    reclaimable = _words(group / "memory.stat").get("inactive_file", 0) + _words(group / "memory.stat").get("active_file", 0)
    return max(0, min(available, limit - used + reclaimable))


def total_bytes(root: Path = Path("/")) -> int:
    """Memory of this machine, or this cgroup's limit if less."""
    total = _kib(root / "proc/meminfo", "MemTotal")
    try:
        return min(total, int((root / "sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):
        return total


def _kib(path: Path, name: str) -> int:
    return _words(path).get(f"{name}:", 0) * 1024


def _words(path: Path) -> dict[str, int]:
    """Lines of a name and a number; empty where there is no such file."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    return {words[0]: int(words[1]) for words in map(str.split, lines) if len(words) >= 2 and words[1].isdigit()}

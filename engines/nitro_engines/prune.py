"""Removing from the cache what was not used for long, or what is too much; never what a build at work uses.

A build registers itself when it begins, and touches what it takes from the cache. While one is at work, only what was last
used before it began may go, each thing under its own lock, and files that nothing names stay until the next time: they may
just have been made. Bundles hold their own hard links, so they keep their files whatever goes here.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from nitro_engines.cache import EngineCache
from nitro_engines.files import Report, silent, storage_errors
from nitro_engines.inventory import DAMAGED, Item, contents, files_in, inventory, unique_bytes, unnamed_files


@dataclass(frozen=True, kw_only=True)
class Pruned:
    """What went, or would go."""

    items: tuple[Item, ...]
    files: tuple[Path, ...]
    """That nothing names."""
    freed_bytes: int
    """On the cache's disk: files that a bundle or a checkpoint shares free nothing."""
    kept_bytes: int
    """What is left in the cache."""
    busy: tuple[str, ...]
    """What would have gone, and why it stays."""


def prune(
    cache: EngineCache,
    *,
    older_than_s: float | None = None,
    max_bytes: int | None = None,
    dry_run: bool = False,
    report: Report = silent,
    now: float | None = None,
) -> Pruned:
    """Remove things of the cache, the longest unused first, and files that nothing names.

    Args:
        older_than_s: what was not used for so many seconds goes.
        max_bytes: as much goes as is needed for the rest to have no more than this.
        dry_run: only say what would go.
        now: seconds since 1970; None: the clock's.
    Raises: BuildError if something cannot be removed.
    """
    now = time.time() if now is None else now
    with cache.pruning(report) as running_since, storage_errors("pruning the cache", cache.root):
        if not dry_run:
            cache.sweep(report)
        items = inventory(cache)
        waste = _Waste(cache, running_since, dry_run)
        gone = [item for item in _chosen(items, now, older_than_s, max_bytes) if waste.take(item)]
        left = [item for item in items if item not in gone]
        files = waste.take_unnamed(unnamed_files(cache, left))
        return Pruned(
            items=tuple(gone),
            files=tuple(files),
            freed_bytes=waste.freed_bytes(),
            kept_bytes=unique_bytes(path for item in left for path in item.paths),
            busy=tuple(waste.busy),
        )


def _chosen(items: Sequence[Item], now: float, older_than_s: float | None, max_bytes: int | None) -> list[Item]:
    """What is to go, the longest unused first."""
    lost = [item for item in items if item.what == DAMAGED]
    old = [item for item in items if older_than_s is not None and now - item.used_at > older_than_s and item not in lost]
    kept = [item for item in items if item not in lost and item not in old]
    if max_bytes is None:
        return lost + old
    found = [contents(item.paths) for item in kept]
    names = Counter(inode for content in found for inode in content)
    total = sum({inode: facts.st_size for content in found for inode, facts in content.items()}.values())
    too_much = []
    for item, content in zip(kept, found, strict=True):
        if total <= max_bytes:
            break
        too_much.append(item)
        names.subtract(content.keys())
        total -= sum(facts.st_size for inode, facts in content.items() if names[inode] == 0)
    return lost + old + too_much


class _Waste:
    """Takes things out of the cache, and counts what that frees."""

    def __init__(self, cache: EngineCache, running_since: float | None, dry_run: bool) -> None:
        self._cache, self._running_since, self._dry_run = cache, running_since, dry_run
        self._going: dict[tuple[int, int], tuple[os.stat_result, int]] = {}
        """By number on disk: a content, and how many of its names go."""
        self.busy: list[str] = []

    def take(self, item: Item) -> bool:
        """Remove the item, but for files that others may name, unless a build holds or has just used it."""
        with self._held(item) as is_held:
            if not is_held:
                self.busy.append(f"{item.kind} {item.key[:12]}: a build is making or reading it")
                return False
            used_at = item.head.stat().st_mtime if item.head.exists() else 0.0
            if self._running_since is not None and used_at >= self._running_since:
                self.busy.append(f"{item.kind} {item.key[:12]}: a build at work uses it")
                return False
            self._remove(item.head)  # first: without it, the rest is not found any more
            for path in item.paths:
                if path.is_dir():
                    self._remove(path)
        return True

    def take_unnamed(self, files: Sequence[Path]) -> Sequence[Path]:
        """Remove files that no item names any more. Returns: those that went."""
        if files and self._running_since is not None:
            self.busy.append(f"{len(files)} files that nothing names: a build is at work, which may just have made them")
            return ()
        for path in files:
            self._remove(path)
        return files

    def freed_bytes(self) -> int:
        """Bytes of the contents of which the last name went."""
        return sum(facts.st_size for facts, count in self._going.values() if count >= facts.st_nlink)

    def _remove(self, path: Path) -> None:
        for file in files_in(path):
            with contextlib.suppress(OSError):
                facts = file.stat(follow_symlinks=False)
                inode = facts.st_dev, facts.st_ino
                first, count = self._going.get(inode, (facts, 0))
                self._going[inode] = first, count + 1
        if self._dry_run:
            return
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    @contextmanager
    def _held(self, item: Item) -> Iterator[bool]:
        """Hold the item's lock, if nobody else does; its file goes with it."""
        path = self._cache.lock_file(item.lock)
        lock = FileLock(path)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            path.unlink(missing_ok=True)
            lock.release()

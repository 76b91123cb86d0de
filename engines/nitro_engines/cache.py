"""The cache of engines and graphs: a small JSON entry per key, files by content, one lock per key.

    engines/entries/<key>.json      what was built, and from which fields
    engines/files/<sha256>.<ext>    engine and tokenizer files; bundles hold hard links to them
    graphs/<key>/                   exported checkpoints
    builds/<engine key>.json        the fields of bundles built before, for --explain
    models/<key>/                   checkpoints assembled from parts; what users put there has names of its own
    references/<key>.json           pictures that float32 parents drew; the PNGs lie in engines/files
    recipes/<key>.json              what calibrations measured
    gates/<key>.json                what the quality gate measured
    speeds/<key>.json               what the speed gate measured
    durations/, timings/<key>.json  what earlier compilations left for the next
    work/<key>/                     what is being made; whoever holds the key's lock owns it
    locks/<key>.lock
    locks/running/<id>.lock         a build that is at work, since the file's time

The root is `<user cache>/nitro-rt`; the environment variable NITRO_RT_CACHE overrides it. Nothing here is precious:
all of it may be deleted while no build runs, and what is damaged is noticed by its digest and made again. What is used is
touched, so that `nitro_engines.prune` knows what is not.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs
from filelock import FileLock, Timeout

from nitro_engines.files import Report, fsync, locked, silent, storage_errors, write_durably
from nitro_engines.keys import Fields, key_of
from nitro_rt.errors import BundleError
from nitro_rt.manifest import SCHEMA_VERSION, Engine, FileRef, check_file, from_json, resolve, sha256_of, to_json

CACHE_VARIABLE = "NITRO_RT_CACHE"


@dataclass(frozen=True, kw_only=True)
class CacheEntry:
    """One cached engine."""

    schema_version: int
    fields: Fields
    """Everything that decides the engine; their digest is `engine.key`."""
    engine: Engine


def default_cache_root() -> Path:
    """NITRO_RT_CACHE, or the user's cache folder."""
    chosen = os.environ.get(CACHE_VARIABLE)
    return Path(chosen).expanduser().absolute() if chosen else Path(platformdirs.user_cache_path("nitro-rt"))


def touch(path: Path) -> None:
    """Note that something of the cache is used. Where that cannot be written, it stays as it was."""
    with contextlib.suppress(OSError):
        os.utime(path)


class EngineCache:
    """Engines by key and files by content, safe for several builders at once.

    Raises (all methods): BuildError if the folder cannot be written or the disk is full.
    """

    def __init__(self, root: Path | None = None) -> None:
        self.root = Path(root).absolute() if root else default_cache_root()
        self.engines = self.root / "engines"
        self.graphs = self.root / "graphs"
        self._entries = self.engines / "entries"
        self._files = self.engines / "files"
        self._builds = self.root / "builds"
        self._work = self.root / "work"
        self._locks = self.root / "locks"
        self._running = self._locks / "running"

    @contextmanager
    def making(self, key: str, what: str, report: Report = silent) -> Iterator[Path]:
        """Hold the lock of `key` and yield an empty folder of this cache's file system; it is gone afterwards.

        A second builder of the same key waits here and should look into the cache again when it gets in.
        """
        folder = self._work / key
        with storage_errors("preparing the cache", self.root):
            for needed in (self._entries, self._files, self.graphs, self._builds, self._work, self._locks):
                needed.mkdir(parents=True, exist_ok=True)
        with locked(self.lock_file(key), f"another build is making {what}; waiting for it", report):
            with storage_errors("preparing the cache", folder):
                if folder.exists():
                    shutil.rmtree(folder)
                folder.mkdir()
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)

    @contextmanager
    def in_use(self, report: Report = silent) -> Iterator[None]:
        """Let nothing be pruned that is used from now on: for the whole of a build."""
        with storage_errors("preparing the cache", self.root):
            self._running.mkdir(parents=True, exist_ok=True)
        marker = FileLock(self._running / f"{os.getpid()}-{uuid.uuid4().hex}.lock")
        with self._pruning_lock(report):
            marker.acquire()
        try:
            yield
        finally:
            Path(marker.lock_file).unlink(missing_ok=True)
            marker.release()

    @contextmanager
    def pruning(self, report: Report = silent) -> Iterator[float | None]:
        """Keep builds from beginning, and yield the time since which the oldest that is at work runs; None: none is."""
        with self._pruning_lock(report):
            yield min(self._running_since(), default=None)

    def _pruning_lock(self, report: Report) -> contextlib.AbstractContextManager[FileLock]:
        with storage_errors("preparing the cache", self.root):
            self._locks.mkdir(parents=True, exist_ok=True)
        return locked(self.lock_file("pruning"), "the cache is being pruned; waiting for it", report)

    def _running_since(self) -> Iterator[float]:
        for path in sorted(self._running.glob("*.lock")):
            lock = FileLock(path)
            try:
                started = path.stat().st_mtime
                lock.acquire(timeout=0)
            except Timeout:
                yield started
            except OSError:
                continue  # it has just ended
            else:
                path.unlink(missing_ok=True)  # of a build that was killed
                lock.release()

    def sweep(self, report: Report = silent) -> None:
        """Remove what killed builders left: a work folder whose lock is free has no owner."""
        if not self._work.is_dir():
            return
        for folder in sorted(self._work.iterdir()):
            lock = FileLock(self.lock_file(folder.name))
            try:
                lock.acquire(timeout=0)
            except Timeout:
                continue
            try:
                if folder.exists():
                    report(f"removing what a build that was cut short left in {folder}")
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                lock.release()

    def find(self, key: str, report: Report = silent) -> Engine | None:
        """The engine of `key` with every file's digest checked; None if it is not cached or was damaged.

        What is damaged is removed, and `report` says so.
        """
        path = self._entries / f"{key}.json"
        if not path.is_file():
            return None
        try:
            entry = self._read(path)
            if entry.engine.key != key or key_of(entry.fields) != key:
                raise BundleError(f"{path} is of another key")
        except BundleError as exc:
            report(f"the cached engine {key[:12]} is damaged and is built again: {exc}")
            path.unlink(missing_ok=True)
            return None
        damage = [message for message in map(self._damage, entry.engine.files) if message]
        if damage:
            report(f"the cached engine {key[:12]} is damaged and is built again: {damage[0]}")
            path.unlink(missing_ok=True)
            return None
        touch(path)
        return entry.engine

    def entry(self, key: str) -> Engine | None:
        """The engine of `key` as its entry says, whatever became of its files; None if there is no readable entry."""
        try:
            return self._read(self._entries / f"{key}.json").engine
        except BundleError:
            return None

    def has(self, key: str) -> bool:
        """Whether an entry exists and its files have their sizes; digests are compared only by `find`."""
        path = self._entries / f"{key}.json"
        try:
            entry = self._read(path) if path.is_file() else None
            return entry is not None and all(self.path(ref).stat().st_size == ref.num_bytes for ref in entry.engine.files)
        except (BundleError, OSError):
            return False

    def adopt(self, path: Path) -> FileRef:
        """Move a finished file of a work folder into the cache, named by its content; the extension stays."""
        with storage_errors("storing an engine file", path):
            fsync(path)
            digest = sha256_of(path)
            reference = FileRef(path=f"files/{digest}{path.suffix}", sha256=digest, num_bytes=path.stat().st_size)
            os.replace(path, self.path(reference))
            fsync(self._files)
        return reference

    def store(self, engine: Engine, fields: Fields, work: Path) -> None:
        """Publish the entry of an engine whose files were adopted."""
        assert key_of(fields) == engine.key
        entry = CacheEntry(schema_version=SCHEMA_VERSION, fields=fields, engine=engine)
        self._publish(self._entries / f"{engine.key}.json", to_json(entry), work)

    def find_record(self, kind: str, key: str) -> Any:
        """The JSON of `<kind>/<key>.json`; None if there is none, or it cannot be read."""
        path = self.root / kind / f"{key}.json"
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        touch(path)
        return record

    def store_record(self, kind: str, key: str, value: object, work: Path) -> None:
        """Publish a small JSON record, whole."""
        with storage_errors("preparing the cache", self.root):
            (self.root / kind).mkdir(exist_ok=True)
        self._publish(self.root / kind / f"{key}.json", json.dumps(value, indent=2, sort_keys=True) + "\n", work)

    def lock_file(self, name: str) -> Path:
        return self._locks / f"{name}.lock"

    def path(self, reference: FileRef) -> Path:
        """Where a file of the cache is. Raises: BundleError if an edited entry points outside."""
        return resolve(self.engines, reference)

    def remember_build(self, key: str, fields: Fields, work: Path) -> None:
        self._publish(self._builds / f"{key}.json", json.dumps(fields, indent=2, sort_keys=True) + "\n", work)

    def known_builds(self) -> dict[str, Fields]:
        """The fields of every bundle built with this cache, by engine key; unreadable records are left out."""
        builds: dict[str, Fields] = {}
        for path in sorted(self._builds.glob("*.json")) if self._builds.is_dir() else ():
            try:
                fields = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                continue
            if isinstance(fields, dict) and key_of(fields) == path.stem:
                builds[path.stem] = fields
        return builds

    def _read(self, path: Path) -> CacheEntry:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as exc:
            raise BundleError(f"{path} cannot be read: {exc}") from exc
        return from_json(CacheEntry, text, where=str(path))

    def _damage(self, reference: FileRef) -> str | None:
        try:
            check_file(self.engines, reference)
        except (BundleError, OSError) as exc:
            try:
                # A new file will take its place. Bundles that share this one keep theirs, and `verify` tells them.
                self.path(reference).unlink(missing_ok=True)
            except BundleError:
                pass
            return str(exc)
        return None

    def _publish(self, target: Path, text: str, work: Path) -> None:
        with storage_errors("writing a cache entry", target):
            prepared = work / target.name
            write_durably(prepared, text)
            os.replace(prepared, target)
            fsync(target.parent)

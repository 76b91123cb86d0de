"""What earlier compilations left for the next: how long they took, and the timing caches that TensorRT chose kernels by."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nitro_engines.backends import Backend
from nitro_engines.backends.base import SEED_TIMING, TIMING_SUFFIX
from nitro_engines.cache import EngineCache
from nitro_engines.files import Report, link_or_copy, silent, storage_errors
from nitro_engines.keys import Fields, key_of
from nitro_rt.errors import BundleError
from nitro_rt.manifest import BUNDLE_FILE, BundleManifest, Engine, FileRef, Graph, check_file, from_json

DURATIONS, TIMINGS = "durations", "timings"
"""Kinds of records in the cache."""


def expected_seconds(backend: Backend, stage: str, graph: Graph, cache: EngineCache) -> float | None:
    """How long compiling this graph will take: what the last of this kind of stage took, by the sizes of the graphs.

    A graph's bytes, its weights beside it, grow with its operators, which is what a compiler's time goes by: TensorRT-RTX
    took 5 to 12 ms for each. None where none was compiled yet.
    """
    record = cache.find_record(DURATIONS, _duration_key(backend, stage))
    try:
        return float(record["seconds"]) * graph.files[0].num_bytes / float(record["graph_bytes"])
    except (TypeError, KeyError, ValueError, ZeroDivisionError):
        return None  # none, or damaged


def remember_seconds(backend: Backend, stage: str, graph: Graph, seconds: float, cache: EngineCache, work: Path) -> None:
    value = {"seconds": round(seconds, 3), "graph_bytes": graph.files[0].num_bytes}
    cache.store_record(DURATIONS, _duration_key(backend, stage), value, work)


def seed_timing(key: str, backend: Backend, published: Path | None, cache: EngineCache, work: Path) -> None:
    """Put the timing cache to begin with into `work`: this very engine's own, else the newest for this GPU and toolchain.

    Args:
        key: of the engine.
        published: the folder of a bundle that may hold this engine, pinned with its timing cache.
    """
    for folder, reference in _candidates(key, backend, published, cache):
        try:
            source = check_file(folder, reference)
        except (BundleError, OSError):
            continue
        with storage_errors("taking a timing cache", work):
            link_or_copy(source, work / SEED_TIMING)
        return


def remember_timing(engine: Engine, backend: Backend, cache: EngineCache, report: Report = silent) -> None:
    """Let the engine's timing cache be the newest for this GPU and toolchain. (It holds what it began with, too.)"""
    reference = timing_of(engine)
    if reference is None:
        return
    key = _machine_key(backend)
    with cache.making(key, "the record of a timing cache", report) as work:
        cache.store_record(TIMINGS, key, {"file": dataclasses.asdict(reference)}, work)


def timing_of(engine: Engine) -> FileRef | None:
    """The engine's timing cache, if its backend times kernels."""
    return next((reference for reference in engine.files if reference.path.endswith(TIMING_SUFFIX)), None)


def running_files(engine: Engine) -> tuple[FileRef, ...]:
    """What the engine runs with: all but its timing cache."""
    return tuple(reference for reference in engine.files if not reference.path.endswith(TIMING_SUFFIX))


def _candidates(key: str, backend: Backend, published: Path | None, cache: EngineCache) -> Iterable[tuple[Path, FileRef]]:
    cached = cache.entry(key)
    if cached is not None and (reference := timing_of(cached)) is not None:
        yield cache.engines, reference
    for engine in _published(published):
        if engine.key == key and (reference := timing_of(engine)) is not None:
            assert published is not None
            yield published, reference
    record = cache.find_record(TIMINGS, _machine_key(backend))
    try:
        yield cache.engines, FileRef(**record["file"])
    except (TypeError, KeyError):
        return  # none, or damaged


def _published(folder: Path | None) -> tuple[Engine, ...]:
    """The engines of a bundle; none where there is no readable one."""
    try:
        text = ((folder or Path()) / BUNDLE_FILE).read_text(encoding="utf-8")
        manifest = from_json(BundleManifest, text, where=str(folder))
    except (OSError, UnicodeDecodeError, BundleError):
        return ()
    sized = [engine for more in manifest.more_sizes.values() for engine in (*more.denoise.values(), more.decode)]
    return (manifest.text, *manifest.denoise.values(), manifest.decode, *sized)


def _duration_key(backend: Backend, stage: str) -> str:
    return key_of({**_machine(backend), "stage": stage.partition("/")[0]})


def _machine_key(backend: Backend) -> str:
    return key_of(_machine(backend))


def _machine(backend: Backend) -> Fields:
    fields: dict[str, Any] = {"backend": backend.name, "toolchain": backend.toolchain(), "target": backend.target()}
    return fields

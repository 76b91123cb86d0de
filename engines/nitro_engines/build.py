"""The whole job of `nitro-rt build`: checkpoint -> graphs -> engines -> bundle, each step cached by what decides it."""

from __future__ import annotations

import dataclasses
import os
import shutil
import time
from pathlib import Path

from nitro_engines.bundle import BuildResult, bundle_from_graphs, read_graphs
from nitro_engines.cache import EngineCache
from nitro_engines.files import Report, foreign_errors, fsync, silent, storage_errors
from nitro_engines.plan import Preparation, prepare_build
from nitro_engines.publish import prepare
from nitro_engines.request import BuildRequest
from nitro_rt.errors import BundleError


def build(request: BuildRequest, report: Report = silent, cache: EngineCache | None = None) -> BuildResult:
    """Build the bundle that `request` asks for and publish it at its output folder.

    Killed at any moment, the bundle is whole or absent and the next build recovers. Two builds of the same at once do
    the work once: the second waits, and takes it from the cache.

    Args:
        report: takes one line per step done.
        cache: None for the user's.
    Raises: ConfigError, ModelNotFound, ExportError, BackendUnavailable, BuildError.
    """
    cache = cache or EngineCache()
    prepared = prepare_build(request)
    assert prepared.request.out is not None
    out = prepare(prepared.request.out, report)
    cache.sweep(report)
    for note in prepared.source.notes:
        report(note)
    if prepared.source.licence:
        report(f"licence: {prepared.source.licence}")
    started = time.perf_counter()
    graphs, exported = _graphs(prepared, cache, report)
    seconds = {"export": round(time.perf_counter() - started, 3)} if exported else {}
    result = bundle_from_graphs(graphs, out, prepared.backend, cache, report)
    return dataclasses.replace(result, seconds={**seconds, **result.seconds})


def _graphs(prepared: Preparation, cache: EngineCache, report: Report) -> tuple[Path, bool]:
    """The folder of exported graphs, and whether it was exported now."""
    folder = cache.graphs / prepared.graphs_key
    with cache.making(prepared.graphs_key, "these graphs", report) as work:
        if folder.is_dir():
            try:
                read_graphs(folder)
                report(f"graphs of {prepared.source.name} from the cache")
                return folder, False
            except BundleError as exc:
                report(f"the cached graphs {prepared.graphs_key[:12]} are damaged and are exported again: {exc}")
                with storage_errors("removing damaged graphs", folder):
                    shutil.rmtree(folder)
        _export(prepared, work / "graphs", report)
        with storage_errors("storing the graphs", folder):
            for path in sorted((work / "graphs").rglob("*")):
                fsync(path)
            os.replace(work / "graphs", folder)
            fsync(folder.parent)
        return folder, True


def _export(prepared: Preparation, out: Path, report: Report) -> None:
    from nitro_export import export_checkpoint

    request = prepared.request
    checkpoint = prepared.source.assemble(report)
    with foreign_errors(f"exporting {prepared.source.name}", out.parent):
        export_checkpoint(
            checkpoint,
            out,
            steps=request.steps,
            shift=request.shift,
            precision=request.precision,
            size_px=request.size_px,
            batch=request.batch,
            name=prepared.source.name,
            origin=prepared.source.origin,
            licence=prepared.source.licence,
            report=lambda line: report(line.replace(str(out), "the cache")),  # where it is written is no place to look
        )

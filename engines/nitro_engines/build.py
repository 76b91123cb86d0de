"""The whole job of `nitro-rt build`: checkpoint -> graphs -> engines -> bundle, each step cached by what decides it."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from nitro_engines.bundle import BuildResult, bundle_from_graphs, engines_from_graphs
from nitro_engines.cache import EngineCache, touch
from nitro_engines.files import Report, foreign_errors, fsync, link_or_copy, silent, storage_errors
from nitro_engines.gate import Gate, QualityMissed
from nitro_engines.graphs import read_graphs
from nitro_engines.plan import Preparation, cached_graphs, forecast, prepare_build, require_room
from nitro_engines.publish import prepare
from nitro_engines.quantisation import recipe_of, worst_operators
from nitro_engines.request import AUTO, BuildRequest
from nitro_engines.speed import (
    FLOAT_PRECISIONS,
    QUANTISED_FOR_AUTO,
    combinations,
    compare_stages,
    final_results,
    not_measured,
    require_measurable,
)
from nitro_rt.errors import BundleError, ModelNotFound
from nitro_rt.manifest import EXPORT_FILE, sha256_of

_WEIGHTS = re.compile(r"[0-9a-f]{64}\.(safetensors|data)")
"""Names of weight files of graphs."""


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
    if request.precision == AUTO:
        return _build_fastest(request, report, cache)
    prepared, out = _prepared(request, report, cache)
    with cache.in_use(report):
        return _build(prepared, out, report, cache)


def _build(prepared: Preparation, out: Path, report: Report, cache: EngineCache) -> BuildResult:
    started = time.perf_counter()
    made = [_graphs(prepared, size_px, cache, report) for size_px in prepared.request.sizes_px]
    seconds = {"export": round(time.perf_counter() - started, 3)} if any(exported for _, exported in made) else {}
    graphs, *more_sizes = (folder for folder, _ in made)
    try:
        result = bundle_from_graphs(
            graphs,
            out,
            prepared.backend,
            cache,
            report,
            more_sizes=more_sizes,
            gate=_gate(prepared, report),
            rebuild=prepared.request.rebuild,
        )
    except QualityMissed as exc:
        if prepared.quantisation is None:
            raise
        raise QualityMissed(f"{exc}. {worst_operators(prepared.source.assemble(report), graphs, report)}") from exc
    if prepared.quantisation is not None:
        _remark(prepared, graphs, result, report)
    return dataclasses.replace(result, seconds={**seconds, **result.seconds})


def _remark(prepared: Preparation, graphs: Path, result: BuildResult, report: Report) -> None:
    """What a user should know of a quantised bundle: what lost most where a loss was allowed, and that nothing was timed."""
    if result.published and any(entry.loss_allowed for entry in result.manifest.quality_gate):
        report(worst_operators(prepared.source.assemble(report), graphs, report))
    report(not_measured(prepared.request.precision, prepared.request.backend, prepared.request.provider))


def _build_fastest(request: BuildRequest, report: Report, cache: EngineCache) -> BuildResult:
    """Each stage in int8 or in the best float precision, whichever is faster here, as far as the bundle passes its gate.

    Raises: also ConfigError for engines that cannot be timed here.
    """
    require_measurable(request.backend, request.provider)
    parent, out = _prepared(dataclasses.replace(request, precision=FLOAT_PRECISIONS[request.backend]), report, cache)
    quantised = prepare_build(dataclasses.replace(request, precision=QUANTISED_FOR_AUTO))
    require_room(forecast(quantised, cache, cached_graphs(quantised, cache)))
    with cache.in_use(report):
        return _fastest(parent, quantised, out, report, cache)


def _fastest(parent: Preparation, quantised: Preparation, out: Path, report: Report, cache: EngineCache) -> BuildResult:
    started = time.perf_counter()
    (size_px,) = parent.request.sizes_px
    folders = [_graphs(prepared, size_px, cache, report)[0] for prepared in (parent, quantised)]
    engines = [engines_from_graphs(folder, parent.backend, cache, report) for folder in folders]
    results = compare_stages(engines[1], engines[0], cache, report)
    seconds = {"candidates": round(time.perf_counter() - started, 3)}

    def publish(stages: tuple[str, ...]) -> BuildResult:
        kinds = {stage.partition("/")[0] for stage in stages}
        if "denoise" in kinds:
            kinds.add("text")  # its outputs have the number type that the denoiser reads
        stages_from = {stage: folders[1] for stage in engines[0] if stage.partition("/")[0] in kinds}
        chosen, gate = final_results(results, stages), _gate(parent, report)
        report("trying " + ", ".join(f"{result.stage.partition('/')[0]} in {result.chosen}" for result in chosen))
        built = bundle_from_graphs(
            folders[0],
            out,
            parent.backend,
            cache,
            report,
            gate=gate,
            stages_from=stages_from,
            speed_gate=chosen,
            rebuild=parent.request.rebuild,
        )
        return dataclasses.replace(built, seconds={**seconds, **built.seconds})

    *faster, floats = combinations(results)
    for stages in faster:
        try:
            return publish(stages)
        except QualityMissed as exc:
            report(f"not chosen: {exc}")
    return publish(floats)


def _prepared(request: BuildRequest, report: Report, cache: EngineCache) -> tuple[Preparation, Path]:
    """The preparation and the output folder, once both are known to do."""
    prepared = prepare_build(request)
    require_room(forecast(prepared, cache, cached_graphs(prepared, cache)))
    assert prepared.request.out is not None
    out = prepare(prepared.request.out, report)
    cache.sweep(report)
    for note in prepared.source.notes:
        report(note)
    if prepared.source.licence:
        report(f"licence: {prepared.source.licence}")
    return prepared, out


def _gate(prepared: Preparation, report: Report) -> Gate:
    return Gate(
        checkpoint=lambda: prepared.source.assemble(report),
        num_prompts=prepared.request.gate_prompts,
        allow_quality_loss=prepared.request.allow_quality_loss,
    )


def _graphs(prepared: Preparation, size_px: int, cache: EngineCache, report: Report) -> tuple[Path, bool]:
    """The folder of graphs of one size to build from, and whether it was made now."""
    at = f" at {size_px} px" if len(prepared.request.sizes_px) > 1 else ""
    if at:
        report(f"graphs{at}:")

    def exported() -> tuple[Path, bool]:
        make = functools.partial(_export, prepared, size_px, report=report)
        return _kept(prepared.float_key(size_px), f"graphs{at}", make, cache, report)

    if prepared.quantisation is None:
        return exported()
    key, precision = prepared.graphs_key(size_px), prepared.quantisation.precision
    if _whole(cache.graphs / key):
        touch(cache.graphs / key / EXPORT_FILE)
        report(f"graphs{at} in {precision} of {prepared.source.name} from the cache")
        return cache.graphs / key, False
    make = functools.partial(_quantise, prepared, size_px, exported()[0], cache=cache, report=report)
    return _kept(key, f"graphs{at} in {precision}", make, cache, report)


def _kept(key: str, what: str, make: Callable[[Path], None], cache: EngineCache, report: Report) -> tuple[Path, bool]:
    """The cache's folder of graphs with this key, and whether `make` had to write it now."""
    folder = cache.graphs / key
    with cache.making(key, f"these {what}", report) as work:
        if folder.is_dir():
            try:
                read_graphs(folder)
                touch(folder / EXPORT_FILE)
                report(f"{what} from the cache")
                return folder, False
            except BundleError as exc:
                report(f"the cached {what} {key[:12]} are damaged and are made again: {exc}")
                with storage_errors("removing damaged graphs", folder):
                    shutil.rmtree(folder)
        make(work / "graphs")
        with storage_errors("storing the graphs", folder):
            _share_weights(work / "graphs", cache.graphs)
            for path in sorted((work / "graphs").rglob("*")):
                fsync(path)
            os.replace(work / "graphs", folder)
            fsync(folder.parent)
        return folder, True


def _share_weights(folder: Path, others: Path) -> None:
    """Hard links instead of weight files that graphs in the cache have already: other sizes, steps and batches of one
    checkpoint have the same weights. Their names are their digests."""
    for path in sorted(folder.iterdir()):
        if not _WEIGHTS.fullmatch(path.name):
            continue
        known = (other for other in others.glob(f"*/{path.name}") if not other.samefile(path))
        same = next((other for other in known if other.stat().st_size == path.stat().st_size), None)
        if same is not None and sha256_of(same) == path.stem:
            link = path.with_name(f"{path.name}.link")
            if link_or_copy(same, link):
                os.replace(link, path)
            else:
                link.unlink()


def _whole(folder: Path) -> bool:
    try:
        read_graphs(folder)
    except (ModelNotFound, BundleError):
        return False  # absent or damaged
    return True


def _quantise(prepared: Preparation, size_px: int, exported: Path, out: Path, *, cache: EngineCache, report: Report) -> None:
    from nitro_export.quantise import quantise_graphs

    assert prepared.quantisation is not None
    checkpoint = prepared.source.assemble(report)
    with foreign_errors(f"quantising {prepared.source.name}", out.parent):
        recipe = recipe_of(prepared.quantisation, prepared.float_fields[size_px], checkpoint, cache, report)
        quantise_graphs(exported, out, recipe, report=_without(out, report))


def _export(prepared: Preparation, size_px: int, out: Path, *, report: Report) -> None:
    from nitro_export import export_checkpoint

    request = prepared.request
    checkpoint = prepared.source.assemble(report)
    with foreign_errors(f"exporting {prepared.source.name}", out.parent):
        export_checkpoint(
            checkpoint,
            out,
            steps=request.steps,
            shift=request.shift,
            precision=prepared.float_fields[size_px]["precision"],
            size_px=size_px,
            batch=request.batch,
            name=prepared.source.name,
            origin=prepared.source.origin,
            licence=prepared.source.licence,
            report=_without(out, report),
        )


def _without(out: Path, report: Report) -> Report:
    """Says "the cache" for the folder that is written: it will have moved when somebody looks."""
    return lambda line: report(line.replace(str(out), "the cache"))

"""A graphs folder becomes a bundle: every stage's engine from the cache or compiled, then one publication."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import MappingProxyType

import numpy as np

from nitro_engines.backends import Backend, load_backend
from nitro_engines.cache import EngineCache
from nitro_engines.engines import Builder
from nitro_engines.fields import bundle_fields, sizes_of
from nitro_engines.files import Report, link_or_copy, silent, storage_errors
from nitro_engines.gate import Gate
from nitro_engines.graphs import Part, parts_of, read_graphs, sized_stage
from nitro_engines.history import running_files
from nitro_engines.keys import key_of
from nitro_engines.publish import engines_of, files_of, prepare, publish_bundle
from nitro_rt.manifest import (
    SCHEMA_VERSION,
    BundleManifest,
    Engine,
    FileRef,
    MemoryPlan,
    SizeEngines,
    SpeedResult,
    TokenizerSpec,
    check_file,
    sealed,
)


@dataclass(frozen=True, kw_only=True)
class BuildResult:
    """What a build did."""

    out: Path
    manifest: BundleManifest
    stages: dict[str, str]
    """Stage (`text`, `denoise/1`, `decode`, `decode@1024`) -> `built` or `cached`; with `rebuild`, `identical` or `different`
    where it was cached and was built again."""
    published: bool
    """False: exactly this bundle stood there already and was left alone."""
    seconds: dict[str, float]
    """Wall time by part: `export` (absent where none was needed), each stage, `publish`."""


def build_bundle(
    graphs: Path,
    out: Path,
    *,
    backend: str,
    targets: Sequence[str] = (),
    cache: EngineCache | None = None,
    report: Report = silent,
) -> BundleManifest:
    """Build the engines of an exported checkpoint and publish them as a bundle.

    Args:
        graphs: a folder of `nitro_export.export_checkpoint`.
        out: the bundle's folder; an older bundle there is replaced, anything else is refused.
        backend: openvino, onnxruntime, tensorrt or tensorrt-rtx.
        targets: GPU architectures for tensorrt-rtx.
        cache: where engines are kept; None for the user's.
    Raises: ConfigError, BackendUnavailable, ModelNotFound, BundleError, BuildError. `out` is then as it was before.
    """
    return bundle_from_graphs(graphs, out, load_backend(backend, targets), cache or EngineCache(), report).manifest


def bundle_from_graphs(
    graphs: Path,
    out: Path,
    backend: Backend,
    cache: EngineCache,
    report: Report = silent,
    *,
    more_sizes: Sequence[Path] = (),
    gate: Gate | None = None,
    stages_from: Mapping[str, Path] = MappingProxyType({}),
    speed_gate: tuple[SpeedResult, ...] = (),
    rebuild: bool = False,
) -> BuildResult:
    """`build_bundle` with a loaded backend.

    Args:
        more_sizes: graphs of the same checkpoint at further sizes, for the same bundle.
        gate: judges the bundle before it is published; None where the checkpoint of the graphs is not at hand.
        stages_from: stage -> another folder of graphs of the same checkpoint, in another precision, that it is taken from.
        speed_gate: why they are taken from there, for the manifest.
        rebuild: compile what is cached, too, and report whether the same comes out.
    Raises: also BuildError if the bundle misses its quality limits.
    """
    parts = parts_of((graphs, *more_sizes), stages_from)
    for part in parts.values():
        backend.compute_dtype(part.graph.compute_dtype)  # refuses what cannot be built, before anything is written
    out = prepare(out, report)
    with cache.in_use(report):
        return _built(
            (graphs, *more_sizes), parts, out, backend, cache, report, gate=gate, speed_gate=speed_gate, rebuild=rebuild
        )


def _built(
    folders: Sequence[Path],
    parts: Mapping[str, Part],
    out: Path,
    backend: Backend,
    cache: EngineCache,
    report: Report,
    *,
    gate: Gate | None,
    speed_gate: tuple[SpeedResult, ...],
    rebuild: bool,
) -> BuildResult:
    cache.sweep(report)
    started = time.perf_counter()
    references = gate.references([read_graphs(folder) for folder in folders], cache, report) if gate else ()
    seconds = {"references": round(time.perf_counter() - started, 3)} if gate else {}
    built = Builder(backend=backend, cache=cache, report=report, rebuild=rebuild, published=out).build(parts)
    bundle = _manifest(parts, built.engines, _tokenizers(folders[0], cache, report), backend)
    bundle = dataclasses.replace(bundle, references=references, speed_gate=speed_gate)
    bundle = dataclasses.replace(bundle, memory_plan=memory_plan(bundle))
    seconds |= built.seconds
    if gate:
        started = time.perf_counter()
        on_other = Builder(backend=backend, cache=cache, report=report)
        bundle = gate.judged(
            bundle, lambda other: dataclasses.replace(on_other, backend=other).build(parts).engines, cache, report
        )
        seconds["quality gate"] = round(time.perf_counter() - started, 3)
    bundle = sealed(bundle)
    started = time.perf_counter()
    published = publish_bundle(out, bundle, cache.path, report)
    with cache.making(bundle.engine_key, "this record", report) as work:
        cache.remember_build(bundle.engine_key, bundle.engine_key_fields, work)
    seconds["publish"] = round(time.perf_counter() - started, 3)
    mib = bundle.memory_plan.disk_bytes / 2**20
    report(f"{out}: {mib:.1f} MiB published" if published else f"{out} is this bundle already; left as it is")
    return BuildResult(out=out, manifest=bundle, stages=built.states, published=published, seconds=seconds)


def engines_from_graphs(graphs: Path, backend: Backend, cache: EngineCache, report: Report = silent) -> dict[str, Engine]:
    """The engine of every stage, from the cache or compiled now. Raises: as `bundle_from_graphs`."""
    return Builder(backend=backend, cache=cache, report=report).build(parts_of((graphs,), {})).engines


def _tokenizers(graphs: Path, cache: EngineCache, report: Report) -> tuple[TokenizerSpec, ...]:
    """The tokenizers, their files in the cache by content."""
    adopted = []
    for tokenizer in read_graphs(graphs).tokenizers:
        source = check_file(graphs, tokenizer.file)
        with cache.making(tokenizer.file.sha256, "a tokenizer", report) as work:
            with storage_errors("storing a tokenizer", work):
                copy = work / f"tokenizer{source.suffix}"
                link_or_copy(source, copy)
            adopted.append(dataclasses.replace(tokenizer, file=cache.adopt(copy)))
    return tuple(adopted)


def _manifest(
    parts: Mapping[str, Part], engines: Mapping[str, Engine], tokenizers: tuple[TokenizerSpec, ...], backend: Backend
) -> BundleManifest:
    fields, manifest, sizes_px = bundle_fields(parts, backend), parts["text"].manifest, sizes_of(parts)
    sized = {size_px: _sized(engines, sorted(manifest.denoise), size_px, sizes_px[0]) for size_px in sizes_px}
    first = sized.pop(sizes_px[0])
    return BundleManifest(
        schema_version=SCHEMA_VERSION,
        name=f"{manifest.source.name}-{'-'.join(map(str, first.denoise))}step",
        engine_key=key_of(fields),
        engine_key_fields=fields,
        source=manifest.source,
        schedule=manifest.schedule,
        sizes_px=sizes_px,
        batch=manifest.batch,
        text=engines["text"],
        denoise=first.denoise,
        decode=first.decode,
        tokenizers=tokenizers,
        target=backend.target(),
        toolchain={**fields["toolchain"], "nitro-rt": _own_version()},
        memory_plan=MemoryPlan(disk_bytes=0, weight_bytes=0, io_bytes=0),
        quantisation=next((part.manifest.quantisation for part in parts.values() if part.manifest.quantisation), None),
        more_sizes=sized,
    )


def _sized(engines: Mapping[str, Engine], steps: Iterable[int], size_px: int, first_px: int) -> SizeEngines:
    return SizeEngines(
        denoise={count: engines[sized_stage(f"denoise/{count}", size_px, first_px)] for count in steps},
        decode=engines[sized_stage("decode", size_px, first_px)],
    )


def memory_plan(bundle: BundleManifest) -> MemoryPlan:
    """Bytes on disk (every file once), in engine files that hold weights, and in the tensors between the stages.

    The tensors are counted once per size, those of all sizes together.
    """
    engines = [engine for _, engine in engines_of(bundle)]
    # A graph describes; the weights are in the files beside it, or in itself where there are none.
    weights = {reference for engine in engines for reference in (running_files(engine)[1:] or running_files(engine))}
    tensors = {spec for engine in engines for spec in (*engine.inputs, *engine.outputs)}
    return MemoryPlan(
        disk_bytes=_total(files_of(bundle)),
        weight_bytes=_total(weights),
        io_bytes=sum(math.prod(spec.shape) * np.dtype(spec.dtype).itemsize for spec in tensors),
    )


def _total(references: Iterable[FileRef]) -> int:
    return sum(reference.num_bytes for reference in references)


def _own_version() -> str:
    try:
        return metadata.version("nitro-rt")
    except metadata.PackageNotFoundError:
        return "source"  # run from a checkout that was not installed

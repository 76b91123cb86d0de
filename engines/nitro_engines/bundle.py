"""A graphs folder becomes a bundle: every stage's engine from the cache or compiled, then one publication."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from nitro_engines.backends import Backend, load_backend
from nitro_engines.cache import EngineCache
from nitro_engines.files import Report, foreign_errors, link_or_copy, silent, source_sha256, storage_errors
from nitro_engines.gate import Gate
from nitro_engines.keys import Fields, key_of
from nitro_engines.publish import files_of, prepare, publish_bundle
from nitro_rt.errors import BundleError, ModelNotFound
from nitro_rt.manifest import (
    EXPORT_FILE,
    SCHEMA_VERSION,
    BundleManifest,
    Engine,
    Graph,
    GraphsManifest,
    MemoryPlan,
    SpeedResult,
    TensorSpec,
    TokenizerSpec,
    check_file,
    from_json,
    resolve,
    sealed,
)

GRAPH_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "int8": "float16", "fp8": "float16"}
"""What most graphs of an export compute in, by its precision."""


@dataclass(frozen=True, kw_only=True)
class BuildResult:
    """What a build did."""

    out: Path
    manifest: BundleManifest
    stages: dict[str, str]
    """Stage (`text`, `denoise/1`, `decode`) -> `built` or `cached`."""
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
        backend: openvino, onnxruntime or tensorrt-rtx.
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
    gate: Gate | None = None,
    stages_from: Mapping[str, Path] = MappingProxyType({}),
    speed_gate: tuple[SpeedResult, ...] = (),
) -> BuildResult:
    """`build_bundle` with a loaded backend.

    Args:
        gate: judges the bundle before it is published; None where the checkpoint of the graphs is not at hand.
        stages_from: stage -> another folder of graphs of the same checkpoint, in another precision, that it is taken from.
        speed_gate: why they are taken from there, for the manifest.
    Raises: also BuildError if the bundle misses its quality limits.
    """
    manifest = read_graphs(graphs)
    parts = _parts(graphs, manifest, stages_from)
    for part in parts.values():
        backend.compute_dtype(part.graph.compute_dtype)  # refuses what cannot be built, before anything is written
    out = prepare(out, report)
    cache.sweep(report)
    started = time.perf_counter()
    references = gate.references(manifest, cache, report) if gate else ()
    seconds = {"references": round(time.perf_counter() - started, 3)} if gate else {}
    engines, stages = _engines(parts, backend, cache, report, seconds)
    bundle = _bundle_manifest(manifest, parts, engines, _tokenizers(graphs, manifest, cache, report), backend)
    bundle = dataclasses.replace(bundle, references=references, speed_gate=speed_gate)
    bundle = dataclasses.replace(bundle, memory_plan=memory_plan(bundle))
    if gate:
        started = time.perf_counter()
        bundle = gate.judged(bundle, lambda other: _engines(parts, other, cache, report, {})[0], cache, report)
        seconds["quality gate"] = round(time.perf_counter() - started, 3)
    bundle = sealed(bundle)
    started = time.perf_counter()
    published = publish_bundle(out, bundle, cache.path, report)
    with cache.making(bundle.engine_key, "this record", report) as work:
        cache.remember_build(bundle.engine_key, bundle.engine_key_fields, work)
    seconds["publish"] = round(time.perf_counter() - started, 3)
    mib = bundle.memory_plan.disk_bytes / 2**20
    report(f"{out}: {mib:.1f} MiB published" if published else f"{out} is this bundle already; left as it is")
    return BuildResult(out=out, manifest=bundle, stages=stages, published=published, seconds=seconds)


def engines_from_graphs(graphs: Path, backend: Backend, cache: EngineCache, report: Report = silent) -> dict[str, Engine]:
    """The engine of every stage, from the cache or compiled now. Raises: as `bundle_from_graphs`."""
    return _engines(_parts(graphs, read_graphs(graphs), {}), backend, cache, report, {})[0]


@dataclass(frozen=True, kw_only=True)
class _Part:
    """One stage's graph, in the folder that it is built from."""

    folder: Path
    manifest: GraphsManifest
    graph: Graph


def _parts(graphs: Path, manifest: GraphsManifest, stages_from: Mapping[str, Path]) -> dict[str, _Part]:
    """By stage. Raises: BundleError if the folders are of different checkpoints, sizes or step counts."""
    parts = {stage: _Part(folder=graphs, manifest=manifest, graph=graph) for stage, graph in graphs_of(manifest)}
    others = {folder: read_graphs(folder) for folder in set(stages_from.values())}
    for folder, other in others.items():
        for name in ("source", "schedule", "size_px", "batch", "tokenizers"):
            if getattr(other, name) != getattr(manifest, name):
                raise BundleError(f"{folder} and {graphs} differ in {name}, so they make no bundle together; export both again")
    for stage, folder in stages_from.items():
        parts[stage] = _Part(folder=folder, manifest=others[folder], graph=dict(graphs_of(others[folder]))[stage])
    return parts


def _engines(
    parts: Mapping[str, _Part], backend: Backend, cache: EngineCache, report: Report, seconds: dict[str, float]
) -> tuple[dict[str, Engine], dict[str, str]]:
    """Every engine and whether it was `built` or `cached`, by stage; `seconds` takes the times."""
    engines: dict[str, Engine] = {}
    stages: dict[str, str] = {}
    for stage, part in parts.items():
        started = time.perf_counter()
        engines[stage], stages[stage] = _engine(part.folder, part.manifest, stage, part.graph, backend, cache, report)
        seconds[stage] = round(time.perf_counter() - started, 3)
    return engines, stages


def read_graphs(graphs: Path) -> GraphsManifest:
    """`export.json`, after comparing every file it names with its size and digest.

    Raises: ModelNotFound if there is none; BundleError if something is missing, damaged or edited.
    """
    path = graphs / EXPORT_FILE
    if not path.is_file():
        raise ModelNotFound(f"{graphs} is no graphs folder: it has no {EXPORT_FILE}; export a checkpoint into it first")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise BundleError(f"{path} cannot be read: {exc}; export again") from exc
    manifest = from_json(GraphsManifest, text, where=str(path))
    if set(manifest.denoise) != set(manifest.schedule.steps) or not manifest.denoise:
        found, scheduled = sorted(manifest.denoise), sorted(manifest.schedule.steps)
        raise BundleError(f"{path} has graphs for {found} steps and schedules for {scheduled}; export again")
    for _, graph in graphs_of(manifest):
        for reference in graph.files:
            check_file(graphs, reference)
    for tokenizer in manifest.tokenizers:
        check_file(graphs, tokenizer.file)
    return manifest


def graphs_of(manifest: GraphsManifest) -> Iterator[tuple[str, Graph]]:
    """Every graph with its stage: `text`, `denoise/1`, ..., `decode`."""
    yield "text", manifest.text
    for num_steps, graph in sorted(manifest.denoise.items()):
        yield f"denoise/{num_steps}", graph
    yield "decode", manifest.decode


def stage_fields(manifest: GraphsManifest, stage: str, graph: Graph, backend: Backend) -> Fields:
    """Everything that decides one engine. Weights, steps and shift also stand in the graph, hence in its digest;
    only what this stage depends on is here, so that step counts and shifts share `text` and `decode`."""
    return {
        "stage": stage,
        "checkpoint_sha256": manifest.source.checkpoint_sha256,
        "onnx_sha256": [reference.sha256 for reference in graph.files],
        "inputs": [_shape_text(spec) for spec in graph.inputs],
        "outputs": [_shape_text(spec) for spec in graph.outputs],
        **backend_fields(backend, manifest.precision, graph.compute_dtype),
    }


def backend_fields(backend: Backend, precision: str, graph_dtype: str) -> Fields:
    """The fields that need no graphs: backend, options, versions, target."""
    return {
        "precision": precision,
        "backend": backend.name,
        "options": {**backend.options(graph_dtype), "compute_dtype": backend.compute_dtype(graph_dtype)},
        "toolchain": {**backend.toolchain(), "backend_source": source_sha256(Path(__file__).parent / "backends")},
        "target": backend.target(),
    }


def bundle_fields(manifest: GraphsManifest, backend: Backend) -> Fields:
    """Everything that decides all engines of a bundle, comparable before the export but for `onnx_sha256`."""
    own = backend_fields(backend, manifest.precision, GRAPH_DTYPES[manifest.precision])
    return {
        "checkpoint_sha256": manifest.source.checkpoint_sha256,
        "steps": sorted(manifest.denoise),
        "shift": manifest.schedule.shift,
        "size_px": manifest.size_px,
        "batch": manifest.batch,
        **own,
        "toolchain": {**manifest.toolchain, **own["toolchain"]},
        "onnx_sha256": {stage: [reference.sha256 for reference in graph.files] for stage, graph in graphs_of(manifest)},
    }


def _engine(
    graphs: Path, manifest: GraphsManifest, stage: str, graph: Graph, backend: Backend, cache: EngineCache, report: Report
) -> tuple[Engine, str]:
    """The engine of one stage, and whether it was `built` or `cached`."""
    fields = stage_fields(manifest, stage, graph, backend)
    key = key_of(fields)
    with cache.making(key, f"the {stage} engine", report) as work:
        engine = cache.find(key, report)
        if engine is not None:
            report(f"{stage}: {backend.name} engine from the cache")
            return engine, "cached"
        started = time.perf_counter()
        onnx_path = resolve(graphs, graph.files[0])
        _check_graph(onnx_path, graph, None if stage == "text" else manifest.precision)
        with foreign_errors(f"compiling {stage} for {backend.name}", work):
            paths = backend.compile(onnx_path, graph, work)
        engine = Engine(
            backend=backend.name,
            precision=manifest.precision,
            compute_dtype=backend.compute_dtype(graph.compute_dtype),
            files=tuple(cache.adopt(path) for path in paths),
            inputs=graph.inputs,
            outputs=graph.outputs,
            key=key,
            options=backend.options(graph.compute_dtype),
        )
        cache.store(engine, fields, work)
        mib = sum(reference.num_bytes for reference in engine.files) / 2**20
        report(f"{stage}: {backend.name} engine built in {time.perf_counter() - started:.1f} s, {mib:.1f} MiB")
        return engine, "built"


def _check_graph(path: Path, graph: Graph, precision: str | None) -> None:
    from nitro_engines.backends.onnx_graph import check_graph  # here, so that plans and cached builds need no onnx

    check_graph(path, graph, precision)


def _tokenizers(graphs: Path, manifest: GraphsManifest, cache: EngineCache, report: Report) -> tuple[TokenizerSpec, ...]:
    """The tokenizers, their files in the cache by content."""
    adopted = []
    for tokenizer in manifest.tokenizers:
        source = check_file(graphs, tokenizer.file)
        with cache.making(tokenizer.file.sha256, "a tokenizer", report) as work:
            with storage_errors("storing a tokenizer", work):
                copy = work / f"tokenizer{source.suffix}"
                link_or_copy(source, copy)
            adopted.append(dataclasses.replace(tokenizer, file=cache.adopt(copy)))
    return tuple(adopted)


def _bundle_manifest(
    manifest: GraphsManifest,
    parts: Mapping[str, _Part],
    engines: dict[str, Engine],
    tokenizers: tuple[TokenizerSpec, ...],
    backend: Backend,
) -> BundleManifest:
    fields = _fields_of_parts(manifest, parts, backend)
    denoise = {num_steps: engines[f"denoise/{num_steps}"] for num_steps in sorted(manifest.denoise)}
    return BundleManifest(
        schema_version=SCHEMA_VERSION,
        name=f"{manifest.source.name}-{'-'.join(map(str, denoise))}step",
        engine_key=key_of(fields),
        engine_key_fields=fields,
        source=manifest.source,
        schedule=manifest.schedule,
        sizes_px=(manifest.size_px,),
        batch=manifest.batch,
        text=engines["text"],
        denoise=denoise,
        decode=engines["decode"],
        tokenizers=tokenizers,
        target=backend.target(),
        toolchain={**fields["toolchain"], "nitro-rt": _own_version()},
        memory_plan=MemoryPlan(disk_bytes=0, weight_bytes=0, io_bytes=0),
        quantisation=next((part.manifest.quantisation for part in parts.values() if part.manifest.quantisation), None),
    )


def _fields_of_parts(manifest: GraphsManifest, parts: Mapping[str, _Part], backend: Backend) -> Fields:
    """`bundle_fields`, where stages come from graphs of different precisions those of each."""
    fields = bundle_fields(manifest, backend)
    if all(part.manifest is manifest for part in parts.values()):
        return fields
    return fields | {
        "precision": {stage: part.manifest.precision for stage, part in parts.items()},
        "onnx_sha256": {stage: [reference.sha256 for reference in part.graph.files] for stage, part in parts.items()},
    }


def memory_plan(bundle: BundleManifest) -> MemoryPlan:
    """Bytes on disk (every file once), in engine files that hold weights, and in the tensors between the stages."""
    engines = (bundle.text, *bundle.denoise.values(), bundle.decode)
    # A graph describes; the weights are in the files beside it, or in itself where there are none.
    weights = {reference for engine in engines for reference in (engine.files[1:] or engine.files)}
    tensors = {spec.name: spec for engine in engines for spec in (*engine.inputs, *engine.outputs)}
    return MemoryPlan(
        disk_bytes=_total(files_of(bundle)),
        weight_bytes=_total(weights),
        io_bytes=sum(math.prod(spec.shape) * np.dtype(spec.dtype).itemsize for spec in tensors.values()),
    )


def _total(references: Any) -> int:
    return sum(reference.num_bytes for reference in references)


def _shape_text(spec: TensorSpec) -> str:
    return f"{spec.name} {spec.dtype} {list(spec.shape)}"


def _own_version() -> str:
    try:
        return metadata.version("nitro-rt")
    except metadata.PackageNotFoundError:
        return "source"  # run from a checkout that was not installed

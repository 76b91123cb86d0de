"""A graphs folder becomes a bundle: every stage's engine from the cache or compiled, then one publication."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
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
    Reference,
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
    graphs: Path, out: Path, backend: Backend, cache: EngineCache, report: Report = silent, *, gate: Gate | None = None
) -> BuildResult:
    """`build_bundle` with a loaded backend.

    Args:
        gate: judges the bundle before it is published; None where the checkpoint of the graphs is not at hand.
    Raises: also BuildError if the bundle misses its quality limits.
    """
    manifest = read_graphs(graphs)
    for _, graph in graphs_of(manifest):
        backend.compute_dtype(graph.compute_dtype)  # refuses what cannot be built, before anything is written
    out = prepare(out, report)
    cache.sweep(report)
    engines: dict[str, Engine] = {}
    stages: dict[str, str] = {}
    seconds: dict[str, float] = {}
    started = time.perf_counter()
    references = gate.references(manifest, cache, report) if gate else ()
    if gate:
        seconds["references"] = round(time.perf_counter() - started, 3)
    for stage, graph in graphs_of(manifest):
        started = time.perf_counter()
        engines[stage], stages[stage] = _engine(graphs, manifest, stage, graph, backend, cache, report)
        seconds[stage] = round(time.perf_counter() - started, 3)
    bundle = _bundle_manifest(manifest, engines, _tokenizers(graphs, manifest, cache, report), backend, references)
    if gate:
        started = time.perf_counter()

        def compile_on(other: Backend) -> dict[str, Engine]:
            return {
                stage: _engine(graphs, manifest, stage, graph, other, cache, report)[0] for stage, graph in graphs_of(manifest)
            }

        bundle = gate.judged(bundle, compile_on, cache, report)
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
        _check_graph(onnx_path, graph)
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


def _check_graph(path: Path, graph: Graph) -> None:
    from nitro_engines.backends.onnx_graph import check_graph  # here, so that plans and cached builds need no onnx

    check_graph(path, graph)


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
    engines: dict[str, Engine],
    tokenizers: tuple[TokenizerSpec, ...],
    backend: Backend,
    references: tuple[Reference, ...],
) -> BundleManifest:
    fields = bundle_fields(manifest, backend)
    denoise = {num_steps: engines[f"denoise/{num_steps}"] for num_steps in sorted(manifest.denoise)}
    bundle = BundleManifest(
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
        references=references,
    )
    return dataclasses.replace(bundle, memory_plan=memory_plan(bundle))


def memory_plan(bundle: BundleManifest) -> MemoryPlan:
    """Bytes on disk (every file once), in engine files that hold weights, and in the tensors between the stages."""
    engines = (bundle.text, *bundle.denoise.values(), bundle.decode)
    # An IR's .xml and an .onnx beside its .bin describe; the weights are the last file, or the only one.
    weights = {engine.files[-1] for engine in engines}
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

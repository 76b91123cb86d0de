"""The engine of every stage: from the cache, or compiled now by one builder at a time."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from nitro_engines.backends import Backend
from nitro_engines.cache import EngineCache
from nitro_engines.fields import stage_fields
from nitro_engines.files import Report, foreign_errors, link_or_copy, silent, storage_errors
from nitro_engines.graphs import Job, Part, jobs_of, num_steps_of
from nitro_engines.history import expected_seconds, remember_seconds, remember_timing, running_files, seed_timing
from nitro_engines.keys import Fields, key_of
from nitro_engines.progress import FIRST_LINE_S, Progress
from nitro_rt.manifest import Engine, FileRef, Graph, resolve, sha256_of


@dataclass(frozen=True, kw_only=True)
class Built:
    """The engines of a bundle, by stage."""

    engines: dict[str, Engine] = field(default_factory=dict)
    states: dict[str, str] = field(default_factory=dict)
    """`cached`, `built`, or where it was cached and built again: `identical` or `different`, by its files' digests."""
    seconds: dict[str, float] = field(default_factory=dict)
    """By engine: `denoise/1,2,4` is one."""


@dataclass(frozen=True, kw_only=True)
class Builder:
    """Makes engines with one backend."""

    backend: Backend
    cache: EngineCache
    report: Report = silent
    rebuild: bool = False
    """Compile what is cached, too, and say whether the same comes out."""
    published: Path | None = None
    """The bundle that is to be replaced: an engine of it may hold the timing cache of an equal build."""

    def build(self, parts: Mapping[str, Part]) -> Built:
        """The engine of every part; step counts of one folder share theirs. Raises: BuildError, ConfigError as the backend."""
        built = Built()
        for job in jobs_of(parts):
            started = time.perf_counter()
            engine, state = self._engine(job)
            built.seconds[job.stage] = round(time.perf_counter() - started, 3)
            for stage, first_row in job.first_rows.items():
                built.engines[stage], built.states[stage] = dataclasses.replace(engine, first_row=first_row), state
        return built

    def _engine(self, job: Job) -> tuple[Engine, str]:
        stage, part = job.stage, job.part
        fields = stage_fields(part.manifest, part.stage, part.graph, self.backend)
        key = key_of(fields)
        with self.cache.making(key, f"the {stage} engine", self.report) as work:
            cached = self.cache.find(key, self.report)
            if cached is not None and not self.rebuild:
                self.report(f"{stage}: {self.backend.name} engine from the cache")
                return cached, "cached"
            engine = self._compiled(job, fields, work)
        remember_timing(engine, self.backend, self.cache, self.report)
        if cached is None:
            return engine, "built"
        is_identical = running_files(cached) == running_files(engine)
        self.report(f"{stage}: {_comparison(cached, engine)}")
        return engine, "identical" if is_identical else "different"

    def _compiled(self, job: Job, fields: Fields, work: Path) -> Engine:
        """Compile, and publish the entry in the cache, whose lock is held."""
        stage, part, backend, cache = job.stage, job.parts[0], self.backend, self.cache
        started = time.perf_counter()
        onnx_path, graph = _graph_of(job, work)
        _check_graph(onnx_path, graph, None if part.stage == "text" else part.manifest.precision)
        seed_timing(key_of(fields), backend, self.published, cache, work)
        progress = Progress(self.report, stage, expected_s=expected_seconds(backend, part.stage, graph, cache))
        with foreign_errors(f"compiling {stage} for {backend.name}", work):
            paths = backend.compile(onnx_path, graph, work, progress)
        seconds = time.perf_counter() - started
        engine = Engine(
            backend=backend.name,
            precision=part.manifest.precision,
            compute_dtype=backend.compute_dtype(graph.compute_dtype),
            files=tuple(cache.adopt(path) for path in paths),
            inputs=graph.inputs,
            outputs=graph.outputs,
            key=key_of(fields),
            options=backend.options(graph.compute_dtype),
        )
        cache.store(engine, fields, work)
        if seconds >= FIRST_LINE_S:  # shorter ones give no progress to foretell
            remember_seconds(backend, part.stage, graph, seconds, cache, work)
        mib = sum(reference.num_bytes for reference in engine.files) / 2**20
        self.report(f"{stage}: {backend.name} engine built in {seconds:.1f} s, {mib:.1f} MiB")
        return engine


def _graph_of(job: Job, work: Path) -> tuple[Path, Graph]:
    """The graph to compile; that of several step counts is written into a folder in `work`, its weights beside it."""
    part = job.part
    if len(job.parts) == 1:
        return resolve(part.folder, part.graph.files[0]), part.graph
    from nitro_engines.backends.onnx_join import join_graphs  # here, as below

    graphs, folder = [each.graph.files[0] for each in job.parts], work / "joined"
    weights = tuple(reference for reference in part.graph.files if reference not in graphs)
    joined = folder / f"denoise-{'-'.join(str(num_steps_of(each.stage)) for each in job.parts)}.onnx"
    with storage_errors(f"joining the denoisers of {job.stage}", work):
        folder.mkdir()
        join_graphs([resolve(part.folder, reference) for reference in graphs], joined)
        for reference in weights:
            link_or_copy(resolve(part.folder, reference), folder / reference.path)
        written = FileRef(path=joined.name, sha256=sha256_of(joined), num_bytes=joined.stat().st_size)
    return joined, dataclasses.replace(part.graph, files=(written, *weights))


def _comparison(before: Engine, now: Engine) -> str:
    """Whether two builds from the same inputs gave the same bytes, in words."""
    old, new = running_files(before), running_files(now)
    if old == new:
        return f"built again, byte for byte the same ({_sizes(now)})"
    return f"built again, and other bytes came out: {_sizes(now)}, before {_sizes(before)}"


def _sizes(engine: Engine) -> str:
    return ", ".join(f"{reference.sha256[:12]} of {reference.num_bytes} bytes" for reference in running_files(engine))


def _check_graph(path: Path, graph: Graph, precision: str | None) -> None:
    from nitro_engines.backends.onnx_graph import check_graph  # here, so that plans and cached builds need no onnx

    check_graph(path, graph, precision)

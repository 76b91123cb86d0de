"""What a build would do, without doing it: the key and its fields, what is cached, and what differs from the nearest key."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nitro_engines.backends import Backend, load_backend
from nitro_engines.backends.rtx_targets import check_precision
from nitro_engines.cache import EngineCache
from nitro_engines.fields import backend_fields, bundle_fields, stage_fields
from nitro_engines.graphs import GRAPH_DTYPES, Part, graphs_of, jobs_of, parts_of, read_graphs, sized_stage
from nitro_engines.keys import Difference, Fields, differences, key_of, nearest
from nitro_engines.memory import GIB, MemoryForecast, plan_memory
from nitro_engines.models import ModelSource, resolve_model
from nitro_engines.quantisation import BASE_PRECISION, Quantisation, quantisation_of
from nitro_engines.request import AUTO, BuildRequest
from nitro_engines.speed import QUANTISED_FOR_AUTO, require_measurable
from nitro_rt.errors import BuildError, BundleError, ModelNotFound
from nitro_rt.manifest import GraphsManifest


@dataclass(frozen=True, kw_only=True)
class BuildPlan:
    """The facts of `--dry-run` and `--explain`. Nothing was written to find them.

    torch is loaded only where single files, decoders or LoRAs have to be checked.
    """

    request: BuildRequest
    """With sizes, shift and output folder decided."""
    source: ModelSource
    checkpoint_sha256: str | None
    """None until a checkpoint made of parts is assembled."""
    graphs_keys: dict[int, str]
    """By size in pixels."""
    graphs_cached: bool
    """Those of every size."""
    engine_key: str | None
    """None until the graphs exist: their digests are part of it."""
    fields: Fields
    """The engine key's fields; without `onnx_sha256` while the graphs do not exist."""
    stages: dict[str, str]
    """Stage -> `cached`, `build`, `build again` (cached, but asked for), or `unknown` while the graphs do not all exist."""
    nearest_key: str | None
    """The engine key built before that differs least; None if none was built."""
    differences: tuple[Difference, ...]
    """Its fields that differ, as far as they are known."""
    memory: dict[int, MemoryForecast]
    """By size in pixels: sizes are exported and built one after another."""
    out: Path

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        request = dataclasses.asdict(self.request) | {"out": str(self.out)}
        source = {name: getattr(self.source, name) for name in ("name", "origin", "licence", "notes")}
        source |= {"checkpoint": str(self.source.checkpoint)}
        facts = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        differing = [dataclasses.asdict(difference) for difference in self.differences]
        memory = {size_px: forecast.as_dict() for size_px, forecast in self.memory.items()}
        own = {"request": request, "source": source, "differences": differing, "memory": memory}
        return facts | own | {"out": str(self.out)}

    def lines(self, *, explain: bool = False) -> list[str]:
        """For people; `explain` adds the comparison with the nearest key."""
        request = self.request
        steps = ", ".join(map(str, request.steps))
        size = f"{', '.join(map(str, request.sizes_px))} px, batch {request.batch}"
        targets = " for " + ", ".join(request.targets) if request.targets else ""
        on = f" on {request.provider}" if request.provider else ""
        lines = [
            f"model       {self.source.name} ({self.checkpoint_sha256[:12] if self.checkpoint_sha256 else 'to be assembled'})",
            *(f"part        {note}" for note in self.source.notes),
            *([f"licence     {self.source.licence}"] if self.source.licence else []),
            f"build       steps {steps}; {size}, {request.precision}, shift {request.shift}",
            f"backend     {request.backend}{on}{targets}, computes in {self.fields['options']['compute_dtype']}",
            f"graphs      {'cached' if self.graphs_cached else 'to be exported'}",
            *(f"engine      {stage}: {state}" for stage, state in self.stages.items()),
            f"engine key  {self.engine_key or 'known after the export'}",
            *self._memory_lines(),
            f"out         {self.out}",
        ]
        return lines + self._explanation() if explain else lines

    def _memory_lines(self) -> list[str]:
        lines: list[str] = []
        for size_px, forecast in self.memory.items():
            lines += [f"size        {size_px} px"] if len(self.memory) > 1 else []
            lines += forecast.lines()
        return lines

    def _explanation(self) -> list[str]:
        if self.nearest_key is None:
            return ["nothing was built with this cache before"]
        if self.nearest_key == self.engine_key:
            return [f"this very bundle was built before ({self.nearest_key[:12]})"]
        if not self.differences:
            return [f"no difference from {self.nearest_key[:12]} is known before the export"]
        differing = [f"  {difference}" for difference in self.differences]
        return [f"nearest key built before: {self.nearest_key[:12]}; it differs in", *differing]


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """A request with everything looked up that both the plan and the build need."""

    request: BuildRequest
    source: ModelSource
    backend: Backend
    checkpoint_sha256: str | None
    """None until a checkpoint made of parts is assembled."""
    float_fields: dict[int, Fields]
    """Everything that decides the exported graphs, by size in pixels."""
    quantisation: Quantisation | None
    """What is done to them; None for a float precision."""

    def float_key(self, size_px: int) -> str:
        return key_of(self.float_fields[size_px])

    def graphs_key(self, size_px: int) -> str:
        """Of the graphs that the engines are built from."""
        if self.quantisation is None:
            return self.float_key(size_px)
        return key_of({**self.float_fields[size_px], "quantisation": self.quantisation.fields()})


def plan(request: BuildRequest, cache: EngineCache | None = None) -> BuildPlan:
    """What `build(request)` would do.

    For `auto` it is the plan of its larger part, the quantised build; which stages are taken of it is measured.

    Raises: ConfigError, ModelNotFound, ExportError, BackendUnavailable as `build` would before its work starts.
    """
    if request.precision == AUTO:
        require_measurable(request.backend, request.provider)
        quantised = plan(dataclasses.replace(request, precision=QUANTISED_FOR_AUTO), cache)
        return dataclasses.replace(quantised, request=dataclasses.replace(quantised.request, precision=AUTO))
    prepared, cache = prepare_build(request), cache or EngineCache()
    graphs = cached_graphs(prepared, cache)
    complete = all(graphs.values())
    parts = _parts(prepared, cache) if complete else None
    if parts is None:
        fields = _fields_before_export(prepared)
        stages = dict.fromkeys(_stage_names(prepared.request), "unknown")
    else:
        fields = bundle_fields(parts, prepared.backend)
        stages = _states(parts, prepared, cache)
    engine_key = key_of(fields) if complete else None
    built = cache.known_builds()
    if not complete:  # compare what can be compared
        unknown = {"onnx_sha256", "checkpoint_sha256", "recipe_sha256"} - fields.keys()
        built = {key: {name: value for name, value in known.items() if name not in unknown} for key, known in built.items()}
    closest = engine_key if engine_key in built else nearest(fields, built)
    assert prepared.request.out is not None
    return BuildPlan(
        request=prepared.request,
        source=prepared.source,
        checkpoint_sha256=prepared.checkpoint_sha256,
        graphs_keys={size_px: prepared.graphs_key(size_px) for size_px in graphs},
        graphs_cached=complete,
        engine_key=engine_key,
        fields=fields,
        stages=stages,
        nearest_key=closest,
        differences=differences(fields, built[closest]) if closest else (),
        memory=forecast(prepared, cache, graphs),
        out=prepared.request.out,
    )


def forecast(
    prepared: Preparation, cache: EngineCache, graphs: Mapping[int, GraphsManifest | None]
) -> dict[int, MemoryForecast]:
    """What the build needs beyond what is cached, by size.

    Args: graphs: the cached ones by size; None: they are to be made.
    """
    from nitro_export import read_checkpoint

    request, backend, source = prepared.request, prepared.backend, prepared.source
    to_export = [size_px for size_px, manifest in graphs.items() if manifest is None]
    with source.opened() as folder:
        checkpoint = read_checkpoint(folder)
        return {
            size_px: plan_memory(
                checkpoint,
                precision=request.precision,
                num_steps=request.steps,
                size_px=size_px,
                batch=request.batch,
                backend=backend.name,
                provider=request.provider,
                compute_dtype=backend.compute_dtype(GRAPH_DTYPES[request.precision]),
                targets=request.targets,
                cache_root=cache.root,
                exported=manifest is not None,
                built=_built_stages(manifest, prepared, cache) | ({"text"} if size_px != request.sizes_px[0] else set()),
                gated=request.gate_prompts > 0,
                stored_at=source.checkpoint,
                assembled_bytes=source.new_bytes() if [size_px] == to_export[:1] else 0,
            )
            for size_px, manifest in graphs.items()
        }


def require_room(forecasts: Mapping[int, MemoryForecast]) -> None:
    """Raises: BuildError if one size does not fit, or all of them together do not fit the disk."""
    for forecast in forecasts.values():
        forecast.require()
    num_bytes = sum(forecast.disk_bytes for forecast in forecasts.values())
    free_bytes = min(forecast.free_disk_bytes for forecast in forecasts.values())
    if num_bytes > free_bytes:
        raise BuildError(
            f"this build does not fit: {', '.join(map(str, forecasts))} px together need {num_bytes / GIB:.1f} GiB of the "
            f"cache's disk, and {free_bytes / GIB:.1f} GiB are free. Nothing was done. Name fewer of --size, or free some space"
        )


def prepare_build(request: BuildRequest) -> Preparation:
    """Everything about a build that is cheap to know; also where a wrong request is refused."""
    from nitro_export import read_checkpoint, toolchain

    backend = load_backend(request.backend, request.targets, provider=request.provider, refit=request.refit)
    backend.compute_dtype(GRAPH_DTYPES[request.precision])
    check_precision(tuple(backend.target().get("targets", "").split()), request.precision)
    source = resolve_model(request.model, base=request.base, decoder=request.decoder, loras=request.loras)
    with source.opened() as folder:
        resolved = request.resolved(source, read_checkpoint(folder))
    quantisation = quantisation_of(request.precision, request.backend, request.provider)
    fields = {
        "checkpoint": source.key(),
        "name": source.name,
        "origin": source.origin,
        "licence": source.licence,
        "steps": list(resolved.steps),
        "shift": resolved.shift,
        "precision": BASE_PRECISION if quantisation else resolved.precision,
        "batch": resolved.batch,
        "toolchain": toolchain(),
    }
    return Preparation(
        request=resolved,
        source=source,
        backend=backend,
        checkpoint_sha256=source.known_sha256(),
        float_fields={size_px: {**fields, "size_px": size_px} for size_px in resolved.sizes_px},
        quantisation=quantisation,
    )


def cached_graphs(prepared: Preparation, cache: EngineCache) -> dict[int, GraphsManifest | None]:
    """By size, None where they are absent or damaged: the build exports again."""
    found: dict[int, GraphsManifest | None] = {}
    for size_px in prepared.request.sizes_px:
        try:
            found[size_px] = read_graphs(cache.graphs / prepared.graphs_key(size_px))
        except (ModelNotFound, BundleError):
            found[size_px] = None
    return found


def _parts(prepared: Preparation, cache: EngineCache) -> dict[str, Part]:
    return parts_of([cache.graphs / prepared.graphs_key(size_px) for size_px in prepared.request.sizes_px], {})


def _states(parts: Mapping[str, Part], prepared: Preparation, cache: EngineCache) -> dict[str, str]:
    cached = _cached_stages(parts, prepared, cache)
    again = "build again" if prepared.request.rebuild else "cached"
    return {stage: again if stage in cached else "build" for stage in parts}


def _cached_stages(parts: Mapping[str, Part], prepared: Preparation, cache: EngineCache) -> frozenset[str]:
    found: set[str] = set()
    for job in jobs_of(parts):
        part = job.part
        if cache.has(key_of(stage_fields(part.manifest, part.stage, part.graph, prepared.backend))):
            found |= job.first_rows.keys()
    return frozenset(found)


def _built_stages(manifest: GraphsManifest | None, prepared: Preparation, cache: EngineCache) -> frozenset[str]:
    """Stages of one size whose engines are taken from the cache."""
    if manifest is None or prepared.request.rebuild:
        return frozenset()
    folder = cache.graphs / prepared.graphs_key(manifest.size_px)
    parts = {stage: Part(stage=stage, folder=folder, manifest=manifest, graph=graph) for stage, graph in graphs_of(manifest)}
    return _cached_stages(parts, prepared, cache)


def _stage_names(request: BuildRequest) -> tuple[str, ...]:
    kinds = (*(f"denoise/{count}" for count in request.steps), "decode")
    first_px = request.sizes_px[0]
    return ("text", *(sized_stage(kind, size_px, first_px) for size_px in request.sizes_px for kind in kinds))


def _fields_before_export(prepared: Preparation) -> Fields:
    """`bundle_fields` without the digests of the graphs and of the recipe that they are quantised by."""
    request, graphs = prepared.request, next(iter(prepared.float_fields.values()))
    own = backend_fields(prepared.backend, request.precision, GRAPH_DTYPES[request.precision])
    shared = {name: graphs[name] for name in ("steps", "shift", "batch")}
    shared |= {"sizes_px": list(request.sizes_px)}
    if prepared.checkpoint_sha256 is not None:
        shared["checkpoint_sha256"] = prepared.checkpoint_sha256
    if prepared.quantisation is None:
        shared["recipe_sha256"] = None
    return {**shared, **own, "toolchain": {**graphs["toolchain"], **own["toolchain"]}}

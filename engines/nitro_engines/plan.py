"""What a build would do, without doing it: the key and its fields, what is cached, and what differs from the nearest key."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nitro_engines.backends import Backend, load_backend
from nitro_engines.backends.rtx_targets import check_precision
from nitro_engines.bundle import GRAPH_DTYPES, backend_fields, bundle_fields, graphs_of, read_graphs, stage_fields
from nitro_engines.cache import EngineCache
from nitro_engines.keys import Difference, Fields, differences, key_of, nearest
from nitro_engines.memory import MemoryForecast, plan_memory
from nitro_engines.models import ModelSource, resolve_model
from nitro_engines.quantisation import BASE_PRECISION, Quantisation, quantisation_of
from nitro_engines.request import AUTO, BuildRequest
from nitro_engines.speed import QUANTISED_FOR_AUTO, require_measurable
from nitro_rt.errors import BundleError, ModelNotFound
from nitro_rt.manifest import GraphsManifest


@dataclass(frozen=True, kw_only=True)
class BuildPlan:
    """The facts of `--dry-run` and `--explain`. Nothing was written to find them.

    torch is loaded only where single files, decoders or LoRAs have to be checked.
    """

    request: BuildRequest
    """With size, shift and output folder decided."""
    source: ModelSource
    checkpoint_sha256: str | None
    """None until a checkpoint made of parts is assembled."""
    graphs_key: str
    graphs_cached: bool
    engine_key: str | None
    """None until the graphs exist: their digests are part of it."""
    fields: Fields
    """The engine key's fields; without `onnx_sha256` while the graphs do not exist."""
    stages: dict[str, str]
    """Stage -> `cached`, `build`, or `unknown` while the graphs do not exist."""
    nearest_key: str | None
    """The engine key built before that differs least; None if none was built."""
    differences: tuple[Difference, ...]
    """Its fields that differ, as far as they are known."""
    memory: MemoryForecast
    out: Path

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        request = dataclasses.asdict(self.request) | {"out": str(self.out)}
        source = {name: getattr(self.source, name) for name in ("name", "origin", "licence", "notes")}
        source |= {"checkpoint": str(self.source.checkpoint)}
        facts = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        differing = [dataclasses.asdict(difference) for difference in self.differences]
        own = {"request": request, "source": source, "differences": differing, "memory": self.memory.as_dict()}
        return facts | own | {"out": str(self.out)}

    def lines(self, *, explain: bool = False) -> list[str]:
        """For people; `explain` adds the comparison with the nearest key."""
        request = self.request
        steps, size = ", ".join(map(str, request.steps)), f"{request.size_px} px, batch {request.batch}"
        targets = " for " + ", ".join(request.targets) if request.targets else ""
        lines = [
            f"model       {self.source.name} ({self.checkpoint_sha256[:12] if self.checkpoint_sha256 else 'to be assembled'})",
            *(f"part        {note}" for note in self.source.notes),
            *([f"licence     {self.source.licence}"] if self.source.licence else []),
            f"build       steps {steps}; {size}, {request.precision}, shift {request.shift}",
            f"backend     {request.backend}{targets}, computes in {self.fields['options']['compute_dtype']}",
            f"graphs      {'cached' if self.graphs_cached else 'to be exported'}",
            *(f"engine      {stage}: {state}" for stage, state in self.stages.items()),
            f"engine key  {self.engine_key or 'known after the export'}",
            *self.memory.lines(),
            f"out         {self.out}",
        ]
        return lines + self._explanation() if explain else lines

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
    float_fields: Fields
    """Everything that decides the exported graphs."""
    quantisation: Quantisation | None
    """What is done to them; None for a float precision."""

    @property
    def float_key(self) -> str:
        return key_of(self.float_fields)

    @property
    def graphs_key(self) -> str:
        """Of the graphs that the engines are built from."""
        if self.quantisation is None:
            return self.float_key
        return key_of({**self.float_fields, "quantisation": self.quantisation.fields()})


def plan(request: BuildRequest, cache: EngineCache | None = None) -> BuildPlan:
    """What `build(request)` would do.

    For `auto` it is the plan of its larger part, the quantised build; which stages are taken of it is measured.

    Raises: ConfigError, ModelNotFound, ExportError, BackendUnavailable as `build` would before its work starts.
    """
    if request.precision == AUTO:
        require_measurable(request.backend)
        quantised = plan(dataclasses.replace(request, precision=QUANTISED_FOR_AUTO), cache)
        return dataclasses.replace(quantised, request=dataclasses.replace(quantised.request, precision=AUTO))
    prepared, cache = prepare_build(request), cache or EngineCache()
    graphs = cached_graphs(cache.graphs / prepared.graphs_key)
    if graphs is None:
        fields = _fields_before_export(prepared)
        stages = dict.fromkeys(("text", *(f"denoise/{n}" for n in prepared.request.steps), "decode"), "unknown")
    else:
        fields = bundle_fields(graphs, prepared.backend)
        keys = {stage: key_of(stage_fields(graphs, stage, graph, prepared.backend)) for stage, graph in graphs_of(graphs)}
        stages = {stage: "cached" if cache.has(key) else "build" for stage, key in keys.items()}
    engine_key = key_of(fields) if graphs else None
    built = cache.known_builds()
    if graphs is None:  # compare what can be compared
        unknown = {"onnx_sha256", "checkpoint_sha256"} - fields.keys()
        built = {key: {name: value for name, value in known.items() if name not in unknown} for key, known in built.items()}
    closest = engine_key if engine_key in built else nearest(fields, built)
    assert prepared.request.out is not None
    return BuildPlan(
        request=prepared.request,
        source=prepared.source,
        checkpoint_sha256=prepared.checkpoint_sha256,
        graphs_key=prepared.graphs_key,
        graphs_cached=graphs is not None,
        engine_key=engine_key,
        fields=fields,
        stages=stages,
        nearest_key=closest,
        differences=differences(fields, built[closest]) if closest else (),
        memory=forecast(prepared, cache, graphs),
        out=prepared.request.out,
    )


def forecast(prepared: Preparation, cache: EngineCache, graphs: GraphsManifest | None) -> MemoryForecast:
    """What the build needs beyond what is cached. Args: graphs: the cached ones; None: they are to be made."""
    from nitro_export import read_checkpoint

    request, backend = prepared.request, prepared.backend
    assert request.size_px is not None
    keys = {stage: key_of(stage_fields(graphs, stage, g, backend)) for stage, g in graphs_of(graphs)} if graphs else {}
    with prepared.source.opened() as folder:
        return plan_memory(
            read_checkpoint(folder),
            precision=request.precision,
            num_steps=request.steps,
            size_px=request.size_px,
            batch=request.batch,
            backend=backend.name,
            compute_dtype=backend.compute_dtype(GRAPH_DTYPES[request.precision]),
            targets=request.targets,
            cache_root=cache.root,
            exported=graphs is not None,
            built=frozenset(stage for stage, key in keys.items() if cache.has(key)),
            gated=request.gate_prompts > 0,
        )


def prepare_build(request: BuildRequest) -> Preparation:
    """Everything about a build that is cheap to know; also where a wrong request is refused."""
    from nitro_export import read_checkpoint, toolchain

    backend = load_backend(request.backend, request.targets)
    backend.compute_dtype(GRAPH_DTYPES[request.precision])
    check_precision(request.targets, request.precision)
    source = resolve_model(request.model, base=request.base, decoder=request.decoder, loras=request.loras)
    with source.opened() as folder:
        resolved = request.resolved(source, read_checkpoint(folder))
    quantisation = quantisation_of(request.precision, request.backend)
    fields = {
        "checkpoint": source.key(),
        "name": source.name,
        "origin": source.origin,
        "licence": source.licence,
        "steps": list(resolved.steps),
        "shift": resolved.shift,
        "precision": BASE_PRECISION if quantisation else resolved.precision,
        "size_px": resolved.size_px,
        "batch": resolved.batch,
        "toolchain": toolchain(),
    }
    return Preparation(
        request=resolved,
        source=source,
        backend=backend,
        checkpoint_sha256=source.known_sha256(),
        float_fields=fields,
        quantisation=quantisation,
    )


def _fields_before_export(prepared: Preparation) -> Fields:
    """`bundle_fields` without the graphs' digests."""
    precision = prepared.request.precision
    graphs, own = prepared.float_fields, backend_fields(prepared.backend, precision, GRAPH_DTYPES[precision])
    shared = {name: graphs[name] for name in ("steps", "shift", "size_px", "batch")}
    if prepared.checkpoint_sha256 is not None:
        shared["checkpoint_sha256"] = prepared.checkpoint_sha256
    return {**shared, **own, "toolchain": {**graphs["toolchain"], **own["toolchain"]}}


def cached_graphs(folder: Path) -> GraphsManifest | None:
    try:
        return read_graphs(folder)
    except (ModelNotFound, BundleError):
        return None  # absent or damaged: the build exports again

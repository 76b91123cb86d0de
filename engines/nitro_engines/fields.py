"""The fields of the keys: everything that decides an engine, and everything that decides a bundle's engines."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from nitro_engines.backends import Backend
from nitro_engines.files import source_sha256
from nitro_engines.graphs import GRAPH_DTYPES, Part
from nitro_engines.keys import Fields, key_of
from nitro_rt.manifest import Graph, GraphsManifest, TensorSpec


def stage_fields(manifest: GraphsManifest, stage: str, graph: Graph, backend: Backend) -> Fields:
    """Everything that decides one engine. Weights, steps and shift also stand in the graph, hence in its digest;
    only what this stage depends on is here, so that step counts, shifts and sizes share what they have in common.

    The timing cache that a build may begin with is none of it: it holds what was measured in an equal build before.
    """
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


def bundle_fields(parts: Mapping[str, Part], backend: Backend) -> Fields:
    """Everything that decides all engines of a bundle; all but `onnx_sha256` is known before the export."""
    manifest = parts["text"].manifest
    first = next(part.manifest for stage, part in parts.items() if stage != "text")
    precisions = {stage: part.manifest.precision for stage, part in parts.items()}
    recipes = [part.manifest.quantisation for part in parts.values() if part.manifest.quantisation]
    own = backend_fields(backend, first.precision, GRAPH_DTYPES[first.precision])
    return {
        "checkpoint_sha256": manifest.source.checkpoint_sha256,
        "steps": sorted(manifest.denoise),
        "shift": manifest.schedule.shift,
        "sizes_px": list(sizes_of(parts)),
        "batch": manifest.batch,
        **own,
        "precision": precisions if len(set(precisions.values())) > 1 else first.precision,
        "recipe_sha256": key_of({"recipes": recipes}) if recipes else None,
        "toolchain": {**manifest.toolchain, **own["toolchain"]},
        "onnx_sha256": {stage: [reference.sha256 for reference in part.graph.files] for stage, part in parts.items()},
    }


def sizes_of(parts: Mapping[str, Part]) -> tuple[int, ...]:
    """In pixels, the bundle's first size first."""
    return tuple(part.manifest.size_px for part in parts.values() if part.stage == "decode")


def _shape_text(spec: TensorSpec) -> str:
    return f"{spec.name} {spec.dtype} {list(spec.shape)}"

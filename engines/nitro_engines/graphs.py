"""Graphs folders: read, checked, and joined to what one bundle is built from."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nitro_rt.errors import BundleError, ModelNotFound
from nitro_rt.manifest import EXPORT_FILE, Graph, GraphsManifest, check_file, from_json

GRAPH_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "int8": "float16", "fp8": "float16"}
"""What most graphs of an export compute in, by its precision."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One stage's graph, in the folder that it is built from."""

    stage: str
    """`text`, `denoise/1`, ..., `decode`, whatever the size."""
    folder: Path
    manifest: GraphsManifest
    graph: Graph


@dataclass(frozen=True, kw_only=True)
class Job:
    """One engine that a bundle needs. Denoisers of several step counts are one engine, which holds the weights once."""

    stage: str
    """For people: `text`, `denoise/1,2,4`, `denoise/1,2,4@1024`, `decode`."""
    parts: tuple[Part, ...]
    """By step count, the least first; of text and decode just one."""
    first_rows: dict[str, int]
    """Stage of the bundle that it serves -> row of the engine's step tables where that stage's steps begin."""

    @property
    def part(self) -> Part:
        """All of them as one, with the files of every graph."""
        first = self.parts[0]
        if len(self.parts) == 1:
            return first
        files = tuple(dict.fromkeys(reference for part in self.parts for reference in part.graph.files))
        return dataclasses.replace(
            first, stage=self.stage.partition("@")[0], graph=dataclasses.replace(first.graph, files=files)
        )


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


def parts_of(folders: Sequence[Path], stages_from: Mapping[str, Path]) -> dict[str, Part]:
    """What a bundle is built from, by stage; stages of further sizes are named `denoise/1@1024`, `decode@1024`.

    Args:
        folders: graphs of one checkpoint, one folder per size; the first one's text encoder serves all.
        stages_from: stage of the first size -> another folder of the same graphs in another precision.
    Raises: BundleError if the folders do not belong together.
    """
    manifests = {folder: read_graphs(folder) for folder in dict.fromkeys((*folders, *stages_from.values()))}
    first = manifests[folders[0]]
    sizes = [manifests[folder].size_px for folder in folders]
    if len(set(sizes)) != len(sizes):
        raise BundleError(f"the graphs in {', '.join(map(str, folders))} have the sizes {sizes}; each is to have its own")
    _require_equal(manifests, folders[0], folders[1:], ("source", "schedule", "batch", "tokenizers", "precision", "toolchain"))
    _require_equal(manifests, folders[0], tuple(stages_from.values()), ("source", "schedule", "batch", "tokenizers", "size_px"))
    parts: dict[str, Part] = {}
    for folder in folders:
        manifest = manifests[folder]
        for stage, graph in graphs_of(manifest):
            if manifest is first or stage != "text":
                name = sized_stage(stage, manifest.size_px, first.size_px)
                parts[name] = Part(stage=stage, folder=folder, manifest=manifest, graph=graph)
    for stage, folder in stages_from.items():
        graphs = dict(graphs_of(manifests[folder]))
        parts[stage] = Part(stage=stage, folder=folder, manifest=manifests[folder], graph=graphs[stage])
    return parts


def jobs_of(parts: Mapping[str, Part]) -> list[Job]:
    """The engines to build, in the order of `parts`: one for each, but for denoisers of one folder, which share one."""
    groups: dict[tuple[Path, str], dict[str, Part]] = {}
    for stage, part in parts.items():
        groups.setdefault((part.folder, part.stage.partition("/")[0]), {})[stage] = part
    return [_job(group) for group in groups.values()]


def _job(group: Mapping[str, Part]) -> Job:
    ordered = sorted(group.items(), key=lambda item: num_steps_of(item[1].stage))
    kind, _, at_size = ordered[0][0].partition("@")
    counts = ",".join(str(num_steps_of(part.stage)) for _, part in ordered)
    first_rows, row = {}, 0
    for stage, part in ordered:
        first_rows[stage] = row
        row += num_steps_of(part.stage)
    return Job(
        stage=(kind if len(ordered) == 1 else f"denoise/{counts}") + (f"@{at_size}" if at_size else ""),
        parts=tuple(part for _, part in ordered),
        first_rows=first_rows,
    )


def num_steps_of(stage: str) -> int:
    """`denoise/4` -> 4; 0 for stages that are the same for every step count."""
    return int(stage.partition("/")[2] or 0)


def sized_stage(stage: str, size_px: int, first_px: int) -> str:
    """As `Bundle.stage` names it: `decode`, or `decode@1024` where that is not the bundle's first size."""
    return stage if size_px == first_px or stage == "text" else f"{stage}@{size_px}"


def _require_equal(manifests: Mapping[Path, GraphsManifest], first: Path, others: Sequence[Path], names: Sequence[str]) -> None:
    for folder in others:
        for name in names:
            if getattr(manifests[folder], name) != getattr(manifests[first], name):
                raise BundleError(f"{folder} and {first} differ in {name}, so they make no bundle together; export both again")

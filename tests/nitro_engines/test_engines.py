"""Builds of single engines: what is taken over from earlier builds, and what is said when the same is built again."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nitro_engines import engines as engines_module
from nitro_engines.backends.base import SEED_TIMING
from nitro_engines.bundle import bundle_from_graphs
from nitro_engines.cache import EngineCache
from nitro_engines.engines import Builder
from nitro_engines.graphs import jobs_of, parts_of
from nitro_engines.history import expected_seconds, timing_of
from nitro_rt.manifest import Graph

MakeGraphs = Callable[..., Path]


class TimingBackend:
    """Keeps a timing cache, as TensorRT: what it began with, and what it compiled. The engine is a copy of the graph."""

    name = "timing"

    def __init__(self, gpu: str = "NVIDIA H100") -> None:
        self.began_with: list[str] = []
        self.suffixes = itertools.repeat(b"")
        """What is added to every engine: chosen by chance where two kernels are as fast."""
        self._gpu = gpu

    def toolchain(self) -> dict[str, str]:
        return {"timing": "1"}

    def target(self) -> dict[str, str]:
        return {"device": "cuda", "gpu": self._gpu}

    def options(self, graph_dtype: str) -> dict[str, str]:
        return {}

    def compute_dtype(self, graph_dtype: str) -> str:
        return graph_dtype

    def compile(self, onnx_path: Path, graph: Graph, work: Path, progress: Any = None) -> list[Path]:
        engine, seed, timing = work / "engine.copy", work / SEED_TIMING, work / "engine.timing"
        engine.write_bytes(onnx_path.read_bytes() + next(self.suffixes))
        self.began_with.append(seed.read_text() if seed.is_file() else "")
        timing.write_text(f"{self.began_with[-1]} {onnx_path.stem}".strip())
        return [engine, timing]


@pytest.fixture
def parts(make_graphs: MakeGraphs) -> Any:
    return parts_of((make_graphs(),), {})


def test_each_engine_begins_with_the_newest_timing_cache(parts: Any, cache: EngineCache) -> None:
    backend = TimingBackend()
    built = Builder(backend=backend, cache=cache).build(parts)
    assert backend.began_with == ["", "text", "text denoise-1"]
    timing = timing_of(built.engines["decode"])
    assert timing is not None and cache.path(timing).read_text() == "text denoise-1 decode"
    other = TimingBackend(gpu="NVIDIA H200")
    Builder(backend=other, cache=cache).build({"text": parts["text"]})
    assert other.began_with == [""]  # measured on another GPU, the times are worth nothing


def test_step_counts_share_one_engine(make_graphs: MakeGraphs, cache: EngineCache, backend: Any) -> None:
    parts = parts_of((make_graphs(steps=(1, 2, 4), external=True),), {})
    first, second = (Builder(backend=backend, cache=cache).build(parts) for _ in range(2))
    assert backend.compiled == ["text", "denoise-1-2-4", "decode"]
    one, two, four = (first.engines[f"denoise/{count}"] for count in (1, 2, 4))
    assert one.files == two.files == four.files and one.key == four.key
    assert (one.first_row, two.first_row, four.first_row) == (0, 1, 3)
    assert first.states == dict.fromkeys(parts, "built") and second.states == dict.fromkeys(parts, "cached")
    assert first.engines == second.engines and list(first.seconds) == ["text", "denoise/1,2,4", "decode"]
    fewer = parts_of((make_graphs("fewer", steps=(1, 4), external=True),), {})
    others = Builder(backend=backend, cache=cache).build(fewer)
    assert others.engines["denoise/4"].first_row == 1 and others.engines["denoise/4"].key != four.key
    assert backend.compiled[3:] == ["denoise-1-4"]


def test_each_folder_and_size_has_its_own_denoiser(make_graphs: MakeGraphs, cache: EngineCache) -> None:
    small, large = make_graphs(steps=(1, 2)), make_graphs("large", steps=(1, 2), size_px=64)
    stages = [list(job.first_rows) for job in jobs_of(parts_of((small, large), {}))]
    assert stages == [
        ["text"],
        ["denoise/1", "denoise/2"],
        ["decode"],
        ["denoise/1@64", "denoise/2@64"],
        ["decode@64"],
    ]
    elsewhere = make_graphs("elsewhere", steps=(1, 2))
    jobs = jobs_of(parts_of((small,), {"denoise/2": elsewhere}))
    assert [(job.stage, job.first_rows) for job in jobs] == [
        ("text", {"text": 0}),
        ("denoise/1", {"denoise/1": 0}),
        ("denoise/2", {"denoise/2": 0}),
        ("decode", {"decode": 0}),
    ]


def test_a_rebuild_begins_with_the_engines_own(parts: Any, cache: EngineCache) -> None:
    backend = TimingBackend()
    Builder(backend=backend, cache=cache).build(parts)
    built = Builder(backend=backend, cache=cache, rebuild=True).build({"text": parts["text"]})
    assert backend.began_with[-1] == "text" and built.states == {"text": "identical"}


def test_a_bundle_pins_the_timing_caches_of_its_engines(make_graphs: MakeGraphs, cache: EngineCache, tmp_path: Path) -> None:
    graphs, out = make_graphs(), tmp_path / "bundle"
    bundle_from_graphs(graphs, out, TimingBackend(), cache)
    backend = TimingBackend()
    bundle_from_graphs(graphs, out, backend, EngineCache(tmp_path / "another cache"))
    assert backend.began_with == ["text", "text denoise-1", "text denoise-1 decode"]


def test_a_damaged_timing_cache_is_not_begun_with(parts: Any, cache: EngineCache) -> None:
    backend = TimingBackend()
    built = Builder(backend=backend, cache=cache).build({"text": parts["text"]})
    timing = timing_of(built.engines["text"])
    assert timing is not None
    cache.path(timing).write_text("edited")
    Builder(backend=backend, cache=cache).build({"decode": parts["decode"]})
    (record,) = (cache.root / "timings").iterdir()
    record.write_text("{")
    Builder(backend=backend, cache=cache).build({"denoise/1": parts["denoise/1"]})
    assert backend.began_with == ["", "", ""]


@pytest.mark.parametrize(
    ("suffixes", "state", "said"),
    [
        ((b"", b""), "identical", "text: built again, byte for byte the same ("),
        ((b"", b"!"), "different", "text: built again, and other bytes came out: "),
    ],
)
def test_a_rebuild_says_whether_the_same_comes_out(
    parts: Any, cache: EngineCache, suffixes: tuple[bytes, ...], state: str, said: str
) -> None:
    backend, lines = TimingBackend(), []
    backend.suffixes = iter(suffixes)
    builder = Builder(backend=backend, cache=cache, report=lines.append, rebuild=True)
    first = builder.build({"text": parts["text"]})
    assert first.states == {"text": "built"}  # nothing to compare it with
    second = builder.build({"text": parts["text"]})
    assert second.states == {"text": state} and lines[-1].startswith(said)
    before, now = (built.engines["text"].files[0].num_bytes for built in (first, second))
    assert f"of {now} bytes" in lines[-1] and f"of {before} bytes" in lines[-1]
    assert cache.find(second.engines["text"].key) == second.engines["text"]  # the newer one is kept


def test_a_rebuilt_bundle_is_published_with_the_new_engines(
    make_graphs: MakeGraphs, cache: EngineCache, tmp_path: Path
) -> None:
    graphs, out, backend = make_graphs(), tmp_path / "bundle", TimingBackend()
    backend.suffixes = itertools.repeat(b"x")
    first = bundle_from_graphs(graphs, out, backend, cache)
    backend.suffixes = itertools.repeat(b"y")
    second = bundle_from_graphs(graphs, out, backend, cache, rebuild=True)
    assert set(second.stages.values()) == {"different"} and second.published
    assert first.manifest.engine_key == second.manifest.engine_key


def test_how_long_it_will_take_is_what_it_took_by_size(
    parts: Any, cache: EngineCache, make_graphs: MakeGraphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend, graph = TimingBackend(), parts["text"].graph
    Builder(backend=backend, cache=cache).build(parts)
    assert expected_seconds(backend, "text", graph, cache) is None  # too short to be worth a record
    monkeypatch.setattr(engines_module, "FIRST_LINE_S", 0.0)
    clock = iter([0.0, 0.0, 90.0, 90.0])
    monkeypatch.setattr(engines_module, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    Builder(backend=backend, cache=cache, rebuild=True).build({"text": parts["text"]})
    assert expected_seconds(backend, "text", graph, cache) == 90
    shorter = dataclasses.replace(graph.files[0], num_bytes=graph.files[0].num_bytes // 2)
    half = dataclasses.replace(graph, files=(shorter,))
    assert expected_seconds(backend, "text", half, cache) == pytest.approx(45, rel=0.01)
    assert expected_seconds(backend, "decode", graph, cache) is None
    (record,) = (cache.root / "durations").iterdir()
    record.write_text('{"seconds": "many"}')
    assert expected_seconds(backend, "text", graph, cache) is None

"""Each field of the engine key, flipped alone: the bundle has another key, and --explain names that field."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import nitro_export
from nitro_engines import BuildRequest, EngineCache, build, plan
from nitro_engines.fields import stage_fields
from nitro_engines.graphs import parts_of
from nitro_rt.manifest import EXPORT_FILE, Graph


class GpuBackend:
    """A backend whose every answer can be changed; its engines are copies of the graphs."""

    name = "tensorrt"

    def __init__(self) -> None:
        self.versions = {"tensorrt": "11.4.0", "polygraphy": "0.53.6"}
        self.machine = {"device": "cuda", "gpu": "NVIDIA H100", "compute_capabilities": "9.0", "driver": "580.65.06"}
        self.chosen = {"weights": "whole"}

    def toolchain(self) -> dict[str, str]:
        return dict(self.versions)

    def target(self) -> dict[str, str]:
        return dict(self.machine)

    def options(self, graph_dtype: str) -> dict[str, str]:
        return dict(self.chosen)

    def compute_dtype(self, graph_dtype: str) -> str:
        return graph_dtype

    def compile(self, onnx_path: Path, graph: Graph, work: Path, progress: Any = None) -> list[Path]:
        (work / "engine.plan").write_bytes(onnx_path.read_bytes())
        return [work / "engine.plan"]


@dataclasses.dataclass
class Bench:
    """A build that was done, and what can be changed about the next."""

    request: BuildRequest
    cache: EngineCache
    backend: GpuBackend
    make_graphs: Callable[..., Path]
    monkeypatch: pytest.MonkeyPatch
    seed: int = 0
    """Of the weights that an export writes."""

    def export(self, checkpoint: Path, out: Path, **options: Any) -> None:
        shared = {name: options[name] for name in ("steps", "shift", "precision", "size_px", "batch")}
        graphs = self.make_graphs("made", seed=self.seed, **shared)
        edit(graphs, lambda data: data["source"].update(checkpoint_sha256=nitro_export.checkpoint_sha256(checkpoint)))
        edit(graphs, lambda data: data.update(toolchain=nitro_export.toolchain()))
        graphs.rename(out)

    @property
    def graphs(self) -> Path:
        (folder,) = self.cache.graphs.iterdir()
        return folder


def edit(graphs: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads((graphs / EXPORT_FILE).read_text())
    change(data)
    (graphs / EXPORT_FILE).write_text(json.dumps(data))


@pytest.fixture
def bench(
    checkpoint: Path, tmp_path: Path, cache: EngineCache, make_graphs: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> Bench:
    request = BuildRequest(model=str(checkpoint), backend="tensorrt", precision="fp16", out=tmp_path / "out" / "bundle")
    bench = Bench(request, cache, GpuBackend(), make_graphs, monkeypatch)
    monkeypatch.setattr(nitro_export, "export_checkpoint", bench.export)
    monkeypatch.setattr(sys.modules["nitro_engines.plan"], "load_backend", lambda *_, **__: bench.backend)
    monkeypatch.setattr(sys.modules["nitro_engines.build"], "Gate", lambda **options: None)
    build(bench.request, cache=cache)
    found = plan(bench.request, cache)
    assert set(found.stages.values()) == {"cached"} and found.differences == ()
    return bench


def changed(**options: Any) -> Callable[[Bench], None]:
    def change(bench: Bench) -> None:
        bench.request = dataclasses.replace(bench.request, **options)

    return change


def answers(attribute: str, name: str, value: str) -> Callable[[Bench], None]:
    return lambda bench: getattr(bench.backend, attribute).update({name: value})


def other_weights(bench: Bench) -> None:
    path = Path(bench.request.model) / "unet" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x40")


def other_graph(bench: Bench) -> None:
    """As a new exporter that forgot to change its version would write it."""
    folder = bench.graphs
    folder.rename(folder.with_name("before"))
    bench.seed = 7
    sizes = {"steps": (1,), "shift": 500, "precision": "fp16", "size_px": 64, "batch": 1}
    bench.export(Path(bench.request.model), folder, **sizes)


def other_recipe(bench: Bench) -> None:
    edit(bench.graphs, lambda data: data.update(quantisation={"seed": 1}))


def other_exporter(bench: Bench) -> None:
    versions = {**nitro_export.toolchain(), "torch": "99.0"}
    bench.monkeypatch.setattr(nitro_export, "toolchain", lambda: versions)


def other_source(bench: Bench) -> None:
    bench.monkeypatch.setattr("nitro_engines.fields.source_sha256", lambda package: "0" * 64)


FLIPS: dict[str, Callable[[Bench], None]] = {
    # weights, ONNX
    "checkpoint_sha256": other_weights,
    "onnx_sha256.denoise/1": other_graph,
    # shapes, steps
    "sizes_px": changed(sizes_px=(96,)),
    "batch": changed(batch=2),
    "steps": changed(steps=(2,)),
    "shift": changed(shift=250),
    # precision and its recipe
    "precision": changed(precision="fp32"),
    "recipe_sha256": other_recipe,
    # builder options
    "options.weights": answers("chosen", "weights", "refit"),
    # toolchain
    "toolchain.tensorrt": answers("versions", "tensorrt", "11.5.0"),
    "toolchain.polygraphy": answers("versions", "polygraphy", "0.54.0"),
    "toolchain.torch": other_exporter,
    "toolchain.backend_source": other_source,
    # target GPU and driver
    "target.gpu": answers("machine", "gpu", "NVIDIA H200"),
    "target.compute_capabilities": answers("machine", "compute_capabilities", "10.0"),
    "target.driver": answers("machine", "driver", "590.10"),
}


@pytest.mark.parametrize("field", FLIPS)
def test_a_flipped_field_misses_the_cache_and_is_named(bench: Bench, field: str) -> None:
    before = plan(bench.request, bench.cache)
    FLIPS[field](bench)
    after = plan(bench.request, bench.cache)
    assert after.engine_key != before.engine_key and after.nearest_key == before.engine_key
    named = {difference.field for difference in after.differences}
    # Other numbers in the network are another graph for every stage, and float32 is another option of the backend, too.
    beside = {"onnx_sha256.text", "onnx_sha256.decode"} if field.startswith("onnx") else {"options.compute_dtype"}
    assert field in named and named - {field} <= (beside if field != "toolchain.torch" else {"toolchain.export_source"}), named
    line = next(line for line in after.lines(explain=True) if line.startswith(f"  {field}: "))
    assert "wanted, " in line and line.endswith("cached")
    if field != "recipe_sha256":  # which decides nothing but the graphs, and those are as they were
        assert "cached" not in after.stages.values()


def test_every_field_of_the_key_is_flipped(bench: Bench) -> None:
    flipped = {field.partition(".")[0] for field in FLIPS}
    assert flipped | {"backend"} == set(plan(bench.request, bench.cache).fields)


def test_what_decides_an_engine(bench: Bench) -> None:
    """No more than that: neither the size's place in the bundle nor the other step counts."""
    part = parts_of((bench.graphs,), {})["decode"]
    fields = stage_fields(part.manifest, part.stage, part.graph, bench.backend)
    decided_by_the_graph = {"stage", "checkpoint_sha256", "onnx_sha256", "inputs", "outputs"}
    assert set(fields) == decided_by_the_graph | {"precision", "backend", "options", "toolchain", "target"}


def test_what_is_compiled_and_judged_on_the_gpu_needs_no_cpu_to_run(bench: Bench) -> None:
    (built,) = plan(bench.request, bench.cache).memory.values()
    assert [step.name for step in built.steps] == ["drawing the references"] and built.gpu_bytes
    (again,) = plan(dataclasses.replace(bench.request, rebuild=True), bench.cache).memory.values()
    compiled = [f"compiling {stage}" for stage in ("text", "denoise/1", "decode")]
    assert [step.name for step in again.steps] == ["drawing the references", *compiled]

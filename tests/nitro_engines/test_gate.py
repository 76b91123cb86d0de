"""The quality gate over hand-made graphs: faults planted in weights are not published, and what was measured is recorded."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from PIL import Image

import nitro_engines.gate
from nitro_engines.backends import load_backend
from nitro_engines.backends.onnx_file import OnnxRuntimeBackend
from nitro_engines.bundle import bundle_from_graphs
from nitro_engines.cache import EngineCache
from nitro_engines.gate import Gate
from nitro_rt import Pipeline
from nitro_rt.bundle import open_bundle
from nitro_rt.device import Driver, Gpu, find_driver
from nitro_rt.errors import BuildError, BundleError
from nitro_rt.manifest import GraphsManifest, Reference, sha256_of
from nitro_rt.quality import LIMITS
from nitro_rt.verify import verify_bundle

MakeGraphs = Callable[..., Path]
STEPS = (1, 2)
PROMPTS = ("a red apple", "the blue cat")


def edit_weights(graphs: Path, name: str, tensor: str, change: Callable[[np.ndarray], np.ndarray]) -> Path:
    """Change one initializer of a graph, with right digests: what a wrong scale or a broken conversion does."""
    path = graphs / f"{name}.onnx"
    model = onnx.load(str(path))
    (initializer,) = [found for found in model.graph.initializer if found.name == tensor]
    changed = change(numpy_helper.to_array(initializer)).astype(numpy_helper.to_array(initializer).dtype)
    initializer.CopyFrom(numpy_helper.from_array(changed, tensor))
    path.unlink()  # bundles hold hard links to it
    onnx.save_model(model, str(path))
    manifest = json.loads((graphs / "export.json").read_text())
    stage, _, steps = name.partition("-")
    entry = manifest[stage][steps] if steps else manifest[stage]
    entry["files"][0].update(sha256=sha256_of(path), num_bytes=path.stat().st_size)
    (graphs / "export.json").write_text(json.dumps(manifest))
    return graphs


def calm(graphs: Path, steps: tuple[int, ...] = STEPS) -> Path:
    """Hand-made graphs whose pictures are not saturated."""
    for count in steps:
        edit_weights(graphs, f"denoise-{count}", "kernel_out", lambda weights: weights * 0.05)
    return edit_weights(graphs, "decode", "gain", lambda gain: gain * 0.25)


@pytest.fixture
def cache(tmp_path_factory: pytest.TempPathFactory) -> EngineCache:
    return EngineCache(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def graphs(make_graphs: MakeGraphs) -> Path:
    return calm(make_graphs(steps=STEPS, batch=2))


@pytest.fixture
def gate(graphs: Path, cache: EngineCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Gate:
    """A gate whose references are what the healthy graphs draw."""
    healthy = bundle_from_graphs(graphs, tmp_path / "healthy", load_backend("onnxruntime"), cache).out

    def references(checkpoint: Any, manifest: GraphsManifest, num_prompts: int, cache: EngineCache, report: Any) -> Any:
        found = []
        with Pipeline.load(healthy) as pipe, cache.making("pictures", "pictures") as work:
            for num_steps in sorted(manifest.denoise):
                for seed, prompt in enumerate(PROMPTS[:num_prompts]):
                    path = work / "picture.png"
                    pipe(prompt, seed=[seed], steps=num_steps).images[0].save(path)
                    found.append(Reference(prompt=prompt, seed=seed, steps=num_steps, file=cache.adopt(path)))
        return tuple(found)

    monkeypatch.setattr("nitro_engines.gate.references_of", references)
    return Gate(checkpoint=lambda: tmp_path, num_prompts=2)


def test_a_good_bundle_is_published_with_its_figures(graphs: Path, gate: Gate, cache: EngineCache, tmp_path: Path) -> None:
    lines: list[str] = []
    result = bundle_from_graphs(graphs, tmp_path / "out", load_backend("openvino"), cache, lines.append, gate=gate)
    found = open_bundle(tmp_path / "out")
    assert found.manifest == result.manifest and len(found.manifest.references) == 4
    assert [(entry.num_steps, entry.num_images, entry.judged_on) for entry in found.manifest.quality_gate] == [
        (1, 2, "openvino"),
        (2, 2, "openvino"),
    ]
    for entry in found.manifest.quality_gate:
        assert entry.passed and not entry.loss_allowed and entry.limits == LIMITS["fp32"]
        assert entry.psnr_db.worst >= LIMITS["fp32"].psnr_db and entry.compute_dtypes["decode"] == "float32"
    assert any(line.startswith("quality, 2 steps: PSNR ") and line.endswith(": passed") for line in lines)
    assert {"references", "quality gate"} <= set(result.seconds)
    checks = {check.name: check.status for check in verify_bundle(tmp_path / "out")}
    assert checks["quality, 1 step"] == checks["quality, 2 steps"] == "ok"


def test_every_size_has_its_references_and_figures(
    cache: EngineCache, tmp_path: Path, make_graphs: MakeGraphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [calm(make_graphs(f"at-{size_px}", size_px=size_px), (1,)) for size_px in (32, 64)]
    backend, options = load_backend("onnxruntime"), {"more_sizes": folders[1:]}
    healthy = bundle_from_graphs(folders[0], tmp_path / "healthy", backend, cache, **options).out

    def references(checkpoint: Any, manifest: GraphsManifest, num_prompts: int, cache: EngineCache, report: Any) -> Any:
        with Pipeline.load(healthy) as pipe, cache.making("pictures", "pictures") as work:
            path = work / "picture.png"
            pipe(PROMPTS[0], seed=[0], size=manifest.size_px).images[0].save(path)
            return (Reference(prompt=PROMPTS[0], seed=0, steps=1, file=cache.adopt(path)),)

    monkeypatch.setattr("nitro_engines.gate.references_of", references)
    gate, lines = Gate(checkpoint=lambda: tmp_path, num_prompts=1), []
    out = bundle_from_graphs(folders[0], tmp_path / "out", backend, cache, lines.append, gate=gate, **options).out
    manifest = open_bundle(out).manifest
    assert [reference.size_px for reference in manifest.references] == [0, 64]
    assert [(entry.size_px, entry.num_steps, entry.passed) for entry in manifest.quality_gate] == [(0, 1, True), (64, 1, True)]
    assert any(line.startswith("quality, 1 step at 64 px: PSNR ") for line in lines)
    checks = {check.name: check.status for check in verify_bundle(out)}
    assert checks["quality, 1 step, 32 px"] == checks["quality, 1 step, 64 px"] == "ok"
    damaged = edit_weights(folders[1], "decode", "kernel", lambda weights: weights * 1.5)
    with pytest.raises(BuildError, match="quality, 1 step at 64 px: .* missed"):
        bundle_from_graphs(folders[0], tmp_path / "other", backend, cache, gate=gate, more_sizes=[damaged])


def test_what_was_measured_is_not_measured_again(
    graphs: Path, gate: Gate, cache: EngineCache, tmp_path: Path, monkeypatch: Any
) -> None:
    first = bundle_from_graphs(graphs, tmp_path / "out", load_backend("onnxruntime"), cache, gate=gate)
    monkeypatch.setattr("nitro_engines.gate.compare_with_parent", lambda *_: pytest.fail("measured again"))
    second = bundle_from_graphs(graphs, tmp_path / "out", load_backend("onnxruntime"), cache, gate=gate)
    assert first.published and not second.published and second.manifest == first.manifest


def test_another_runtime_is_measured_again(
    graphs: Path, gate: Gate, cache: EngineCache, tmp_path: Path, monkeypatch: Any
) -> None:
    bundle_from_graphs(graphs, tmp_path / "out", load_backend("onnxruntime"), cache, gate=gate)
    drawn = counted_drawings(monkeypatch)
    monkeypatch.setattr("nitro_engines.gate.runtime_sha256", lambda: "0" * 64)
    bundle_from_graphs(graphs, tmp_path / "out", load_backend("onnxruntime"), cache, gate=gate)
    assert drawn == [1, 2]


def counted_drawings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The step counts that the gate draws with from now on."""
    compare, drawn = nitro_engines.gate.compare_with_parent, []

    def counted(pipe: Pipeline, num_steps: int) -> Any:
        drawn.append(num_steps)
        return compare(pipe, num_steps)

    monkeypatch.setattr("nitro_engines.gate.compare_with_parent", counted)
    return drawn


@pytest.mark.parametrize(
    ("name", "tensor", "change"),
    [
        ("decode", "kernel", lambda weights: weights * 1.5),
        ("denoise-2", "alpha_N", lambda alpha: alpha * -3),
        ("text", "projection", lambda weights: weights * 4),
    ],
)
def test_a_bundle_with_a_damaged_layer_is_not_published(
    graphs: Path, gate: Gate, cache: EngineCache, tmp_path: Path, name: str, tensor: str, change: Any
) -> None:
    damaged, out = edit_weights(graphs, name, tensor, change), tmp_path / "out"
    with pytest.raises(BuildError) as caught:
        bundle_from_graphs(damaged, out, load_backend("onnxruntime"), cache, gate=gate)
    message = str(caught.value)
    assert "misses its quality limits and is not published" in message and "--allow-quality-loss" in message
    assert "quality, 2 steps: PSNR " in message and f"(limit {LIMITS['fp32'].psnr_db:g})" in message
    assert not out.exists() and not list((cache.root / "work").iterdir())
    assert not [path for path in out.parent.iterdir() if ".nitro-" in path.name]


def test_a_loss_that_is_allowed_is_recorded(graphs: Path, gate: Gate, cache: EngineCache, tmp_path: Path) -> None:
    damaged = edit_weights(graphs, "denoise-2", "alpha_N", lambda alpha: alpha * -3)
    allowing, lines = dataclasses.replace(gate, allow_quality_loss=True), []
    out = bundle_from_graphs(damaged, tmp_path / "out", load_backend("onnxruntime"), cache, lines.append, gate=allowing).out
    entries = open_bundle(out).manifest.quality_gate
    assert [(entry.num_steps, entry.passed, entry.loss_allowed) for entry in entries] == [(1, True, False), (2, False, True)]
    assert any(line.endswith(": missed, allowed") for line in lines)
    found = {check.name: check.detail for check in verify_bundle(out)}
    assert found["quality, 2 steps"].endswith("published with --allow-quality-loss")
    with pytest.raises(BuildError, match="misses its quality limits"):  # what was measured is cached, the verdict is not
        bundle_from_graphs(damaged, tmp_path / "other", load_backend("onnxruntime"), cache, gate=gate)


def test_an_older_bundle_stays_where_its_successor_fails(graphs: Path, gate: Gate, cache: EngineCache, tmp_path: Path) -> None:
    out = bundle_from_graphs(graphs, tmp_path / "out", load_backend("onnxruntime"), cache, gate=gate).out
    before = (out / "bundle.json").read_bytes()
    damaged = edit_weights(graphs, "decode", "kernel", lambda weights: weights * 1.5)
    with pytest.raises(BuildError, match="misses its quality limits"):
        bundle_from_graphs(damaged, out, load_backend("onnxruntime"), cache, gate=gate)
    assert (out / "bundle.json").read_bytes() == before
    open_bundle(out).verify()


@pytest.mark.parametrize("fault", ["uniform", "saturated"])
def test_references_that_judge_nothing_are_refused(
    graphs: Path, gate: Gate, cache: EngineCache, tmp_path: Path, monkeypatch: Any, fault: str
) -> None:
    side = np.arange(32)
    picture = np.zeros((32, 32, 3), np.uint8)
    if fault == "saturated":
        picture[(side[:, None] + side) % 2 == 0] = 255

    def references(*_: Any) -> tuple[Reference, ...]:
        with cache.making("pictures", "pictures") as work:
            Image.fromarray(picture).save(work / "picture.png")
            file = cache.adopt(work / "picture.png")
        return tuple(Reference(prompt="a red apple", seed=0, steps=steps, file=file) for steps in STEPS)

    monkeypatch.setattr("nitro_engines.gate.references_of", references)
    with pytest.raises(BundleError, match=f"reference 1 of 1 is {fault}"):
        bundle_from_graphs(graphs, tmp_path / "out", load_backend("onnxruntime"), cache, gate=gate)
    assert not (tmp_path / "out").exists()


class DeviceBackend:
    """Stands in for TensorRT-RTX: its engines load nowhere here."""

    name = "tensorrt-rtx"

    def toolchain(self) -> dict[str, str]:
        return {"tensorrt-rtx": "1"}

    def target(self) -> dict[str, str]:
        return {"device": "cuda", "targets": "sm89"}

    def options(self, graph_dtype: str) -> dict[str, str]:
        return {}

    def compute_dtype(self, graph_dtype: str) -> str:
        return graph_dtype

    def compile(self, onnx_path: Path, graph: Any, work: Path, progress: Any = None) -> list[Path]:
        (work / "engine.plan").write_bytes(b"plan of " + onnx_path.read_bytes())
        return [work / "engine.plan"]


def test_engines_that_do_not_run_here_are_judged_by_their_graphs(
    graphs: Path, gate: Gate, cache: EngineCache, tmp_path: Path
) -> None:
    lines: list[str] = []
    out = bundle_from_graphs(graphs, tmp_path / "out", DeviceBackend(), cache, lines.append, gate=gate).out  # type: ignore[arg-type]
    manifest = open_bundle(out).manifest
    assert manifest.decode.backend == "tensorrt-rtx"
    assert {entry.judged_on for entry in manifest.quality_gate} == {"onnxruntime"}
    assert "tensorrt-rtx engines do not run on this machine; their graphs are judged on onnxruntime" in lines
    damaged = edit_weights(graphs, "decode", "kernel", lambda weights: weights * 1.5)
    with pytest.raises(BuildError, match="on onnxruntime: missed"):
        bundle_from_graphs(damaged, tmp_path / "other", DeviceBackend(), cache, gate=gate)  # type: ignore[arg-type]


def test_another_stand_in_judges_again(graphs: Path, gate: Gate, cache: EngineCache, tmp_path: Path, monkeypatch: Any) -> None:
    out, drawn = tmp_path / "out", counted_drawings(monkeypatch)
    for version in ("1", "1", "2"):
        monkeypatch.setattr(OnnxRuntimeBackend, "toolchain", lambda self, version=version: {"onnxruntime": version})
        bundle_from_graphs(graphs, out, DeviceBackend(), cache, gate=gate)  # type: ignore[arg-type]
    assert drawn == [1, 2, 1, 2]


def test_a_gpu_that_was_not_there_judges_again(
    graphs: Path, gate: Gate, cache: EngineCache, tmp_path: Path, monkeypatch: Any
) -> None:
    drawn = counted_drawings(monkeypatch)
    for gpus in ((), (Gpu(name="NVIDIA L4", target="sm89"),)):
        driver = Driver(found=True, cuda_version="13.0", gpus=gpus, reason="")
        monkeypatch.setattr("nitro_engines.gate.find_driver", lambda driver=driver: driver)
        bundle_from_graphs(graphs, tmp_path / "out", DeviceBackend(), cache, gate=gate)  # type: ignore[arg-type]
    assert drawn == [1, 2, 1, 2]


@pytest.mark.skipif(bool(find_driver().gpus), reason="this machine has a GPU")
def test_graphs_for_a_gpu_provider_are_judged_on_the_cpu_provider(
    graphs: Path, gate: Gate, cache: EngineCache, tmp_path: Path
) -> None:
    lines: list[str] = []
    backend = load_backend("onnxruntime", provider="cuda")
    manifest = bundle_from_graphs(graphs, tmp_path / "out", backend, cache, lines.append, gate=gate).manifest
    assert manifest.target["device"] == "cuda" and manifest.quality_gate
    assert "CUDAExecutionProvider engines do not run on this machine; their graphs are judged on onnxruntime" in lines


def test_a_damaged_record_is_measured_again(graphs: Path, gate: Gate, cache: EngineCache, tmp_path: Path) -> None:
    first = bundle_from_graphs(graphs, tmp_path / "a", load_backend("onnxruntime"), cache, gate=gate).manifest
    (record,) = (cache.root / "gates").iterdir()
    record.write_text('{"schema_version": 1, "results": [{"num_steps": 1}]}')
    assert bundle_from_graphs(graphs, tmp_path / "b", load_backend("onnxruntime"), cache, gate=gate).manifest == first

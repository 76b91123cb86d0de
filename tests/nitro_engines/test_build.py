"""The whole job, with an exporter that writes hand-made graphs in no time; one slow test has the real one."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nitro_engines
import nitro_export
from nitro_engines import BuildRequest, EngineCache, build, plan
from nitro_rt.bundle import open_bundle
from nitro_rt.errors import BuildError, ConfigError, ModelNotFound


class Exporter:
    """Stands in for `nitro_export.export_checkpoint`."""

    def __init__(self, make_graphs: Callable[..., Path]) -> None:
        self.calls: list[dict[str, Any]] = []
        self.external = False
        """Whether weights lie beside the graphs."""
        self._make = make_graphs

    def __call__(self, checkpoint: Path, out: Path, *, report: Callable[[str], None], **options: Any) -> None:
        self.calls.append({"checkpoint": checkpoint, **options})
        shared = {name: options[name] for name in ("steps", "shift", "precision", "size_px", "batch")}
        graphs = self._make("made", external=self.external, **shared)
        manifest = json.loads((graphs / "export.json").read_text())
        manifest["source"]["checkpoint_sha256"] = nitro_export.checkpoint_sha256(checkpoint)
        manifest["toolchain"] = nitro_export.toolchain()
        (graphs / "export.json").write_text(json.dumps(manifest))
        graphs.rename(out)
        report(f"graphs in {out}")


@pytest.fixture
def exporter(make_graphs: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Exporter:
    exporter = Exporter(make_graphs)
    monkeypatch.setattr(nitro_export, "export_checkpoint", exporter)
    # The checkpoint has no weights to draw with; test_gate.py judges.
    monkeypatch.setattr(sys.modules["nitro_engines.build"], "Gate", lambda **options: None)
    return exporter


@pytest.fixture
def request_(checkpoint: Path, tmp_path: Path) -> BuildRequest:
    return BuildRequest(model=str(checkpoint), backend="onnxruntime", out=tmp_path / "engines" / "bundle")


def changed(request: BuildRequest, **options: Any) -> BuildRequest:
    return dataclasses.replace(request, **options)


def test_the_whole_job(request_: BuildRequest, cache: EngineCache, exporter: Exporter) -> None:
    lines: list[str] = []
    result = build(request_, lines.append, cache)
    open_bundle(result.out).verify()
    (call,) = exporter.calls
    assert (call["steps"], call["shift"], call["size_px"], call["precision"]) == ((1,), 500, 64, "fp32")
    assert (call["name"], call["origin"]) == ("little", "little")
    assert set(result.seconds) == {"export", "text", "denoise/1", "decode", "publish"}
    assert lines[0] == "graphs in the cache"  # and not in a folder that is gone when it is read


def test_the_second_time_all_comes_from_the_cache(request_: BuildRequest, cache: EngineCache, exporter: Exporter) -> None:
    first, lines = build(request_, cache=cache), []
    second = build(request_, lines.append, cache)
    assert len(exporter.calls) == 1 and "export" not in second.seconds
    assert second.manifest == first.manifest and not second.published
    assert lines[0] == "graphs from the cache"


def test_two_sizes_are_exported_and_built_into_one_bundle(
    request_: BuildRequest, cache: EngineCache, exporter: Exporter
) -> None:
    asked, lines = changed(request_, sizes_px=(64, 96)), []
    assert plan(asked, cache).stages == dict.fromkeys(("text", "denoise/1", "decode", "denoise/1@96", "decode@96"), "unknown")
    result = build(asked, lines.append, cache)
    assert [call["size_px"] for call in exporter.calls] == [64, 96]
    assert [line for line in lines if line.startswith("graphs at")] == ["graphs at 64 px:", "graphs at 96 px:"]
    assert result.manifest.sizes_px == (64, 96) and set(result.manifest.more_sizes) == {96}
    found = plan(asked, cache)
    assert found.engine_key == result.manifest.engine_key and set(found.stages.values()) == {"cached"}
    assert set(found.memory) == {64, 96} and {"size        64 px", "size        96 px"} <= set(found.lines())
    alone = build(changed(request_, sizes_px=(96,)), lines.append, cache)
    assert len(exporter.calls) == 2 and set(alone.stages.values()) == {"cached"}
    assert lines[-5] == "graphs from the cache"


def test_sizes_together_that_do_not_fit_the_disk(
    request_: BuildRequest, cache: EngineCache, exporter: Exporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = changed(request_, sizes_px=(64, 96))
    found = plan(asked, cache).memory
    room = max(forecast.disk_bytes for forecast in found.values())
    assert room > 0
    monkeypatch.setattr("nitro_engines.memory.free_mib", lambda root: room / 2**20)
    with pytest.raises(BuildError, match="64, 96 px together need .* Name fewer of --size"):
        build(asked, cache=cache)
    assert not exporter.calls


def test_weight_files_of_two_sizes_are_one_file(
    request_: BuildRequest, cache: EngineCache, make_graphs: Callable[..., Path], exporter: Exporter
) -> None:
    exporter.external = True
    build(changed(request_, sizes_px=(64, 96)), cache=cache)
    first, second = cache.graphs.iterdir()
    shared = {path.name for path in first.glob("*.data")} & {path.name for path in second.glob("*.data")}
    assert len(shared) == 3 and all((first / name).samefile(second / name) for name in shared)


def test_a_rebuild_is_planned_and_done(request_: BuildRequest, cache: EngineCache, exporter: Exporter) -> None:
    build(request_, cache=cache)
    again = changed(request_, rebuild=True)
    assert set(plan(again, cache).stages.values()) == {"build again"}
    assert set(build(again, cache=cache).stages.values()) == {"identical"} and len(exporter.calls) == 1


def test_the_default_place(
    request_: BuildRequest, cache: EngineCache, exporter: Exporter, monkeypatch: Any, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    result = build(changed(request_, out=None, steps=(2, 1)), cache=cache)
    assert result.out == tmp_path / "engines" / "little-1-2step"


def test_damaged_graphs_are_exported_again(request_: BuildRequest, cache: EngineCache, exporter: Exporter) -> None:
    build(request_, cache=cache)
    (graphs,) = cache.graphs.iterdir()
    (graphs / "text.onnx").write_bytes(b"damaged")
    assert not plan(request_, cache).graphs_cached
    lines: list[str] = []
    build(request_, lines.append, cache)
    assert len(exporter.calls) == 2 and "are damaged and are made again" in lines[0]
    open_bundle(request_.out or "").verify()


def test_an_edited_checkpoint_is_exported_again(request_: BuildRequest, cache: EngineCache, exporter: Exporter) -> None:
    build(request_, cache=cache)
    weights = Path(request_.model) / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x40")  # trained on
    build(request_, cache=cache)
    assert len(exporter.calls) == 2


def test_an_exporter_that_fails_is_told_and_leaves_nothing(
    request_: BuildRequest, cache: EngineCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(checkpoint: Path, out: Path, **options: Any) -> None:
        out.mkdir()
        raise RuntimeError("the exporter's own words")

    monkeypatch.setattr(nitro_export, "export_checkpoint", fails)
    with pytest.raises(BuildError, match="exporting little failed: the exporter's own words"):
        build(request_, cache=cache)
    assert not list((cache.root / "work").iterdir()) and not list(cache.graphs.iterdir())
    assert request_.out and not request_.out.exists()


def test_a_wrong_output_folder_is_refused_before_the_work(
    request_: BuildRequest, cache: EngineCache, exporter: Exporter
) -> None:
    assert request_.out
    request_.out.mkdir(parents=True)
    (request_.out / "holiday.jpg").write_text("mine")
    with pytest.raises(BuildError, match="holds 'holiday.jpg'"):
        build(request_, cache=cache)
    assert not exporter.calls


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"model": "/no/such/folder"}, ModelNotFound),
        ({"backend": "cuda"}, ConfigError),
        ({"backend": "tensorrt-rtx", "targets": ("sm90",)}, ConfigError),
        ({"sizes_px": (64, 100)}, ConfigError),
    ],
)
@pytest.mark.parametrize("job", [build, plan])
def test_wrong_requests(
    request_: BuildRequest, cache: EngineCache, options: dict[str, Any], error: type[Exception], job: Callable[..., Any]
) -> None:
    with pytest.raises(error):
        job(changed(request_, **options), cache=cache)
    assert not cache.root.exists()


def test_a_plan_before_anything_was_built(request_: BuildRequest, cache: EngineCache) -> None:
    found = plan(request_, cache)
    assert not found.graphs_cached and found.engine_key is None and found.nearest_key is None
    assert found.stages == dict.fromkeys(("text", "denoise/1", "decode"), "unknown")
    assert found.fields["shift"] == 500 and "onnxruntime" in found.fields["toolchain"] and "torch" in found.fields["toolchain"]
    assert "nothing was built with this cache before" in found.lines(explain=True)
    assert not cache.root.exists() and not found.out.parent.exists()


def test_a_plan_of_what_was_built(request_: BuildRequest, cache: EngineCache, exporter: Exporter) -> None:
    manifest = build(request_, cache=cache).manifest
    found = plan(request_, cache)
    assert found.engine_key == manifest.engine_key and found.fields == manifest.engine_key_fields
    assert set(found.stages.values()) == {"cached"} and found.differences == ()
    assert any("this very bundle was built before" in line for line in found.lines(explain=True))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"steps": (1, 2)}, {"steps"}),
        ({"shift": 250}, {"shift"}),
        ({"sizes_px": (96,)}, {"sizes_px"}),
        ({"sizes_px": (64, 96)}, {"sizes_px"}),
        ({"batch": 3}, {"batch"}),
        ({"precision": "fp16"}, {"precision"}),
        ({"backend": "openvino"}, {"backend", "toolchain.openvino"}),
    ],
)
def test_the_plan_names_what_differs_from_the_nearest(
    request_: BuildRequest, cache: EngineCache, exporter: Exporter, options: dict[str, Any], named: set[str]
) -> None:
    build(request_, cache=cache)
    found = plan(changed(request_, **options), cache)
    assert named <= {difference.field for difference in found.differences}
    if options.keys() & {"steps", "shift", "sizes_px", "batch"}:
        assert named == {difference.field for difference in found.differences}
    assert all(any(field in line for line in found.lines(explain=True)) for field in named)


def test_the_plan_says_which_engines_are_there(request_: BuildRequest, cache: EngineCache, exporter: Exporter) -> None:
    manifest = build(request_, cache=cache).manifest
    cache.path(manifest.decode.files[0]).unlink()
    assert plan(request_, cache).stages == {"text": "cached", "denoise/1": "cached", "decode": "build"}


def test_a_plan_is_json(request_: BuildRequest, cache: EngineCache, exporter: Exporter) -> None:
    build(request_, cache=cache)
    data = json.loads(json.dumps(plan(changed(request_, batch=2), cache).as_dict()))
    assert data["request"]["batch"] == 2 and data["differences"] == [{"field": "batch", "wanted": 2, "cached": 1}]


def test_neither_the_import_nor_a_plan_loads_torch(checkpoint: Path, tmp_path: Path) -> None:
    code = (
        "import sys, nitro_engines\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'onnx', 'onnxruntime', 'openvino', 'polygraphy', 'tensorrt_rtx'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        f"request = nitro_engines.BuildRequest(model={str(checkpoint)!r})\n"
        f"nitro_engines.plan(request, nitro_engines.EngineCache({str(tmp_path / 'c')!r}))\n"
        "assert heavy & set(sys.modules) <= {'openvino'}, heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_public_names() -> None:
    assert nitro_engines.__all__ == sorted(nitro_engines.__all__)
    assert all(hasattr(nitro_engines, name) for name in nitro_engines.__all__)


@pytest.mark.slow
def test_a_real_checkpoint_becomes_the_same_picture_on_both_backends(cache: EngineCache, tmp_path: Path) -> None:
    from checkpoints import make_tiny_sdxl
    from nitro_rt import Pipeline

    model, pictures = make_tiny_sdxl(tmp_path / "tiny"), []
    for backend in ("openvino", "onnxruntime"):
        request = BuildRequest(model=str(model), backend=backend, out=tmp_path / backend)
        with Pipeline.load(build(request, cache=cache).out) as pipe:
            pictures.append(np.asarray(pipe("a red apple", seed=0).images[0]).astype(int))
    assert np.abs(pictures[0] - pictures[1]).max() <= 1 and pictures[0].std() > 10

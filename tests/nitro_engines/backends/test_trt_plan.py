"""`--backend tensorrt` on a machine without a GPU: what it lacks is named, and with a driver and a library that are played
(shim/tensorrt) its whole path runs through the compiler's process."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nitro_engines.backends import load_backend
from nitro_engines.cache import EngineCache
from nitro_engines.engines import Builder
from nitro_engines.fields import stage_fields
from nitro_engines.graphs import parts_of, read_graphs
from nitro_engines.history import running_files, timing_of
from nitro_engines.keys import differences
from nitro_rt.device import Driver, Gpu, find_driver
from nitro_rt.errors import BackendUnavailable, BuildError, ConfigError

MakeGraphs = Callable[..., Path]
H100 = Gpu(name="NVIDIA H100 80GB HBM3", target="sm90")
DRIVER = Driver(found=True, cuda_version="13.0", gpus=(H100,), reason="", version="580.65.06")
HALF = json.dumps({"Layers": [{"LayerType": "gemm", "Inputs": [{"Format/Datatype": "Half"}]}]})
FLOAT = HALF.replace("Half", "Float")


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """load_backend("tensorrt") with this driver and TensorRT; the real one stands in the cache of modules nowhere."""
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    shim = str(Path(__file__).parent / "shim")
    monkeypatch.syspath_prepend(shim)
    monkeypatch.setenv("PYTHONPATH", shim)  # for the compiler's process
    monkeypatch.delitem(sys.modules, "nitro_engines.backends.trt_plan", raising=False)
    import nitro_engines.backends.trt_plan as trt_plan

    def load(driver: Driver = DRIVER, version: str = "11.4.0.106", refit: bool = False) -> Any:
        monkeypatch.setattr(trt_plan, "version", lambda *names: version if "tensorrt" in names else "0.53.6")
        monkeypatch.setattr(trt_plan, "find_driver", lambda: driver)
        return load_backend("tensorrt", refit=refit)

    yield load
    for name in ("tensorrt", "nitro_engines.backends.trt_plan"):
        sys.modules.pop(name, None)


@pytest.mark.trt
def test_the_target_is_the_gpu_and_its_driver(played: Callable[..., Any]) -> None:
    backend = played()
    assert backend.target() == {
        "device": "cuda",
        "gpu": "NVIDIA H100 80GB HBM3",
        "targets": "sm90",
        "compute_capabilities": "9.0",
        "driver": "580.65.06",
        "driver_cuda": "13.0",
    }
    assert backend.toolchain()["tensorrt"] == "11.4.0.106"
    blackwell = Gpu(name="NVIDIA RTX PRO 6000", target="sm120")
    found = played(Driver(found=True, cuda_version="13.1", gpus=(blackwell, H100), reason="", version="")).target()
    assert (found["compute_capabilities"], found["driver"]) == ("12.0", "unknown")


@pytest.mark.trt
def test_what_is_missing_is_named(played: Callable[..., Any]) -> None:
    nothing = Driver(found=False, cuda_version="", gpus=(), reason="no NVIDIA driver (libcuda.so.1 is not here)")
    with pytest.raises(BackendUnavailable, match=r"libcuda.so.1 is not here.* --backend tensorrt-rtx .* openvino"):
        played(nothing)
    with pytest.raises(BackendUnavailable, match=r"needs TensorRT 11 or newer, found 10.13.0.35; pip install --upgrade"):
        played(version="10.13.0.35")
    with pytest.raises(ConfigError, match="sm75.* has no bfloat16"):
        turing = Gpu(name="NVIDIA T4", target="sm75")
        played(Driver(found=True, cuda_version="13.0", gpus=(turing,), reason="")).compute_dtype("bfloat16")


@pytest.mark.trt
def test_engines_that_take_new_weights(played: Callable[..., Any], make_graphs: MakeGraphs, tmp_path: Path) -> None:
    """Their compilation asks CUDA, TensorRT-RTX's too, so here it can only be seen that it is asked for."""
    if find_driver().gpus:
        pytest.skip("with a GPU they are compiled: pytest -m gpu")
    with pytest.raises(ConfigError, match="--refit means nothing to --backend openvino, .* A LoRA is fused by --lora"):
        load_backend("openvino", refit=True)
    with pytest.raises(BackendUnavailable, match="--refit: TensorRT-RTX compiles .* only where CUDA is, and here is no NVIDIA"):
        load_backend("tensorrt-rtx", ("sm89",), refit=True)
    backend = played(refit=True)
    assert backend.options("float16") == {"refit": "yes"} and played().options("float16") == {}
    graphs = make_graphs(precision="fp16")
    with pytest.raises(BuildError, match="TensorRT refused text.onnx for sm90: .*CUDA_SUCCESS"):
        backend.compile(graphs / "text.onnx", read_graphs(graphs).text, tmp_path)


def test_targets_are_refused() -> None:
    with pytest.raises(ConfigError, match="sm89 means nothing to --backend tensorrt, which builds for the GPU of this"):
        load_backend("tensorrt", ("sm89",))


@pytest.mark.trt
def test_an_engine_with_its_timing_cache(
    make_graphs: MakeGraphs, cache: EngineCache, played: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Built, and built again from the timing cache that was kept with it."""
    monkeypatch.setenv("INSPECTION", HALF)
    lines: list[str] = []
    part = {"decode": parts_of((make_graphs(precision="fp16"),), {})["decode"]}
    engine = Builder(backend=played(), cache=cache).build(part).engines["decode"]
    assert [Path(reference.path).suffix for reference in engine.files] == [".plan", ".timing"]
    assert timing_of(engine) == engine.files[1] and running_files(engine) == engine.files[:1]
    again = Builder(backend=played(), cache=cache, report=lines.append, rebuild=True).build(part)
    assert again.states == {"decode": "identical"}
    assert "decode: built again, byte for byte the same" in lines[-1]


@pytest.mark.trt
def test_the_inspector_stops_a_float32_engine(
    make_graphs: MakeGraphs, cache: EngineCache, played: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INSPECTION", FLOAT)
    part = {"text": parts_of((make_graphs(precision="fp16"),), {})["text"]}
    with pytest.raises(BuildError, match="the engine of text.onnx should compute in float16, but its inspector lists"):
        Builder(backend=played(), cache=cache).build(part)
    assert not list((cache.engines / "entries").iterdir())


@pytest.mark.trt
def test_another_gpu_or_driver_is_another_engine(make_graphs: MakeGraphs, played: Callable[..., Any]) -> None:
    manifest = read_graphs(make_graphs(precision="fp16"))
    other = Gpu(name="NVIDIA H200", target="sm90")
    drivers = {
        "target.driver": Driver(found=True, cuda_version="13.0", gpus=(H100,), reason="", version="590.10"),
        "target.gpu": Driver(found=True, cuda_version="13.0", gpus=(other,), reason="", version="580.65.06"),
    }
    here = stage_fields(manifest, "text", manifest.text, played())
    for field, driver in drivers.items():
        (difference,) = differences(here, stage_fields(manifest, "text", manifest.text, played(driver)))
        assert difference.field == field

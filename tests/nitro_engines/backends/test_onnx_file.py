"""ONNX Runtime's GPU providers: what they make of a graph they make when it is loaded, so building needs no GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnxruntime
import pytest

from nitro_engines.backends import load_backend, onnx_file
from nitro_engines.bundle import bundle_from_graphs
from nitro_engines.cache import EngineCache
from nitro_rt.bundle import open_bundle
from nitro_rt.device import Driver, Gpu, find_driver
from nitro_rt.errors import BackendUnavailable, ConfigError
from nitro_rt.manifest import EXPORT_FILE, GraphsManifest, from_json
from nitro_rt.pipeline import Pipeline
from nitro_rt.providers import provider_of

MakeGraphs = Callable[..., Path]


@pytest.mark.parametrize(("provider", "name"), [("cuda", "CUDAExecutionProvider"), ("tensorrt", "TensorrtExecutionProvider")])
def test_a_bundle_for_a_gpu_provider_is_built_anywhere(
    make_graphs: MakeGraphs, cache: EngineCache, tmp_path: Path, provider: str, name: str
) -> None:
    graphs, out = make_graphs(precision="fp16"), tmp_path / "bundle"
    backend = load_backend("onnxruntime", provider=provider)
    manifest = bundle_from_graphs(graphs, out, backend, cache).manifest
    checked_with = name if name in onnxruntime.get_available_providers() and find_driver().gpus else "CPUExecutionProvider"
    assert manifest.target == {"device": "cuda", "provider": name, "checked_with": checked_with}
    for engine in (manifest.text, manifest.denoise[1], manifest.decode):
        assert engine.options == {"provider": name}
    assert manifest.denoise[1].compute_dtype == "float16"  # on every GPU; on this CPU perhaps not
    assert provider_of(open_bundle(out)) == name
    other = load_backend("onnxruntime")
    assert other.target() != backend.target() and other.options("float16") != backend.options("float16")


@pytest.mark.skipif(bool(find_driver().gpus), reason="this machine has a GPU")
def test_a_bundle_for_a_gpu_provider_does_not_run_here(make_graphs: MakeGraphs, cache: EngineCache, tmp_path: Path) -> None:
    out = bundle_from_graphs(make_graphs(), tmp_path / "bundle", load_backend("onnxruntime", provider="cuda"), cache).out
    with pytest.raises(BackendUnavailable, match="is for ONNX Runtime's CUDAExecutionProvider; no NVIDIA driver"):
        Pipeline.load(out)


def test_a_gpu_that_is_here_checks_the_graph_itself(
    make_graphs: MakeGraphs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And where its provider does not start, nothing else checks it instead."""
    asked: list[list[str]] = []

    class Fallen:
        def __init__(self, path: str, settings: object, providers: list[tuple[str, object]], enable_fallback: int) -> None:
            asked.append([name for name, _ in providers])

        def get_providers(self) -> list[str]:
            return ["CPUExecutionProvider"]

    card = Driver(found=True, cuda_version="13.0", gpus=(Gpu(name="RTX 4090", target="sm89"),), reason="")
    monkeypatch.setattr(onnx_file, "find_driver", lambda: card)
    available = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: available)
    monkeypatch.setattr("onnxruntime.InferenceSession", Fallen)
    backend = load_backend("onnxruntime", provider="tensorrt")
    assert backend.target()["checked_with"] == "TensorrtExecutionProvider"
    graphs = make_graphs()
    manifest = from_json(GraphsManifest, (graphs / EXPORT_FILE).read_text(), where=EXPORT_FILE)
    with pytest.raises(BackendUnavailable, match="TensorrtExecutionProvider does not start"):
        backend.compile(graphs / "decode.onnx", manifest.decode, tmp_path)
    assert asked == [available[:2]]


def test_wrong_providers_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="--provider 'rocm' is unknown; available: cpu, cuda, tensorrt"):
        load_backend("onnxruntime", provider="rocm")
    for backend in ("openvino", "tensorrt", "tensorrt-rtx"):
        with pytest.raises(ConfigError, match=f"--provider cuda means nothing to --backend {backend}"):
            load_backend(backend, provider="cuda")
    with pytest.raises(ConfigError, match="--target sm89 means nothing to --backend onnxruntime, which builds for every GPU"):
        load_backend("onnxruntime", ("sm89",), provider="cuda")
    with pytest.raises(ConfigError, match="no bfloat16 kernels"):
        load_backend("onnxruntime", provider="cuda").compute_dtype("bfloat16")
    assert load_backend("onnxruntime", provider="cpu").target() == load_backend("onnxruntime").target()

"""ONNX Runtime on a GPU: the values stay where they are, the CUDA graphs are asked for and checked, nothing falls back.

Here a stand-in for the GPU provider computes on the CPU, with values in host memory; the last tests need a GPU.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from nitro_rt import onnxruntime_executor
from nitro_rt.bundle import Bundle, open_bundle
from nitro_rt.device import Driver, Gpu, find_driver
from nitro_rt.errors import BackendUnavailable, CaptureError, ConfigError, DeviceLost, EngineMismatch
from nitro_rt.executor import DeviceOptions, Drawing, Executor
from nitro_rt.host_executor import HostExecutor
from nitro_rt.noise import draw_noise
from nitro_rt.onnxruntime_executor import OnnxRuntimeExecutor
from nitro_rt.onnxruntime_session import OnnxRuntimeSession
from nitro_rt.pipeline import Pipeline
from nitro_rt.providers import CPU, CUDA, TENSORRT

REFUSED = "This session cannot use the graph capture feature as requested by the user as the model has control flow nodes"
CARD = Driver(found=True, cuda_version="13.0", gpus=(Gpu(name="RTX 4090", target="sm89"),), reason="")
Session = onnxruntime.InferenceSession


class GpuStandIn:
    """`InferenceSession` of a GPU provider that computes on the CPU. It may refuse CUDA graphs, or replay them wrongly."""

    asked: list[tuple[str, dict[str, str]]]
    refuses_graphs = False
    replays_wrongly = False
    fails_with: Exception | None = None

    def __init__(self, path: str, settings: Any, providers: list[tuple[str, dict[str, str]]], enable_fallback: int) -> None:
        assert enable_fallback == 0
        type(self).asked += providers
        self._providers = providers
        has_graph = any(
            "1" in (options.get("enable_cuda_graph"), options.get("trt_cuda_graph_enable")) for _, options in providers
        )
        if self.refuses_graphs and has_graph:
            raise RuntimeError(f"{REFUSED} which can't be supported")
        self._session, self._num_runs = Session(path, settings, providers=[CPU]), 0

    def get_providers(self) -> list[str]:
        return [*(name for name, _ in self._providers), CPU]

    def run_with_iobinding(self, binding: Any) -> None:
        if self.fails_with is not None:
            raise self.fails_with
        self._session.run_with_iobinding(binding)
        self._num_runs += 1
        if self.replays_wrongly and self._num_runs == 3:
            value = binding.get_outputs()[0]
            value.update_inplace((value.numpy() + 7).astype(value.numpy().dtype))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> type[GpuStandIn]:
    kind = type("StandIn", (GpuStandIn,), {"asked": []})
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: [TENSORRT, CUDA, CPU])
    monkeypatch.setattr("onnxruntime.InferenceSession", kind)
    return kind


@pytest.fixture
def bundle(make_bundle: Any, tmp_path: Path) -> Bundle:
    return open_bundle(make_bundle(tmp_path / "bundle", backend="onnxruntime", options={"provider": CUDA}, steps=(1, 2, 4)))


def _draw(executor: Executor, num_steps: int, size_px: int = 32, seed: int = 7) -> Drawing:
    executor.prepare(num_steps, size_px)
    ids_BT = np.arange(24, dtype=np.int64).reshape(2, 12)
    noise_NBCHW = draw_noise(seed, num_steps, 2, 2, (4, size_px // 8, size_px // 8))
    return executor.draw(num_steps, size_px, ids_BT, ids_BT + 1, noise_NBCHW)


@pytest.fixture
def executors(make_bundle: Any, tmp_path: Path) -> Iterator[tuple[OnnxRuntimeExecutor, HostExecutor]]:
    """The same engines on the CPU provider: by values, and by arrays."""
    folder = make_bundle(tmp_path / "both", backend="onnxruntime", steps=(1, 2, 4), more_sizes_px=(64,))
    by_values = OnnxRuntimeExecutor(open_bundle(folder), memory="cpu")
    by_arrays = HostExecutor(open_bundle(folder), OnnxRuntimeSession)
    yield by_values, by_arrays
    by_values.close()
    by_arrays.close()


@pytest.mark.parametrize("size_px", [32, 64])
@pytest.mark.parametrize("num_steps", [1, 2, 4])
def test_images_are_those_of_the_host_executor(executors: Any, num_steps: int, size_px: int) -> None:
    by_values, by_arrays = executors
    for seed in (0, 1):
        found, expected = _draw(by_values, num_steps, size_px, seed), _draw(by_arrays, num_steps, size_px, seed)
        assert (found.images_BHWC == expected.images_BHWC).all() and found.finite
        assert found.timings_ms.keys() == expected.timings_ms.keys()
    assert by_values.compute_dtypes == by_arrays.compute_dtypes and by_values.notes == ()


def test_images_are_the_caller_s(executors: Any) -> None:
    by_values, _ = executors
    first = _draw(by_values, 1, seed=1).images_BHWC
    kept = first.copy()
    assert (_draw(by_values, 1, seed=2).images_BHWC != first).any()
    assert (first == kept).all()


def test_latents_that_are_no_numbers_are_noticed(executors: Any) -> None:
    by_values, _ = executors
    by_values.prepare(1, 32)
    ids_BT, noise_NBCHW = np.zeros((2, 12), np.int64), np.full((1, 2, 4, 4, 4), np.nan, np.float32)
    assert not by_values.draw(1, 32, ids_BT, ids_BT, noise_NBCHW).finite
    assert _draw(by_values, 1).finite


def test_engines_are_loaded_once_and_let_go(executors: Any) -> None:
    by_values, _ = executors
    assert by_values.prepare(2, 32) and not by_values.prepare(2, 32) and by_values.prepare(2, 64)
    sized = by_values._sized[32]
    sessions = [weakref.ref(session) for session in (by_values._text, sized.decode, *sized.loaded.values())]
    by_values.close()
    by_values.close()
    del sized, by_values._text
    gc.collect()
    assert [session() for session in sessions] == [None] * 3


@pytest.mark.parametrize(("mode", "graph"), [("auto", "1"), ("runtime", "1"), ("off", None)])
def test_the_provider_gets_the_device_and_the_graph(bundle: Bundle, stand_in: Any, mode: str, graph: str | None) -> None:
    executor = OnnxRuntimeExecutor(bundle, DeviceOptions(device=1, cuda_graphs=mode), memory="cpu")
    assert (_draw(executor, 2).images_BHWC == _draw(HostExecutor(_on_cpu(bundle), OnnxRuntimeSession), 2).images_BHWC).all()
    names = [name for name, _ in stand_in.asked[:3]]
    assert names == [CUDA] * 3
    for _, options in stand_in.asked[:3]:
        assert options["device_id"] == "1" and options["use_tf32"] == "0" and options.get("enable_cuda_graph") == graph


def _on_cpu(bundle: Bundle) -> Bundle:
    manifest = bundle.manifest

    def on_cpu(engine: Any) -> Any:
        return replace(engine, options={})

    denoise = {steps: on_cpu(engine) for steps, engine in manifest.denoise.items()}
    return replace(
        bundle, manifest=replace(manifest, text=on_cpu(manifest.text), decode=on_cpu(manifest.decode), denoise=denoise)
    )


def test_a_session_comes_before_any_value(bundle: Bundle, stand_in: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A value on a GPU needs CUDA's libraries, which opening a session loads."""
    order: list[str] = []
    opened, allocated = onnxruntime_executor.OnnxRuntimeSession, onnxruntime.OrtValue.ortvalue_from_shape_and_type
    monkeypatch.setattr(
        onnxruntime_executor, "OnnxRuntimeSession", lambda *args: order.append(f"session {args[0]}") or opened(*args)
    )
    monkeypatch.setattr(
        onnxruntime.OrtValue, "ortvalue_from_shape_and_type", lambda *args: order.append("value") or allocated(*args)
    )
    OnnxRuntimeExecutor(bundle, memory="cpu").close()
    assert order[:2] == ["session text", "value"]


def test_what_runs_on_the_cpu_instead_is_noted(bundle: Bundle, stand_in: Any) -> None:
    executor = OnnxRuntimeExecutor(bundle, memory="cpu")
    assert executor.notes[0].startswith("ONNX Runtime runs these operators of text on the CPU, not on the GPU: 2 Add, ")


def test_a_refused_graph_is_noted_and_done_without(bundle: Bundle, stand_in: Any) -> None:
    stand_in.refuses_graphs = True
    executor = OnnxRuntimeExecutor(bundle, memory="cpu")
    refused = [note for note in executor.notes if "graph capture" in note]
    assert len(refused) == 1 and "takes text into no CUDA graph: This session cannot use" in refused[0]
    assert refused[0].endswith("its kernels are launched one by one")
    assert "enable_cuda_graph" in stand_in.asked[0][1] and "enable_cuda_graph" not in stand_in.asked[1][1]
    assert _draw(executor, 1).finite


def test_a_graph_that_was_insisted_on_is_not_done_without(bundle: Bundle, stand_in: Any) -> None:
    stand_in.refuses_graphs = True
    with pytest.raises(CaptureError, match="takes text into no CUDA graph"):
        OnnxRuntimeExecutor(bundle, DeviceOptions(cuda_graphs="runtime"), memory="cpu")


def test_a_replay_that_differs_is_caught_at_load(bundle: Bundle, stand_in: Any) -> None:
    stand_in.replays_wrongly = True
    with pytest.raises(CaptureError, match="CUDA graph of text gives another result .* cuda_graphs='off'"):
        OnnxRuntimeExecutor(bundle, memory="cpu")
    for options in (DeviceOptions(verify_capture=False), DeviceOptions(cuda_graphs="off")):
        OnnxRuntimeExecutor(bundle, options, memory="cpu").close()


def test_one_graph_of_the_whole_image_is_not_onnxruntime_s(bundle: Bundle, stand_in: Any) -> None:
    with pytest.raises(ConfigError, match="'capture' is one graph of the whole image.* say 'runtime'"):
        OnnxRuntimeExecutor(bundle, DeviceOptions(cuda_graphs="capture"), memory="cpu")


@pytest.mark.parametrize("keeps", [True, False])
def test_the_tensorrt_provider_s_engines_are_kept_beside_the_bundle(
    make_bundle: Any, tmp_path: Path, stand_in: Any, keeps: bool
) -> None:
    bundle = open_bundle(make_bundle(tmp_path / "trt", backend="onnxruntime", options={"provider": TENSORRT}))
    OnnxRuntimeExecutor(bundle, DeviceOptions(runtime_cache=keeps), memory="cpu").close()
    (name, options), (second, _) = stand_in.asked[:2]
    assert (name, second) == (TENSORRT, CUDA)
    expected = str((tmp_path / "trt.onnxruntime-tensorrt").resolve()) if keeps else None
    assert options.get("trt_engine_cache_path") == expected


@pytest.mark.parametrize(
    ("failure", "kind"),
    [
        (RuntimeError("CUDA failure 700: an illegal memory access was encountered"), DeviceLost),
        (RuntimeError("CUDA failure 2: out of memory"), EngineMismatch),
        (RuntimeError("Failed to allocate memory for requested buffer of size 1"), EngineMismatch),
        (TypeError("a bug of ours"), TypeError),
    ],
)
def test_failures_while_drawing(bundle: Bundle, stand_in: Any, failure: Exception, kind: type[Exception]) -> None:
    executor = OnnxRuntimeExecutor(bundle, memory="cpu")
    executor.prepare(1, 32)
    stand_in.fails_with = failure
    with pytest.raises(kind, match=str(failure)[:10]) as caught:
        _draw(executor, 1)
    assert "\n" not in str(caught.value)
    executor.close()


def test_weights_are_not_exchanged(executors: Any) -> None:
    with pytest.raises(EngineMismatch, match="take no new weights; fuse LoRAs when it is built"):
        executors[0].refit({})


def test_no_gpu(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = Driver(found=False, cuda_version="", gpus=(), reason="no NVIDIA driver (libcuda.so.1 is not here)")
    monkeypatch.setattr(onnxruntime_executor, "find_driver", lambda: nothing)
    with pytest.raises(BackendUnavailable, match=f"is for ONNX Runtime's {CUDA}; no NVIDIA driver .*; install"):
        Pipeline.load(bundle.folder)


def test_a_device_that_does_not_exist(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime_executor, "find_driver", lambda: CARD)
    with pytest.raises(BackendUnavailable, match="there is no GPU 3; choose one that is here: 0 is RTX 4090 \\(sm89\\)"):
        OnnxRuntimeExecutor(bundle, DeviceOptions(device=3))


@pytest.mark.skipif(CUDA in onnxruntime.get_available_providers(), reason="this ONNX Runtime has CUDA")
def test_a_gpu_without_the_gpu_wheel(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime_executor, "find_driver", lambda: CARD)
    with pytest.raises(BackendUnavailable, match=f"text asks for {CUDA}; .* then pip install 'nitro-rt\\[cuda\\]'"):
        Pipeline.load(bundle.folder)


def test_without_onnxruntime_the_extra_is_named(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "nitro_rt.onnxruntime_executor", None)
    with pytest.raises(BackendUnavailable, match="pip install 'nitro-rt\\[cuda\\]'"):
        Pipeline.load(bundle.folder)


def _needs(provider: str) -> None:
    if provider not in onnxruntime.get_available_providers() or not find_driver().gpus:
        pytest.skip(f"no GPU, or an ONNX Runtime without {provider}")


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["auto", "off"])
@pytest.mark.parametrize("provider", [CUDA, TENSORRT])
def test_on_a_gpu(make_bundle: Any, tmp_path: Path, provider: str, mode: str) -> None:
    _needs(provider)
    folder = make_bundle(tmp_path / "gpu", backend="onnxruntime", options={"provider": provider}, steps=(1, 2, 4))
    executor = OnnxRuntimeExecutor(open_bundle(folder), DeviceOptions(cuda_graphs=mode))
    host = HostExecutor(_on_cpu(open_bundle(folder)), OnnxRuntimeSession)
    for num_steps in (1, 2, 4):
        for seed in (0, 1, 2):  # the third is a replay wherever a graph was captured
            found, expected = (_draw(each, num_steps, seed=seed).images_BHWC.astype(int) for each in (executor, host))
            assert np.abs(found - expected).max() <= 1  # a value on the edge between two
    executor.close()
    host.close()

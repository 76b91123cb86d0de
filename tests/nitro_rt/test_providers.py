"""What ONNX Runtime's providers are told, and what is said where one is missing or does not start."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nitro_rt.bundle import open_bundle
from nitro_rt.errors import BackendUnavailable
from nitro_rt.providers import (
    CPU,
    CUDA,
    GPU_PROVIDERS,
    PROVIDERS,
    TENSORRT,
    Placement,
    missing_provider,
    not_started,
    provider_list,
    provider_of,
    start_session,
)

GRAPH = Placement(device_id=1, own_graph=True, cache=Path("kept"))


def test_the_names() -> None:
    assert PROVIDERS == {"cpu": CPU, "cuda": CUDA, "tensorrt": TENSORRT} and GPU_PROVIDERS == (CUDA, TENSORRT)


@pytest.mark.parametrize(
    ("provider", "compute_dtype", "placement", "expected"),
    [
        (CPU, "float32", GRAPH, [(CPU, {})]),
        (CUDA, "float16", Placement(), [(CUDA, {"device_id": "0"})]),
        # Without TF32, which would keep 10 bits of a float32's mantissa.
        (CUDA, "float32", GRAPH, [(CUDA, {"device_id": "1", "use_tf32": "0", "enable_cuda_graph": "1"})]),
        (
            TENSORRT,
            "float16",
            GRAPH,
            [
                (
                    TENSORRT,
                    {
                        "device_id": "1",
                        "trt_fp16_enable": "1",
                        "trt_cuda_graph_enable": "1",
                        "trt_engine_cache_enable": "1",
                        "trt_engine_cache_path": "kept",
                    },
                ),
                (CUDA, {"device_id": "1"}),
            ],
        ),
        (
            TENSORRT,
            "float32",
            Placement(),
            [(TENSORRT, {"device_id": "0", "trt_fp16_enable": "0"}), (CUDA, {"device_id": "0", "use_tf32": "0"})],
        ),
    ],
)
def test_what_a_provider_is_told(provider: str, compute_dtype: str, placement: Placement, expected: Any) -> None:
    assert provider_list(provider, compute_dtype, placement) == expected


def test_a_missing_gpu_provider_names_the_extra_and_the_wheels_that_clash() -> None:
    said = missing_provider(CUDA, ["AzureExecutionProvider", CPU])
    assert said == (
        f"this ONNX Runtime has no {CUDA}, it has AzureExecutionProvider, {CPU}; "
        "pip uninstall onnxruntime onnxruntime-gpu, then pip install 'nitro-rt[cuda]'"
    )
    assert (missing_provider(CPU, []) or "").endswith("pip install 'nitro-rt[cpu]'")
    assert missing_provider(CUDA, [CUDA, CPU]) is None


def test_what_is_said_of_a_provider_that_does_not_start() -> None:
    assert "CUDA 13 and cuDNN 9" in not_started(CUDA, "why") and "(why)" in not_started(CUDA, "why")
    assert "TensorRT 10" in not_started(TENSORRT, "why") and "TensorRT 10" not in not_started(CUDA, "why")


class FakeOnnxRuntime:
    """What onnxruntime-gpu 1.31 does on a machine without CUDA: prints what it lacks, and takes the CPU."""

    __version__ = "1.31.1"
    prints = (
        "Failed to load libcublas.so.13: libcublas.so.13: cannot open shared object file\n"
        "Failed to load libcurand.so.10: libcurand.so.10: cannot open shared object file\n"
        "Please follow https://onnxruntime.ai/docs/install/#cuda-and-cudnn to install CUDA."
    )

    def __init__(self, starts: list[str], fails_with: Exception | None = None) -> None:
        self.severities: list[int] = []
        self._starts, self._fails_with = starts, fails_with

    def preload_dlls(self) -> None:
        print(self.prints)

    def set_default_logger_severity(self, severity: int) -> None:
        self.severities.append(severity)

    def InferenceSession(self, model: str, settings: Any, providers: Any, enable_fallback: int) -> Any:  # noqa: N802
        assert enable_fallback == 0
        if self._fails_with is not None:
            raise self._fails_with
        return SimpleNamespace(get_providers=lambda: [*self._starts, CPU])


def _asked(provider: str) -> list[tuple[str, dict[str, str]]]:
    return provider_list(provider, "float16", Placement())


def test_the_cpu_is_not_taken_instead(capsys: pytest.CaptureFixture[str]) -> None:
    fake = FakeOnnxRuntime([])
    with pytest.raises(BackendUnavailable, match="do not load: libcublas.so.13, libcurand.so.10\\); pip install"):
        start_session(fake, "graph", None, _asked(CUDA))
    assert fake.severities == [4, 2] and capsys.readouterr().out == ""


def test_the_cuda_provider_is_not_taken_for_the_tensorrt_provider(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeOnnxRuntime, "prints", "")
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace())  # type: ignore[arg-type]
    with pytest.raises(BackendUnavailable, match=f"{TENSORRT} does not start .ONNX Runtime 1.31.1 started {CUDA}, {CPU}"):
        start_session(FakeOnnxRuntime([CUDA]), "graph", None, _asked(TENSORRT))
    assert start_session(FakeOnnxRuntime([TENSORRT, CUDA]), "graph", None, _asked(TENSORRT))


def test_a_provider_s_own_failure_and_a_graph_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    missing = RuntimeError("Please install TensorRT libraries as mentioned\nin the GPU requirements page")
    with pytest.raises(BackendUnavailable, match="libcurand.so.10, tensorrt\\)") as caught:
        start_session(FakeOnnxRuntime([], missing), "graph", None, _asked(TENSORRT))
    assert "\n" not in str(caught.value)
    for failure in (ValueError("the graph"), RuntimeError("cannot use the graph capture feature as requested")):
        fake = FakeOnnxRuntime([], failure)
        with pytest.raises(type(failure), match="graph"):
            start_session(fake, "graph", None, _asked(CUDA))
        assert fake.severities == [4, 2]


def test_the_cpu_provider_needs_nothing_loaded() -> None:
    fake = FakeOnnxRuntime([])
    assert start_session(fake, "graph", None, _asked(CPU)) and fake.severities == []


def test_the_provider_of_a_bundle(make_bundle: Any, tmp_path: Path) -> None:
    assert provider_of(open_bundle(make_bundle(tmp_path / "a", backend="onnxruntime", options={"provider": CUDA}))) == CUDA
    assert provider_of(open_bundle(make_bundle(tmp_path / "b", backend="onnxruntime"))) == CPU
    assert provider_of(open_bundle(make_bundle(tmp_path / "c"))) is None

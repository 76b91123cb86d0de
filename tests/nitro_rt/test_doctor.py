"""What the doctor derives from the driver, the libraries and ONNX Runtime's providers; each `no` says why and what to do."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from nitro_rt import doctor
from nitro_rt.cli.doctor import _facts
from nitro_rt.device import Driver, Gpu
from nitro_rt.doctor import BACKENDS, IDENTITY, Examination, _against_starting, examine

GIB = 1 << 30
NO_DRIVER = Driver(found=False, cuda_version="", gpus=(), reason="no NVIDIA driver (libcuda.so.1 is not here)")
ADA = Gpu(name="NVIDIA RTX 4090", target="sm89", memory_bytes=24 * GIB, free_bytes=23 * GIB)
HOPPER = Gpu(name="NVIDIA H100", target="sm90", ordinal=1, memory_bytes=80 * GIB)
CPU_WHEEL = ("AzureExecutionProvider", "CPUExecutionProvider")
GPU_WHEEL = ("TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider")
INSTALL_GPU_WHEEL = "pip uninstall onnxruntime onnxruntime-gpu, then pip install 'nitro-rt[cuda]'"
LIBRARIES = ("openvino", "onnxruntime", "tensorrt", "tensorrt_rtx", "cuda.core", "cuda.bindings.driver", "polygraphy")
Examine = Callable[..., Examination]


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Examine:
    """A function that examines a machine with this driver, these providers, and every library but the missing ones."""

    def examined(
        driver: Driver = NO_DRIVER,
        providers: tuple[str, ...] = CPU_WHEEL,
        missing: tuple[str, ...] = (),
        without_packages: tuple[str, ...] = (),
        starting: tuple[str, ...] = GPU_WHEEL,
    ) -> Examination:
        monkeypatch.setattr(doctor, "find_driver", lambda: driver)
        onnxruntime = SimpleNamespace(
            __version__="1.31.1",
            get_available_providers=lambda: list(providers),
            preload_dlls=lambda: None,
            set_default_logger_severity=lambda severity: None,
            SessionOptions=SimpleNamespace,
            InferenceSession=lambda model, settings, providers, enable_fallback: SimpleNamespace(
                get_providers=lambda: [name for name, _ in providers if name in starting] + [CPU_WHEEL[-1]]
            ),
        )
        for module in LIBRARIES:
            stand_in = None if module in missing else onnxruntime if module == "onnxruntime" else SimpleNamespace()
            monkeypatch.setitem(sys.modules, module, stand_in)  # type: ignore[arg-type]
        monkeypatch.setattr(doctor, "_version", lambda name: None if name in without_packages else "1.0")
        return examine()

    return examined


def _with(*gpus: Gpu, cuda: str = "13.0") -> Driver:
    return Driver(found=True, cuda_version=cuda, gpus=gpus, reason="", version="580.65.06")


def test_a_machine_without_a_gpu(on: Examine) -> None:
    found = on()
    assert set(found.builds) == set(found.runs) == set(BACKENDS)
    yes = {backend for backend, answer in found.builds.items() if answer == "yes"}
    assert yes == set(BACKENDS) - {"tensorrt"}
    assert found.builds["tensorrt"].startswith("no: TensorRT compiles for the GPU that it finds, and here is no NVIDIA driver")
    assert "--backend tensorrt-rtx --target sm89" in found.builds["tensorrt"]
    assert {backend for backend, answer in found.runs.items() if answer == "yes"} == {"openvino", "onnxruntime"}
    for backend in ("onnxruntime --provider cuda", "onnxruntime --provider tensorrt", "tensorrt", "tensorrt-rtx"):
        assert found.runs[backend].startswith("no: no NVIDIA driver (libcuda.so.1 is not here); install NVIDIA's driver, 580")


def test_a_machine_with_everything(on: Examine) -> None:
    found = on(_with(ADA), GPU_WHEEL)
    assert set(found.builds.values()) == set(found.runs.values()) == {"yes"}


def test_a_data_centre_gpu_runs_tensorrt_but_not_tensorrt_rtx(on: Examine) -> None:
    found = on(_with(HOPPER))
    assert found.runs["tensorrt"] == found.builds["tensorrt"] == found.builds["tensorrt-rtx"] == "yes"
    assert found.runs["tensorrt-rtx"] == (
        "no: TensorRT-RTX runs on sm75, sm80, sm86, sm89, sm120, sm121, and here is NVIDIA H100 (sm90); "
        "build for it: nitro-rt build --backend tensorrt (on that machine)"
    )
    assert on(_with(HOPPER, ADA)).runs["tensorrt-rtx"] == "yes"


def test_an_old_driver(on: Examine) -> None:
    found = on(_with(ADA, cuda="12.8"), GPU_WHEEL)
    for backend in ("onnxruntime --provider cuda", "tensorrt", "tensorrt-rtx"):
        assert found.runs[backend] == (
            "no: CUDA 13.0 is needed, and the NVIDIA driver 580.65.06 runs CUDA 12.8; install NVIDIA's driver, 580 or newer"
        )


@pytest.mark.parametrize("backend", ["onnxruntime --provider cuda", "onnxruntime --provider tensorrt"])
def test_the_cpu_wheel_of_onnxruntime_has_no_gpu_provider(on: Examine, backend: str) -> None:
    answer = on(_with(ADA)).runs[backend]
    assert "it has AzureExecutionProvider, CPUExecutionProvider" in answer and answer.endswith(INSTALL_GPU_WHEEL)


def test_a_gpu_provider_that_does_not_start(on: Examine) -> None:
    """Its libraries, CUDA's and cuDNN's, are other packages; only trying tells whether they are complete."""
    found = on(_with(ADA), GPU_WHEEL, starting=("CUDAExecutionProvider",))
    assert found.runs["onnxruntime --provider cuda"] == "yes"
    answer = found.runs["onnxruntime --provider tensorrt"]
    assert answer.startswith("no: TensorrtExecutionProvider does not start (ONNX Runtime 1.31.1 started CUDAExecutionProvider")
    assert "TensorRT 10" in answer and "pip install 'nitro-rt[cuda]'" in answer


def test_the_graph_that_providers_are_tried_with_is_one() -> None:
    onnx = pytest.importorskip("onnx")
    onnx.checker.check_model(onnx.load_model_from_string(IDENTITY), full_check=True)
    assert list(_against_starting("CPUExecutionProvider")) == []


@pytest.mark.parametrize(
    ("module", "running", "building"),
    [
        ("openvino", {"openvino": "cpu"}, {"openvino": "cpu"}),
        (
            "onnxruntime",
            {"onnxruntime": "cpu", "onnxruntime --provider cuda": "cuda", "onnxruntime --provider tensorrt": "cuda"},
            {"onnxruntime": "cpu", "onnxruntime --provider cuda": "cpu", "onnxruntime --provider tensorrt": "cpu"},
        ),
        ("tensorrt", {"tensorrt": "tensorrt"}, {"tensorrt": "tensorrt"}),
        ("tensorrt_rtx", {"tensorrt-rtx": "tensorrt-rtx"}, {"tensorrt-rtx": "tensorrt-rtx"}),
        ("cuda.core", {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt-rtx"}, {}),
        ("cuda.bindings.driver", {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt-rtx"}, {}),
        ("polygraphy", {}, {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt-rtx"}),
    ],
)
def test_a_missing_library_is_named_with_the_extra(
    on: Examine, module: str, running: dict[str, str], building: dict[str, str]
) -> None:
    found = on(_with(ADA), GPU_WHEEL, missing=(module,))
    for answers, extras in ((found.runs, running), (found.builds, building)):
        assert {backend for backend, answer in answers.items() if answer != "yes"} == set(extras)
        for backend, extra in extras.items():
            assert answers[backend].startswith(f"no: {module} cannot be imported (")
            assert answers[backend].endswith(f"; pip install 'nitro-rt[{extra}]'")


def test_nothing_is_built_without_the_exporter(on: Examine) -> None:
    found = on(_with(ADA), without_packages=("torch", "onnx"))
    assert set(found.builds.values()) == {"no: torch, onnx not installed; pip install 'nitro-rt[export]'"}
    assert found.runs["tensorrt"] == "yes"


def test_without_onnxruntime_there_are_no_providers(on: Examine) -> None:
    assert on(missing=("onnxruntime",)).providers == ()


def test_what_is_printed(on: Examine) -> None:
    facts = dict(_facts(on(_with(ADA, HOPPER), GPU_WHEEL)))
    assert facts["driver"] == "NVIDIA 580.65.06, runs CUDA 13.0"
    assert facts["gpu 0"] == "NVIDIA RTX 4090 (sm89), 24.00 GiB, 23.00 GiB free"
    assert facts["gpu 1"] == "NVIDIA H100 (sm90), 80.00 GiB"
    assert facts["providers"] == "TensorrtExecutionProvider, CUDAExecutionProvider, CPUExecutionProvider"
    assert {"tensorrt-cu13", "tensorrt-rtx-cu13", "onnxruntime", "onnxruntime-gpu", "cuda-core", "cuda-bindings"} <= set(facts)
    assert {f"{verb} {backend}" for verb in ("build", "run") for backend in BACKENDS} <= set(facts)
    without = dict(_facts(on(missing=("onnxruntime",))))
    assert without["gpu"] == "none: no NVIDIA driver (libcuda.so.1 is not here)" and "driver" not in without
    assert without["providers"] == "none: no ONNX Runtime"


def test_this_machine_has_an_answer_for_every_backend() -> None:
    found = examine()
    for answers in (found.builds, found.runs):
        assert set(answers) == set(BACKENDS)
        for backend, answer in answers.items():
            assert answer == "yes" or (answer.startswith("no: ") and "; " in answer and "\n" not in answer), backend


@pytest.mark.gpu
def test_a_gpu_machine_runs_something_on_its_gpu() -> None:
    found = examine()
    assert found.driver.gpus and not any("no NVIDIA driver" in answer for answer in found.runs.values())

"""Every reason why a TensorRT bundle does not run: found before an engine is deserialised, and said in one line."""

from __future__ import annotations

import sys
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from device_worlds import simulated
from nitro_rt import diagnosis
from nitro_rt.bundle import Bundle, open_bundle
from nitro_rt.device import Driver, Gpu
from nitro_rt.device_executor import DeviceExecutor
from nitro_rt.device_modules import DeviceModules
from nitro_rt.diagnosis import diagnose, driver_of, import_error, needed_bytes, require_machine
from nitro_rt.errors import BackendUnavailable, BundleError, EngineMismatch
from nitro_rt.executor import DeviceOptions
from nitro_rt.manifest import MemoryPlan
from nitro_rt.pipeline import Pipeline
from nitro_rt.verify import verify_bundle

rtx = pytest.importorskip("tensorrt_rtx")
GIB = 1 << 30
VERSION = "11.4.0.106"
ADA, BLACKWELL, HOPPER = ("NVIDIA RTX 4090", 8, 9), ("NVIDIA RTX 5090", 12, 0), ("NVIDIA H100", 9, 0)
NO_DRIVER = Driver(found=False, cuda_version="", gpus=(), reason="no NVIDIA driver (libcuda.so.1 is not here)")
CARD = Driver(found=True, cuda_version="13.0", gpus=(Gpu(name="RTX 4090", target="sm89"),), reason="")
Capability = namedtuple("Capability", "major minor")


@pytest.fixture(params=["tensorrt", "tensorrt-rtx"])
def bundle(request: pytest.FixtureRequest, make_bundle: Any, tmp_path: Path) -> Bundle:
    """Engines for sm86 and sm89, built with VERSION. They are no plans: nothing here may get as far as to load one."""
    folder = make_bundle(tmp_path / "bundle", backend=request.param, target={"device": "cuda", "targets": "sm86 sm89"})
    return _built(open_bundle(folder), toolchain={request.param: VERSION})


def _built(bundle: Bundle, **fields: Any) -> Bundle:
    return replace(bundle, manifest=replace(bundle.manifest, **fields))


def _machine(
    *gpus: tuple[str, int, int], cuda: int = 13000, version: str = VERSION, free: int = 20 * GIB, answer: Any = None
) -> DeviceModules:
    """`cuda.core`, `cuda.bindings.driver` and a TensorRT of a machine with these GPUs, of 24 GiB each.

    Args: answer: what TensorRT-RTX says to every plan; None: valid.
    """
    current: list[int] = []

    class Device:
        def __init__(self, device_id: int) -> None:
            self.device_id = device_id
            self.name, *capability = (gpus or (ADA,))[device_id]
            self.compute_capability = Capability(*capability)

        @classmethod
        def get_all_devices(cls) -> tuple[Device, ...]:
            return tuple(cls(ordinal) for ordinal in range(len(gpus or (ADA,))))

        def set_current(self) -> None:
            current.append(self.device_id)

    class Runtime:
        engine_header_size = 64

        def __init__(self, logger: Any) -> None: ...

        def get_engine_validity(self, header: bytes) -> Any:
            assert 0 < len(header) <= 64
            return answer or (rtx.EngineValidity.VALID, 0)

    def memory() -> tuple[int, int, int]:
        assert current, "cuMemGetInfo needs a current device"
        return 0, free, 24 * GIB

    return DeviceModules(
        cuda=SimpleNamespace(Device=Device, current=current),
        driver=SimpleNamespace(cuDriverGetVersion=lambda: (0, cuda), cuMemGetInfo=memory),
        trt=SimpleNamespace(
            __version__=version,
            Runtime=Runtime,
            Logger=rtx.Logger,
            EngineValidity=rtx.EngineValidity,
            EngineInvalidityDiagnostics=rtx.EngineInvalidityDiagnostics,
        ),
    )


def _refused(bundle: Bundle, modules: DeviceModules, kind: type[Exception], device_id: int = 0) -> str:
    with pytest.raises(kind) as caught:
        diagnose(bundle, modules, device_id)
    return _one_line(str(caught.value))


def _one_line(message: str) -> str:
    assert "\n" not in message and "engines for sm86, sm89; " in message
    return message


def test_a_machine_that_fits_is_left_with_the_device_current(bundle: Bundle) -> None:
    modules = _machine(HOPPER, ADA)
    assert diagnose(bundle, modules, 1) == ()
    assert modules.cuda.current == [1]


def test_no_driver(bundle: Bundle) -> None:
    modules = _machine()

    def missing() -> Any:
        raise RuntimeError('"cuda" is an NVIDIA driver library and can only be found via system search.')

    modules.driver.cuDriverGetVersion = missing
    message = _refused(bundle, modules, BackendUnavailable)
    assert "no NVIDIA driver" in message and "driver, 580 or newer" in message
    assert "nitro-rt build --backend openvino" in message


@pytest.mark.parametrize(
    ("error", "said"),
    [
        ("CUDA_ERROR_NO_DEVICE: no CUDA-capable device is detected", "the NVIDIA driver finds no GPU"),
        ("CUDA_ERROR_SYSTEM_DRIVER_MISMATCH: display driver", "does not start (CUDA_ERROR_SYSTEM_DRIVER_MISMATCH: display"),
    ],
)
def test_no_gpu(bundle: Bundle, error: str, said: str) -> None:
    modules = _machine()

    def refuse() -> Any:
        raise type("CUDAError", (Exception,), {})(error)

    modules.cuda.Device.get_all_devices = refuse
    assert said in _refused(bundle, modules, BackendUnavailable)


@pytest.mark.parametrize("device_id", [2, -1])
def test_a_device_that_does_not_exist_lists_those_that_do(bundle: Bundle, device_id: int) -> None:
    message = _refused(bundle, _machine(ADA, HOPPER), BackendUnavailable, device_id)
    assert f"there is no GPU {device_id}; choose one that is here: " in message
    assert "0 is NVIDIA RTX 4090 (sm89), 1 is NVIDIA H100 (sm90)" in message


def test_another_gpu_says_the_build_command(bundle: Bundle) -> None:
    message = _refused(bundle, _machine(BLACKWELL), EngineMismatch)
    assert "here GPU 0 is NVIDIA RTX 5090 (sm120)" in message
    target = " --target sm120" if bundle.backend == "tensorrt-rtx" else " (on that machine)"
    assert message.endswith(f"build for it: nitro-rt build --backend {bundle.backend}{target}")


def test_a_data_centre_gpu_is_built_for_with_tensorrt_proper(bundle: Bundle) -> None:
    assert _refused(bundle, _machine(HOPPER), EngineMismatch).endswith("nitro-rt build --backend tensorrt (on that machine)")


def test_another_gpu_of_this_machine_that_would_fit_is_named(bundle: Bundle) -> None:
    message = _refused(bundle, _machine(HOPPER, ADA), EngineMismatch)
    assert message.endswith("here GPU 0 is NVIDIA H100 (sm90); choose GPU 1, NVIDIA RTX 4090 (sm89)")


def test_an_old_driver_says_both_versions(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis, "driver_version", lambda: "570.86.10")
    message = _refused(bundle, _machine(cuda=12080), BackendUnavailable)
    assert "CUDA 13.0 is needed, and the NVIDIA driver 570.86.10 runs CUDA 12.8; install NVIDIA's driver, 580" in message
    newer = _built(bundle, toolchain={bundle.backend: VERSION, "cuda": "14.1"})
    assert "CUDA 14.1 is needed" in _refused(newer, _machine(cuda=13040), BackendUnavailable)


@pytest.mark.parametrize(("cuda", "built"), [(13000, "13.4"), (14000, "13.0")])
def test_a_driver_runs_its_own_major_and_older_ones(bundle: Bundle, cuda: int, built: str) -> None:
    assert diagnose(_built(bundle, toolchain={bundle.backend: VERSION, "cuda": built}), _machine(cuda=cuda)) == ()


def test_another_library_version_says_both(bundle: Bundle) -> None:
    library, wheel = {"tensorrt": ("TensorRT", "tensorrt-cu13"), "tensorrt-rtx": ("TensorRT-RTX", "tensorrt-rtx-cu13")}[
        bundle.backend
    ]
    message = _refused(bundle, _machine(version="11.3.0.99"), EngineMismatch)
    assert f"built with {library} {VERSION}, and here is {library} 11.3.0.99; pip install '{wheel}=={VERSION}'" in message
    assert diagnose(bundle, _machine(version="11.4.0.200")) == ()  # another build of the same release
    assert diagnose(_built(bundle, toolchain={}), _machine(version="11.3.0.99")) == ()  # not known


def test_too_little_memory_says_both_numbers(bundle: Bundle) -> None:
    plan = MemoryPlan(disk_bytes=0, weight_bytes=5 * GIB, io_bytes=3 * GIB)
    large = _with_plans_of(_built(bundle, memory_plan=plan), 2 * GIB)
    message = _refused(large, _machine(free=4 * GIB), BackendUnavailable)
    assert "need 8.00 GiB of GPU memory, and NVIDIA RTX 4090 (sm89) has 4.00 GiB free of 24.00 GiB" in message
    assert "--batch" in message


def test_only_what_is_loaded_first_must_fit(bundle: Bundle) -> None:
    """Text, one denoiser and the decoder; the other step counts' plans are loaded when they are asked for."""
    plan = MemoryPlan(disk_bytes=0, weight_bytes=100 * GIB, io_bytes=1)
    assert needed_bytes(_with_plans_of(_built(bundle, memory_plan=plan), GIB)) == 3 * GIB + 1


def _with_plans_of(bundle: Bundle, num_bytes: int) -> Bundle:
    """The same with larger plans in its manifest, one per stage."""
    manifest = bundle.manifest

    def larger(engine: Any, name: str) -> Any:
        return replace(engine, files=(replace(engine.files[0], path=name, num_bytes=num_bytes),))

    return _built(
        bundle,
        text=larger(manifest.text, "text"),
        denoise={steps: larger(engine, f"denoise{steps}") for steps, engine in manifest.denoise.items()},
        decode=larger(manifest.decode, "decode"),
    )


@pytest.mark.parametrize("code", [None, "CUDA_ERROR_OUT_OF_MEMORY"])
def test_a_device_that_does_not_answer(bundle: Bundle, code: str | None) -> None:
    modules = _machine()
    if code is None:
        modules.driver.cuMemGetInfo = lambda: (999, None, None)
    else:

        def lost(self: Any) -> None:
            raise type("CUDAError", (Exception,), {})(f"{code}: more\nlines")

        modules.cuda.Device.set_current = lost
    message = _refused(bundle, modules, BackendUnavailable)
    assert "NVIDIA RTX 4090 (sm89) does not answer: " in message and (code or "cuMemGetInfo gave 999") in message


@pytest.mark.parametrize("change", [b"", b"tampered"], ids=["cut", "changed"])
def test_a_damaged_plan(bundle: Bundle, change: bytes) -> None:
    path = bundle.path(bundle.manifest.decode.files[0])
    path.write_bytes(path.read_bytes()[: -len(change) or -1] + change)
    with pytest.raises(BundleError, match="its manifest says .*build"):
        diagnose(bundle, _machine())


# TensorRT-RTX's own answer, which it gives for reasons that nothing above could know.

SAID = {
    "VERSION_MISMATCH": (EngineMismatch, f"they were built with TensorRT-RTX {VERSION}, and here is"),
    "UNSUPPORTED_CC": (EngineMismatch, "build for it: nitro-rt build --backend tensorrt-rtx --target sm89"),
    "OLD_CUDA_DRIVER": (BackendUnavailable, "runs CUDA 13.0; install NVIDIA's driver"),
    "OLD_CUDA_RUNTIME": (
        BackendUnavailable,
        "finds the CUDA runtime too old .* pip install --upgrade 'nitro-rt\\[tensorrt-rtx\\]'",
    ),
    "INSUFFICIENT_GPU_MEMORY": (BackendUnavailable, "has 20.00 GiB free of 24.00 GiB"),
    "MALFORMED_ENGINE": (BundleError, f"is no plan of TensorRT-RTX {VERSION}; build the bundle again"),
    "CUDA_ERROR": (BackendUnavailable, "calls .*json invalid \\(CUDA_ERROR\\)"),
}


@pytest.fixture
def rtx_bundle(make_bundle: Any, tmp_path: Path) -> Bundle:
    folder = make_bundle(tmp_path / "rtx", backend="tensorrt-rtx", target={"device": "cuda", "targets": "sm86 sm89"})
    return _built(open_bundle(folder), toolchain={"tensorrt-rtx": VERSION})


def test_every_diagnostic_of_tensorrt_rtx_is_known() -> None:
    assert set(SAID) == set(rtx.EngineInvalidityDiagnostics.__members__)


@pytest.mark.parametrize("name", SAID)
def test_tensorrt_rtx_s_reasons_in_our_words(rtx_bundle: Bundle, name: str) -> None:
    kind, said = SAID[name]
    bits = int(rtx.EngineInvalidityDiagnostics.__members__[name].value)
    with pytest.raises(kind, match=said) as caught:
        diagnose(rtx_bundle, _machine(answer=(rtx.EngineValidity.INVALID, bits)))
    _one_line(str(caught.value))


def test_the_most_telling_of_several_reasons(rtx_bundle: Bundle) -> None:
    diagnostics = rtx.EngineInvalidityDiagnostics
    bits = int(diagnostics.CUDA_ERROR.value) | int(diagnostics.VERSION_MISMATCH.value)
    assert "built with" in _refused(rtx_bundle, _machine(answer=(rtx.EngineValidity.INVALID, bits)), EngineMismatch)


def test_invalid_without_a_reason(rtx_bundle: Bundle) -> None:
    """What TensorRT-RTX 1.7 answers where CUDA does not start."""
    message = _refused(rtx_bundle, _machine(answer=(rtx.EngineValidity.INVALID, 0)), BackendUnavailable)
    assert "invalid (without a reason)" in message


def test_suboptimal_is_a_note(rtx_bundle: Bundle) -> None:
    notes = diagnose(rtx_bundle, _machine(answer=(rtx.EngineValidity.SUBOPTIMAL, 0)))
    assert len(notes) == 4 and notes[0].startswith("TensorRT-RTX calls text suboptimal on NVIDIA RTX 4090")


def test_the_real_tensorrt_rtx_refuses_what_is_no_plan(rtx_bundle: Bundle) -> None:
    """It reads headers without a driver, so only CUDA is a stand-in here."""
    modules = replace(_machine(), trt=rtx)
    with pytest.raises(BundleError, match=f"is no plan of TensorRT-RTX {rtx.__version__}"):
        diagnose(_built(rtx_bundle, toolchain={"tensorrt-rtx": rtx.__version__}), modules)


# The same on the simulated machine, before an engine is deserialised there.


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
@pytest.mark.parametrize(
    ("machine", "kind", "said"),
    [
        ({"compute_capability": (9, 0)}, EngineMismatch, "here GPU 0 is Simulated GPU \\(sm90\\); build for it"),
        ({"driver_version": 12080}, BackendUnavailable, "CUDA 13.0 is needed, .* runs CUDA 12.8"),
        ({"memory_bytes": 4096}, BackendUnavailable, "has 0.00 GiB free of 0.00 GiB"),
        ({"num_devices": 2}, BackendUnavailable, "no GPU 2; .* 0 is Simulated GPU \\(sm89\\), 1 is Simulated GPU"),
    ],
    ids=["other GPU", "old driver", "memory", "device"],
)
def test_a_simulated_machine_is_refused(
    make_bundle: Any, tmp_path: Path, backend: str, machine: dict[str, Any], kind: type[Exception], said: str
) -> None:
    world = simulated(backend, **machine)
    onnx_bundle = make_bundle(tmp_path / "onnx", backend="onnxruntime")
    bundle = open_bundle(world.bundle(onnx_bundle, tmp_path / "plans"))
    plan = MemoryPlan(disk_bytes=0, weight_bytes=GIB, io_bytes=4096)
    with pytest.raises(kind, match=said):
        DeviceExecutor(_built(bundle, memory_plan=plan), DeviceOptions(device=2 * ("num_devices" in machine)), world.modules)
    assert world.open_things() == [] and world.simulation.counts["allocation"] == 0


@pytest.mark.parametrize(
    ("plan", "kind", "said"),
    [
        ({}, None, ""),
        ({"version": "1.6.0.0"}, EngineMismatch, "built with TensorRT-RTX"),
        ({"min_driver_version": 13040}, BackendUnavailable, "the NVIDIA driver.* runs CUDA 13.0"),
        ({"scratch_bytes": 1 << 40}, BackendUnavailable, "GiB free of 8.00 GiB"),
    ],
    ids=["fits", "version", "driver", "memory"],
)
def test_a_simulated_plan_is_asked_about_by_its_header(
    make_bundle: Any, tmp_path: Path, plan: dict[str, Any], kind: type[Exception] | None, said: str
) -> None:
    world = simulated("tensorrt-rtx")
    onnx_bundle = make_bundle(tmp_path / "onnx", backend="onnxruntime")
    bundle = open_bundle(world.bundle(onnx_bundle, tmp_path / "plans", **plan))
    if kind is None:
        assert diagnose(bundle, world.modules) == ()
        return
    with pytest.raises(kind, match=said):
        diagnose(bundle, world.modules)


# Before the libraries are loaded.


def _driver(monkeypatch: pytest.MonkeyPatch, driver: Driver) -> None:
    monkeypatch.setattr(diagnosis, "find_driver", lambda: driver)


def test_a_gpu_is_looked_for_before_a_library(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    _driver(monkeypatch, NO_DRIVER)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(BackendUnavailable, match="no NVIDIA driver") as caught:
        require_machine(bundle)
    _one_line(str(caught.value))


def test_no_gpu_of_this_machine_fits(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    _driver(monkeypatch, replace(CARD, gpus=(Gpu(name="RTX 5090", target="sm120"), Gpu(name="T4", target="sm75", ordinal=1))))
    with pytest.raises(EngineMismatch, match="here GPU 0 is RTX 5090 \\(sm120\\), GPU 1 is T4 \\(sm75\\); build for it"):
        require_machine(bundle)


@pytest.mark.parametrize("module", ["library", "cuda.core", "cuda.bindings.driver"])
def test_a_missing_library_names_the_extra(bundle: Bundle, monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    _driver(monkeypatch, CARD)
    library = bundle.backend.replace("-", "_")
    monkeypatch.setitem(sys.modules, library, SimpleNamespace())
    monkeypatch.setitem(sys.modules, library if module == "library" else module, None)
    with pytest.raises(BackendUnavailable, match=f"pip install 'nitro-rt\\[{bundle.backend}\\]'") as caught:
        require_machine(bundle)
    assert (library if module == "library" else module) in _one_line(str(caught.value))


def test_a_complete_machine(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    _driver(monkeypatch, CARD)
    monkeypatch.setitem(sys.modules, bundle.backend.replace("-", "_"), SimpleNamespace())
    require_machine(bundle)


def test_a_library_that_fails_while_it_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "half_a_library.py").write_text("raise OSError('libnvinfer.so.11: cannot\\n open')", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert import_error("half_a_library") == "libnvinfer.so.11: cannot open"
    assert import_error("json") is None


# The bundle where it cannot run.


@pytest.mark.skipif(bool(diagnosis.find_driver().gpus), reason="this machine has a GPU")
def test_the_real_libraries_say_that_there_is_no_driver() -> None:
    import cuda.bindings.driver
    import cuda.core

    driver = driver_of(DeviceModules(cuda=cuda.core, driver=cuda.bindings.driver, trt=rtx))
    assert not driver.found and driver.reason.startswith("no NVIDIA driver (") and "\n" not in driver.reason


@pytest.mark.skipif(bool(diagnosis.find_driver().gpus), reason="this machine has a GPU")
def test_it_opens_and_verifies_without_a_gpu(bundle: Bundle) -> None:
    checks = {check.name: check for check in verify_bundle(bundle.folder)}
    assert [checks[name].status for name in ("manifest", "files", "schedule", "image")] == ["ok", "ok", "ok", "skipped"]
    assert "no NVIDIA driver" in checks["image"].detail
    with pytest.raises(BackendUnavailable, match="no NVIDIA driver") as caught:
        Pipeline.load(bundle.folder)
    _one_line(str(caught.value))


@pytest.mark.gpu
def test_the_gpu_of_this_machine_is_found_both_ways() -> None:
    import cuda.bindings.driver
    import cuda.core

    found = driver_of(DeviceModules(cuda=cuda.core, driver=cuda.bindings.driver, trt=rtx))
    asked = diagnosis.find_driver()
    assert found.cuda_version == asked.cuda_version
    assert [(gpu.name, gpu.target) for gpu in found.gpus] == [(gpu.name, gpu.target) for gpu in asked.gpus]

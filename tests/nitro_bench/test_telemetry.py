"""Readings of a GPU that is not here, through a library that stands in for nvidia-ml-py."""

from __future__ import annotations

import dataclasses
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from nitro_bench import telemetry
from nitro_bench.bench_markdown import state_facts
from nitro_bench.telemetry import MachineState, read_state
from nitro_rt.device import Driver, Gpu

BUS_ID = "0000:65:00.0"


class NVMLError(Exception):
    pass


class NVMLError_NotSupported(NVMLError):
    pass


def refuse(*arguments: Any) -> Any:
    raise NVMLError_NotSupported("Not Supported")


def library(**changes: Any) -> SimpleNamespace:
    values: dict[str, Any] = {
        "NVMLError": NVMLError,
        "NVMLError_NotSupported": NVMLError_NotSupported,
        "NVML_CLOCK_SM": 1,
        "NVML_CLOCK_MEM": 2,
        "NVML_TEMPERATURE_GPU": 0,
        "nvmlClocksEventReasonGpuIdle": 1,
        "nvmlClocksEventReasonApplicationsClocksSetting": 2,
        "nvmlClocksEventReasonSwPowerCap": 4,
        "nvmlClocksEventReasonHwSlowdown": 8,
        "nvmlClocksEventReasonAll": 15,
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetHandleByIndex": lambda index: f"number {index}",
        "nvmlDeviceGetHandleByPciBusId": lambda bus_id: f"at {bus_id.decode()}",
        "nvmlDeviceGetName": lambda gpu: f"GPU {gpu}",
        "nvmlSystemGetDriverVersion": lambda: b"580.65",
        "nvmlDeviceGetClockInfo": lambda gpu, kind: 1000 * kind,
        "nvmlDeviceGetMaxClockInfo": lambda gpu, kind: 2500,
        "nvmlDeviceGetPowerUsage": lambda gpu: 300_000,
        "nvmlDeviceGetEnforcedPowerLimit": lambda gpu: 450_000,
        "nvmlDeviceGetTemperature": lambda gpu, kind: 61,
        "nvmlDeviceGetCurrentClocksEventReasons": lambda gpu: 1 | 2 | 4,
        "nvmlDeviceGetMemoryInfo": lambda gpu: SimpleNamespace(used=3 << 30),
    }
    return SimpleNamespace(**(values | changes))


@pytest.fixture(autouse=True)
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(name="NVIDIA L4", target="sm89", bus_id=BUS_ID)
    driver = Driver(found=True, cuda_version="13.0", gpus=(gpu,), reason="")
    monkeypatch.setattr(telemetry, "find_driver", lambda: driver)


def read(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> MachineState:
    monkeypatch.setitem(sys.modules, "pynvml", library(**changes))  # type: ignore[arg-type]
    return read_state()


def test_the_gpu_is_the_one_that_cuda_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = read(monkeypatch).gpu
    assert gpu is not None and gpu.name == f"GPU at {BUS_ID}" and gpu.driver == "580.65"
    assert (gpu.sm_clock_mhz, gpu.max_sm_clock_mhz, gpu.memory_clock_mhz) == (1000, 2500, 2000)
    assert (gpu.power_w, gpu.power_limit_w, gpu.temperature_c, gpu.used_memory_bytes) == (300.0, 450.0, 61, 3 << 30)
    assert gpu.throttle_reasons == ("SwPowerCap",)  # to be idle, or as the user has set it, is no throttling


def test_what_a_gpu_does_not_tell_takes_nothing_else_away(monkeypatch: pytest.MonkeyPatch) -> None:
    silent = ("nvmlDeviceGetEnforcedPowerLimit", "nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetTemperature")
    state = read(monkeypatch, **dict.fromkeys(silent, refuse))
    gpu = state.gpu
    assert gpu is not None and (gpu.power_limit_w, gpu.throttle_reasons, gpu.temperature_c) == (None, None, None)
    assert gpu.power_w == 300.0 and gpu.used_memory_bytes == 3 << 30
    facts = dict(state_facts(state))
    assert facts["GPU power"] == "300 of - W" and facts["GPU held down by"] == "-" and ", - C, 3,072 MiB" in facts["GPU"]


def test_the_reading_that_most_held_the_clocks_down_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    hot = read(monkeypatch, nvmlDeviceGetCurrentClocksEventReasons=lambda gpu: 4 | 8)
    idle = dataclasses.replace(read(monkeypatch, nvmlDeviceGetCurrentClocksEventReasons=lambda gpu: 1), load_average=9.0)
    kept = telemetry.after([idle, hot, idle])
    assert kept.gpu == hot.gpu and kept.load_average == 9.0
    assert telemetry.after([dataclasses.replace(idle, gpu=None)]).gpu is None


def test_a_library_without_a_gpu_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise NVMLError("Driver Not Loaded")

    state = read(monkeypatch, nvmlInit=broken)
    assert state.gpu is None and state.reasons["gpu"] == "no GPU answers nvidia-ml-py: Driver Not Loaded"

"""The state of processor and GPU around a measurement: load, clocks, power, throttling."""

from __future__ import annotations

import dataclasses
import importlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nitro_rt.device import find_driver

PACKAGE = "nvidia-ml-py"


@dataclass(frozen=True, kw_only=True)
class GpuState:
    """One reading of a GPU. What it does not tell, as laptops and parts of a GPU do not tell power, is None."""

    name: str
    driver: str
    sm_clock_mhz: int | None
    max_sm_clock_mhz: int | None
    memory_clock_mhz: int | None
    power_w: float | None
    power_limit_w: float | None
    temperature_c: int | None
    throttle_reasons: tuple[str, ...] | None
    """What holds the clocks down just now; empty where nothing does."""
    used_memory_bytes: int | None
    """On the whole GPU, all processes."""


@dataclass(frozen=True, kw_only=True)
class MachineState:
    """One reading. What is not here is None, and `reasons` says why."""

    load_average: float
    """Processes that ran or waited, over the last minute."""
    cpu_mhz: float | None
    """Mean over the cores."""
    stolen_s: float | None
    """Processor time that the hypervisor gave to others since the machine started."""
    gpu: GpuState | None
    reasons: dict[str, str] = field(default_factory=dict)


def read_state() -> MachineState:
    """Never raises: a machine without a GPU, or one that tells little, is a normal answer."""
    reasons: dict[str, str] = {}
    gpu, why = _read_gpu()
    if gpu is None:
        reasons["gpu"] = why
    mhz = [float(value) for value in re.findall(r"^cpu MHz\s*:\s*([\d.]+)", _text("/proc/cpuinfo"), re.MULTILINE)]
    if not mhz:
        reasons["cpu_mhz"] = "/proc/cpuinfo does not tell the clock"
    stolen_s = _stolen_s()
    if stolen_s is None:
        reasons["stolen_s"] = "/proc/stat does not tell stolen time"
    load = float((_text("/proc/loadavg").split() or ["nan"])[0])
    cpu_mhz = sum(mhz) / len(mhz) if mhz else None
    return MachineState(load_average=load, cpu_mhz=cpu_mhz, stolen_s=stolen_s, gpu=gpu, reasons=reasons)


def after(states: Sequence[MachineState]) -> MachineState:
    """The last of several readings, with the GPU as it was when most held its clocks down: an idle GPU at the end tells nothing
    of what the images in between went through."""
    gpus = [state.gpu for state in states if state.gpu is not None]
    worst = max(gpus, key=lambda gpu: len(gpu.throttle_reasons or ()), default=None)
    return dataclasses.replace(states[-1], gpu=worst)


def _stolen_s() -> float | None:
    fields = (_text("/proc/stat").splitlines() or [""])[0].split()
    # cpu user nice system idle iowait irq softirq steal ..., in hundredths of a second
    return int(fields[8]) / 100 if len(fields) > 8 else None


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _read_gpu() -> tuple[GpuState | None, str]:
    """The GPU that CUDA calls 0, or why there is none."""
    try:
        nvml: Any = importlib.import_module("pynvml")
    except ImportError:
        return None, f"{PACKAGE} is not installed; pip install 'nitro-rt[bench]'"
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as exc:
        return None, f"no GPU answers {PACKAGE}: {exc}"
    try:
        return _state_of(nvml, _first(nvml)), ""
    except nvml.NVMLError as exc:
        return None, f"{PACKAGE} cannot read the GPU: {exc}"
    finally:
        nvml.nvmlShutdown()


def _first(nvml: Any) -> Any:
    """By its PCI address, since NVML numbers GPUs in another order than CUDA and knows no CUDA_VISIBLE_DEVICES."""
    gpus = find_driver().gpus
    if gpus and gpus[0].bus_id:
        return nvml.nvmlDeviceGetHandleByPciBusId(gpus[0].bus_id.encode())
    return nvml.nvmlDeviceGetHandleByIndex(0)


SLOWS_NOTHING = ("GpuIdle", "ApplicationsClocksSetting", "UserDefinedClocks", "None", "All")
"""Of NVML's reasons for a clock: there was nothing to do, or the user has set it; and two names that are no reasons."""


def _state_of(nvml: Any, gpu: Any) -> GpuState:
    def told(read: Callable[..., Any], *arguments: Any) -> Any:
        """None for what this GPU does not tell."""
        try:
            return read(gpu, *arguments)
        except nvml.NVMLError_NotSupported:
            return None

    def watts(milliwatts: float | None) -> float | None:
        return None if milliwatts is None else milliwatts / 1e3

    memory = told(nvml.nvmlDeviceGetMemoryInfo)
    return GpuState(
        name=_str(nvml.nvmlDeviceGetName(gpu)),
        driver=_str(nvml.nvmlSystemGetDriverVersion()),
        sm_clock_mhz=told(nvml.nvmlDeviceGetClockInfo, nvml.NVML_CLOCK_SM),
        max_sm_clock_mhz=told(nvml.nvmlDeviceGetMaxClockInfo, nvml.NVML_CLOCK_SM),
        memory_clock_mhz=told(nvml.nvmlDeviceGetClockInfo, nvml.NVML_CLOCK_MEM),
        power_w=watts(told(nvml.nvmlDeviceGetPowerUsage)),
        power_limit_w=watts(told(nvml.nvmlDeviceGetEnforcedPowerLimit)),
        temperature_c=told(nvml.nvmlDeviceGetTemperature, nvml.NVML_TEMPERATURE_GPU),
        throttle_reasons=_reasons(nvml, told(nvml.nvmlDeviceGetCurrentClocksEventReasons)),
        used_memory_bytes=None if memory is None else int(memory.used),
    )


def _reasons(nvml: Any, held: int | None) -> tuple[str, ...] | None:
    """NVML's names for the bits: nvmlClocksEventReasonHwSlowdown = 8, ..."""
    if held is None:
        return None
    prefix = "nvmlClocksEventReason"
    known = {name.removeprefix(prefix): getattr(nvml, name) for name in dir(nvml) if name.startswith(prefix)}
    return tuple(
        sorted(name for name, bit in known.items() if isinstance(bit, int) and bit & held and name not in SLOWS_NOTHING)
    )


def _str(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)

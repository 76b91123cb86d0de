"""The state of processor and GPU around a measurement: load, clocks, power, throttling."""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PACKAGE = "nvidia-ml-py"


@dataclass(frozen=True, kw_only=True)
class GpuState:
    """One reading of a GPU."""

    name: str
    driver: str
    sm_clock_mhz: int
    max_sm_clock_mhz: int
    memory_clock_mhz: int
    power_w: float
    power_limit_w: float
    temperature_c: int
    throttle_reasons: tuple[str, ...]
    """What holds the clocks down just now; empty where nothing does."""
    used_memory_bytes: int
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
    """The first GPU, or why there is none."""
    try:
        nvml: Any = importlib.import_module("pynvml")
    except ImportError:
        return None, f"{PACKAGE} is not installed; pip install 'nitro-rt[bench]'"
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as exc:
        return None, f"no GPU answers {PACKAGE}: {exc}"
    try:
        return _state_of(nvml, nvml.nvmlDeviceGetHandleByIndex(0)), ""
    except nvml.NVMLError as exc:
        return None, f"{PACKAGE} cannot read the GPU: {exc}"
    finally:
        nvml.nvmlShutdown()


def _state_of(nvml: Any, gpu: Any) -> GpuState:
    # NVML's names for the reasons: nvmlClocksEventReasonHwSlowdown = 8, ...; idle and "set by the user" do not slow anything.
    held = int(nvml.nvmlDeviceGetCurrentClocksEventReasons(gpu))
    prefix = "nvmlClocksEventReason"
    known = {name.removeprefix(prefix): getattr(nvml, name) for name in dir(nvml) if name.startswith(prefix)}
    reasons = sorted(
        name for name, bit in known.items() if isinstance(bit, int) and bit & held and name not in ("GpuIdle", "All", "None")
    )
    return GpuState(
        name=_str(nvml.nvmlDeviceGetName(gpu)),
        driver=_str(nvml.nvmlSystemGetDriverVersion()),
        sm_clock_mhz=nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_SM),
        max_sm_clock_mhz=nvml.nvmlDeviceGetMaxClockInfo(gpu, nvml.NVML_CLOCK_SM),
        memory_clock_mhz=nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_MEM),
        power_w=nvml.nvmlDeviceGetPowerUsage(gpu) / 1e3,
        power_limit_w=nvml.nvmlDeviceGetEnforcedPowerLimit(gpu) / 1e3,
        temperature_c=nvml.nvmlDeviceGetTemperature(gpu, nvml.NVML_TEMPERATURE_GPU),
        throttle_reasons=tuple(reasons),
        used_memory_bytes=int(nvml.nvmlDeviceGetMemoryInfo(gpu).used),
    )


def _str(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)

"""The NVIDIA driver and the GPUs of this machine, asked without any extra of nitro-rt installed.

The driver is asked through `ctypes`, because `nitro-rt doctor` and the refusal of a bundle must work before `cuda-core` is
there; what runs on a GPU uses `cuda.core`. Why a bundle does not run is `nitro_rt.diagnosis`.
"""

from __future__ import annotations

import ctypes
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from nitro_rt.bundle import Bundle

RUNTIMES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
"""Backend -> the module that runs it; the extra of `nitro-rt` has the backend's name."""

RTX_TARGETS = ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121")
"""The GPUs that TensorRT-RTX runs on. Data-centre Hopper and Blackwell (sm90, sm100) are TensorRT proper's."""

KERNEL_MODULE = Path("/proc/driver/nvidia/version")
"""Where the driver's kernel module tells its own version, such as 580.65.06; CUDA's version is another one."""

NO_GPU = "the NVIDIA driver finds no GPU"

# CUresult and CUdevice_attribute of cuda.h
_NO_DEVICE = 100
_COMPUTE_CAPABILITY_MAJOR, _COMPUTE_CAPABILITY_MINOR = 75, 76
_BUS_ID_LENGTH = 32


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One NVIDIA GPU."""

    name: str
    target: str
    """sm89 and the like."""
    ordinal: int = 0
    """CUDA's number for it, which CUDA_VISIBLE_DEVICES and CUDA_DEVICE_ORDER change."""
    memory_bytes: int | None = None
    """All of its memory; None where it was not told."""
    free_bytes: int | None = None
    """What no process has taken; None where the driver's management library does not tell."""
    bus_id: str = ""
    """Its PCI address, by which the management library knows it."""

    def __str__(self) -> str:
        return f"{self.name} ({self.target})"


@dataclass(frozen=True, kw_only=True)
class Driver:
    """The NVIDIA driver of this machine."""

    found: bool
    cuda_version: str
    """The newest CUDA that the driver runs, such as 13.0; empty without a driver."""
    gpus: tuple[Gpu, ...]
    reason: str
    """Why nothing was found; empty where a GPU was."""
    version: str = ""
    """The driver's own, such as 580.65.06; empty where the system does not tell."""


def find_driver() -> Driver:
    """Ask the driver. Never raises: a machine without one is a normal answer."""
    library = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        cuda = ctypes.CDLL(library)
    except OSError:
        return Driver(found=False, cuda_version="", gpus=(), reason=f"no NVIDIA driver ({library} is not here)")
    status = cuda.cuInit(0)
    number = ctypes.c_int()
    cuda.cuDriverGetVersion(ctypes.byref(number))
    gpus = tuple(_gpus(cuda)) if status == 0 else ()
    reason = NO_GPU if status in (0, _NO_DEVICE) else unusable(f"cuInit gave {status}")
    return Driver(
        found=True,
        cuda_version=cuda_version(number.value),
        gpus=gpus,
        reason="" if gpus else reason,
        version=driver_version(),
    )


def unusable(why: str) -> str:
    """The reason of a driver that is installed and does not start."""
    return f"the NVIDIA driver does not start ({why})"


def cuda_version(number: int) -> str:
    """13.0 from the driver's 13000; empty from 0, which a driver that does not start gives."""
    return f"{number // 1000}.{number % 1000 // 10}" if number else ""


def driver_version(kernel_module: Path = KERNEL_MODULE) -> str:
    """580.65.06 and the like; empty where the kernel module is not loaded, as on Windows and WSL."""
    try:
        text = kernel_module.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    found = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)\s", text)
    return found[1] if found else ""


def built_targets(bundle: Bundle) -> tuple[str, ...]:
    """The GPUs that a device bundle was built for: sm86, sm89, ..."""
    return tuple(bundle.manifest.target.get("targets", "").split())


def _gpus(cuda: ctypes.CDLL) -> Iterator[Gpu]:
    count = ctypes.c_int()
    cuda.cuDeviceGetCount(ctypes.byref(count))
    with _management() as management:
        for ordinal in range(count.value):
            device, name = ctypes.c_int(), ctypes.create_string_buffer(256)
            major, minor, memory = ctypes.c_int(), ctypes.c_int(), ctypes.c_size_t()
            cuda.cuDeviceGet(ctypes.byref(device), ordinal)
            cuda.cuDeviceGetName(name, len(name), device)
            cuda.cuDeviceGetAttribute(ctypes.byref(major), _COMPUTE_CAPABILITY_MAJOR, device)
            cuda.cuDeviceGetAttribute(ctypes.byref(minor), _COMPUTE_CAPABILITY_MINOR, device)
            cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
            bus_id = ctypes.create_string_buffer(_BUS_ID_LENGTH)
            cuda.cuDeviceGetPCIBusId(bus_id, len(bus_id), device)
            yield Gpu(
                name=name.value.decode(errors="replace"),
                target=f"sm{major.value}{minor.value}",
                ordinal=ordinal,
                memory_bytes=memory.value,
                free_bytes=_free_bytes(management, bus_id.value) if management is not None else None,
                bus_id=bus_id.value.decode(errors="replace"),
            )


class _Memory(ctypes.Structure):
    """nvmlMemory_t of nvml.h."""

    _fields_ = [("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong)]


@contextmanager
def _management() -> Iterator[ctypes.CDLL | None]:
    """The driver's management library (NVML). It tells free memory without a context, which would take some of it."""
    try:
        nvml = ctypes.CDLL("nvml.dll" if sys.platform == "win32" else "libnvidia-ml.so.1")
    except OSError:
        yield None
        return
    if nvml.nvmlInit_v2() != 0:
        yield None
        return
    try:
        yield nvml
    finally:
        nvml.nvmlShutdown()


def _free_bytes(nvml: ctypes.CDLL, bus_id: bytes) -> int | None:
    """Of the GPU at this PCI address: NVML numbers GPUs in another order than CUDA."""
    handle, memory = ctypes.c_void_p(), _Memory()
    if nvml.nvmlDeviceGetHandleByPciBusId_v2(bus_id, ctypes.byref(handle)) != 0:
        return None
    if nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory)) != 0:
        return None
    return int(memory.free)

"""What NVIDIA driver, GPUs and TensorRT runtimes are here, and why a TensorRT bundle cannot run.

The driver is asked through `ctypes`, because this must work where no extra is installed; everything beyond these four
questions is `cuda.core`'s work.
"""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from dataclasses import dataclass

from nitro_rt.bundle import Bundle
from nitro_rt.errors import BackendUnavailable, EngineMismatch, NitroError

RUNTIMES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
"""Backend -> the module that runs it; the extra of `nitro-rt` has the backend's name."""

_COMPUTE_CAPABILITY_MAJOR, _COMPUTE_CAPABILITY_MINOR = 75, 76  # CUdevice_attribute


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One NVIDIA GPU."""

    name: str
    target: str
    """sm89 and the like."""


@dataclass(frozen=True, kw_only=True)
class Driver:
    """The NVIDIA driver of this machine."""

    found: bool
    cuda_version: str
    """The newest CUDA that the driver runs, such as 13.0; empty without a driver."""
    gpus: tuple[Gpu, ...]
    reason: str
    """Why nothing was found; empty where a GPU was."""


def find_driver() -> Driver:
    """Ask the driver. Never raises: a machine without one is a normal answer."""
    library = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        cuda = ctypes.CDLL(library)
    except OSError:
        return Driver(found=False, cuda_version="", gpus=(), reason=f"no NVIDIA driver ({library} is not here)")
    status = cuda.cuInit(0)
    if status != 0:
        return Driver(found=True, cuda_version="", gpus=(), reason=f"the NVIDIA driver does not start (cuInit gave {status})")
    version = ctypes.c_int()
    cuda.cuDriverGetVersion(ctypes.byref(version))
    gpus = _gpus(cuda)
    return Driver(
        found=True,
        cuda_version=f"{version.value // 1000}.{version.value % 1000 // 10}",
        gpus=gpus,
        reason="" if gpus else "the NVIDIA driver finds no GPU",
    )


def _gpus(cuda: ctypes.CDLL) -> tuple[Gpu, ...]:
    count = ctypes.c_int()
    cuda.cuDeviceGetCount(ctypes.byref(count))
    gpus = []
    for ordinal in range(count.value):
        device, name = ctypes.c_int(), ctypes.create_string_buffer(256)
        major, minor = ctypes.c_int(), ctypes.c_int()
        cuda.cuDeviceGet(ctypes.byref(device), ordinal)
        cuda.cuDeviceGetName(name, len(name), device)
        cuda.cuDeviceGetAttribute(ctypes.byref(major), _COMPUTE_CAPABILITY_MAJOR, device)
        cuda.cuDeviceGetAttribute(ctypes.byref(minor), _COMPUTE_CAPABILITY_MINOR, device)
        gpus.append(Gpu(name=name.value.decode(errors="replace"), target=f"sm{major.value}{minor.value}"))
    return tuple(gpus)


def built_targets(bundle: Bundle) -> tuple[str, ...]:
    """The GPUs that a device bundle was built for: sm86, sm89, ..."""
    return tuple(bundle.manifest.target.get("targets", "").split())


def refuse(bundle: Bundle) -> NitroError:
    """The error that says in one line why this device bundle does not run here, and what to do."""
    backend, driver = bundle.backend, find_driver()
    targets = ", ".join(built_targets(bundle)) or "an NVIDIA GPU"
    what = f"{bundle.folder} holds {backend} engines for {targets}"
    elsewhere = "run it on such a machine, or build one for this CPU: nitro-rt build --backend openvino"
    if driver.reason:
        return BackendUnavailable(f"{what}; {driver.reason}; {elsewhere}")
    here = ", ".join(f"{gpu.name} ({gpu.target})" for gpu in driver.gpus)
    if built_targets(bundle) and not {gpu.target for gpu in driver.gpus} & set(built_targets(bundle)):
        own = driver.gpus[0].target
        return EngineMismatch(f"{what}; here is {here}; build it again: nitro-rt build --backend {backend} --target {own}")
    if importlib.util.find_spec(RUNTIMES[backend]) is None:
        return BackendUnavailable(f"{what}; {RUNTIMES[backend]} is not installed; pip install 'nitro-rt[{backend}]'")
    return BackendUnavailable(
        f"{what}; this version of nitro-rt builds {backend} engines but does not run them yet, although {here} is here; "
        "build one for the CPU: nitro-rt build --backend openvino"
    )

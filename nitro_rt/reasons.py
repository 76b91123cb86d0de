"""What can stand in the way of a GPU backend, each in words: what was found, and what to do about it.

Pure functions of what was found; `nitro_rt.diagnosis` decides which of them holds, and `nitro-rt doctor` prints them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nitro_rt.device import RTX_TARGETS, Driver, Gpu
from nitro_rt.errors import BackendUnavailable, BundleError, EngineMismatch, NitroError

CUDA_MAJOR = 13
"""The CUDA of our extras, which install `-cu13` wheels. A driver runs every CUDA of its own major and of older ones:
docs.nvidia.com/deploy/cuda-compatibility, "Minor Version Compatibility"."""
OLDEST_DRIVER = "580"
"""The first that runs CUDA 13."""
LIBRARIES = {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT-RTX"}
WHEELS = {"tensorrt": "tensorrt-cu13", "tensorrt-rtx": "tensorrt-rtx-cu13"}
FOR_CPU = "nitro-rt build --backend openvino"
"""Builds what runs without a GPU."""


@dataclass(frozen=True, kw_only=True)
class Reason:
    """One thing in the way."""

    kind: type[NitroError]
    found: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.found}; {self.remedy}"


def no_gpu(driver: Driver) -> Reason:
    """No driver, one that does not start, or one that finds no GPU."""
    mend = f"install NVIDIA's driver, {OLDEST_DRIVER} or newer, where there is a GPU, or build for this CPU: {FOR_CPU}"
    return Reason(kind=BackendUnavailable, found=driver.reason, remedy=mend)


def no_library(backend: str, module: str, why: str) -> Reason:
    """A module that the backend runs on cannot be imported."""
    return Reason(kind=BackendUnavailable, found=f"{module} cannot be imported ({why})", remedy=install(backend))


def no_device(gpus: Sequence[Gpu], device_id: int) -> Reason:
    """The number that was asked for is none of CUDA's."""
    here = ", ".join(f"{gpu.ordinal} is {gpu}" for gpu in gpus)
    return Reason(kind=BackendUnavailable, found=f"there is no GPU {device_id}", remedy=f"choose one that is here: {here}")


def other_gpu(backend: str, asked: Sequence[Gpu], fitting: Sequence[Gpu] = ()) -> Reason:
    """The engines are for other compute capabilities.

    Args:
        asked: those that the engines do not fit.
        fitting: others of this machine that they fit.
    """
    here = ", ".join(f"GPU {gpu.ordinal} is {gpu}" for gpu in asked)
    if fitting:
        mend = f"choose GPU {fitting[0].ordinal}, {fitting[0]}"
    else:
        mend = f"build for it: {build_command(backend, asked[0])}"
    return Reason(kind=EngineMismatch, found=f"here {here}", remedy=mend)


def no_rtx_gpu(gpus: Sequence[Gpu]) -> Reason:
    """TensorRT-RTX has no code for any GPU of this machine."""
    here = ", ".join(map(str, gpus))
    return Reason(
        kind=EngineMismatch,
        found=f"TensorRT-RTX runs on {', '.join(RTX_TARGETS)}, and here is {here}",
        remedy=f"build for it: {build_command('tensorrt', gpus[0])}",
    )


def old_driver(driver: Driver, needed_cuda: str) -> Reason:
    """The driver runs only an older major of CUDA."""
    version = f" {driver.version}" if driver.version else ""
    return Reason(
        kind=BackendUnavailable,
        found=f"CUDA {needed_cuda} is needed, and the NVIDIA driver{version} runs CUDA {driver.cuda_version}",
        remedy=f"install NVIDIA's driver, {OLDEST_DRIVER} or newer",
    )


def other_version(backend: str, built: str | None, here: str) -> Reason:
    """Plans run on the release that built them. Args: built: None where that is not known."""
    library = LIBRARIES[backend]
    found = f"they were built with {library} {built or 'of another version'}, and here is {library} {here}"
    old = f"pip install '{WHEELS[backend]}=={built}', or " if built else ""
    return Reason(kind=EngineMismatch, found=found, remedy=f"{old}build the bundle again with {here}")


def old_runtime(backend: str, here: str) -> Reason:
    """The library finds the CUDA libraries that it was installed with too old."""
    found = f"{LIBRARIES[backend]} {here} finds the CUDA runtime too old for the engines"
    return Reason(kind=BackendUnavailable, found=found, remedy=install(backend, "--upgrade "))


def too_little_memory(needed_bytes: int, gpu: Gpu) -> Reason:
    """Less is free than loading takes."""
    has = f"{gib(gpu.free_bytes)} free of {gib(gpu.memory_bytes)}"
    return Reason(
        kind=BackendUnavailable,
        found=f"they need {gib(needed_bytes)} of GPU memory, and {gpu} has {has}",
        remedy="close other programs on it (nvidia-smi lists them), or build with a smaller --size, --batch or --precision",
    )


def no_plan(backend: str, path: Path, here: str) -> Reason:
    """The file is not what the library writes."""
    return Reason(kind=BundleError, found=f"{path} is no plan of {LIBRARIES[backend]} {here}", remedy="build the bundle again")


def no_answer(gpu: Gpu, why: str) -> Reason:
    """CUDA fails on this GPU, for a reason that is none of the others."""
    return Reason(
        kind=BackendUnavailable, found=f"{gpu} does not answer: {why}", remedy="see nvidia-smi, and try again in a new process"
    )


def install(extra: str, option: str = "") -> str:
    """The command that installs an extra; those of the GPU backends have the backends' names."""
    return f"pip install {option}'nitro-rt[{extra}]'"


def build_command(backend: str, gpu: Gpu) -> str:
    """What builds engines for this GPU: TensorRT on its own machine, TensorRT-RTX anywhere for those that it knows."""
    if backend == "tensorrt-rtx" and gpu.target in RTX_TARGETS:
        return f"nitro-rt build --backend tensorrt-rtx --target {gpu.target}"
    return "nitro-rt build --backend tensorrt (on that machine)"


def gib(num_bytes: int | None) -> str:
    """3.91 GiB, for people."""
    return "an unknown amount" if num_bytes is None else f"{num_bytes / (1 << 30):.2f} GiB"

"""Whether a TensorRT or TensorRT-RTX bundle runs here, decided before an engine is deserialised.

A deserialiser says little: it returns None, and without a driver it crashes. So the machine is asked first, from the cheapest
question to the dearest: driver, GPU, CUDA, library, memory, the files' digests, and last TensorRT-RTX's own opinion of its
plans, which TensorRT proper does not have.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nitro_rt import reasons
from nitro_rt.bundle import Bundle
from nitro_rt.device import (
    NO_GPU,
    RUNTIMES,
    Driver,
    Gpu,
    built_targets,
    cuda_version,
    driver_version,
    find_driver,
    unusable,
)
from nitro_rt.errors import NitroError
from nitro_rt.manifest import check_file
from nitro_rt.reasons import CUDA_MAJOR, Reason

if TYPE_CHECKING:
    from nitro_rt.device_modules import DeviceModules

CUDA_MODULES = ("cuda.core", "cuda.bindings.driver")
"""What every GPU backend of ours runs on, beside its own library."""


def require_machine(bundle: Bundle) -> None:
    """What can be asked without the bundle's libraries: a GPU that they could serve, and then that they are here.

    Raises: BackendUnavailable for no driver, no GPU or no library; EngineMismatch if the engines fit no GPU here.
    """
    driver, targets = find_driver(), built_targets(bundle)
    if driver.reason:
        raise error(bundle, reasons.no_gpu(driver))
    if targets and not {gpu.target for gpu in driver.gpus} & set(targets):
        raise error(bundle, reasons.other_gpu(bundle.backend, driver.gpus))
    lacking = missing_library(bundle.backend)
    if lacking is not None:
        raise error(bundle, lacking)


def diagnose(bundle: Bundle, modules: DeviceModules, device_id: int = 0) -> tuple[str, ...]:
    """Look for the first reason that keeps the bundle from running on this device, and make the device current.

    Returns: what a user should know although it runs.
    Raises: BackendUnavailable, EngineMismatch or BundleError, in one line.
    """
    driver, here = driver_of(modules), str(modules.trt.__version__)
    reason = next(_reasons(bundle, driver, here, device_id), None)
    if reason is not None:
        raise error(bundle, reason)
    gpu = _with_memory(bundle, driver.gpus[device_id], modules)
    needed = needed_bytes(bundle)
    if gpu.free_bytes is not None and needed > gpu.free_bytes:
        raise error(bundle, reasons.too_little_memory(needed, gpu))
    for reference in dict.fromkeys(reference for _, engine in bundle.engines() for reference in engine.files):
        check_file(bundle.folder, reference)
    return tuple(_opinions(bundle, modules.trt, driver, gpu)) if bundle.backend == "tensorrt-rtx" else ()


def missing_library(backend: str) -> Reason | None:
    """Which of the backend's modules cannot be imported, if any."""
    for module in (RUNTIMES[backend], *CUDA_MODULES):
        why = import_error(module)
        if why is not None:
            return reasons.no_library(backend, module, why)
    return None


def import_error(module: str) -> str | None:
    """Why `module` cannot be imported, in one line; None if it can."""
    try:
        importlib.import_module(module)
    except Exception as exc:  # a broken native library may raise anything
        return _one_line(exc) or repr(exc)
    return None


def driver_of(modules: DeviceModules) -> Driver:
    """The same as `find_driver`, through the libraries that will run the engines."""
    try:
        _, number = modules.driver.cuDriverGetVersion()
        devices = modules.cuda.Device.get_all_devices()
    except RuntimeError as exc:  # of cuda.pathfinder, which looks for the driver
        return _without_gpu(f"no NVIDIA driver ({_one_line(exc)})")
    except Exception as exc:  # cuda.core has a class of its own for CUDA's errors; the message begins with the code
        why = _one_line(exc)
        return _without_gpu(NO_GPU if why.startswith("CUDA_ERROR_NO_DEVICE") else unusable(why))
    gpus = tuple(Gpu(name=device.name, target=_target(device), ordinal=device.device_id) for device in devices)
    version = cuda_version(int(number))
    return Driver(found=True, cuda_version=version, gpus=gpus, reason="" if gpus else NO_GPU, version=driver_version())


def is_older(cuda: str, needed: str) -> bool:
    """Whether a driver of one CUDA does not run programs of the other: within a major, every driver does."""
    return _numbers(cuda)[:1] < _numbers(needed)[:1]


def needed_cuda(bundle: Bundle) -> str:
    """The CUDA that the bundle's library was built with; the first of its major where the bundle does not say."""
    return bundle.manifest.toolchain.get("cuda", f"{CUDA_MAJOR}.0")


def needed_bytes(bundle: Bundle) -> int:
    """GPU memory that loading takes at least: the plans of text, first denoiser and first decoder, and the buffers between.

    The memory plan's weights are those of all step counts and sizes, of which only what is used is loaded.
    """
    manifest = bundle.manifest
    loaded = (manifest.text, manifest.denoise[bundle.built_steps[0]], manifest.decode)
    plans = sum(reference.num_bytes for reference in {reference for engine in loaded for reference in engine.files})
    return min(plans, manifest.memory_plan.weight_bytes) + manifest.memory_plan.io_bytes


def error(bundle: Bundle, reason: Reason) -> NitroError:
    """The reason as the error of this bundle."""
    targets = ", ".join(built_targets(bundle)) or "an NVIDIA GPU"
    return reason.kind(f"{bundle.folder} holds {bundle.backend} engines for {targets}; {reason}")


def _reasons(bundle: Bundle, driver: Driver, here: str, device_id: int) -> Iterator[Reason]:
    """What the machine tells without doing anything. Only the first holds: the later ones suppose that it does not."""
    if driver.reason:
        yield reasons.no_gpu(driver)
    if not 0 <= device_id < len(driver.gpus):
        yield reasons.no_device(driver.gpus, device_id)
    gpu, targets = driver.gpus[device_id], built_targets(bundle)
    if targets and gpu.target not in targets:
        yield reasons.other_gpu(bundle.backend, (gpu,), [other for other in driver.gpus if other.target in targets])
    needed, built = needed_cuda(bundle), bundle.manifest.toolchain.get(bundle.backend)
    if is_older(driver.cuda_version, needed):
        yield reasons.old_driver(driver, needed)
    # A release is three numbers: docs.nvidia.com/deeplearning/tensorrt/latest/getting-started/support-matrix.html,
    # docs.nvidia.com/deeplearning/tensorrt-rtx/latest/inference-library/engine-compatibility.html.
    if built is not None and _numbers(built)[:3] != _numbers(here)[:3]:
        yield reasons.other_version(bundle.backend, built, here)


def _with_memory(bundle: Bundle, gpu: Gpu, modules: DeviceModules) -> Gpu:
    """The GPU with its memory as CUDA counts it, which needs it to be current."""
    try:
        modules.cuda.Device(gpu.ordinal).set_current()
        status, free, total = modules.driver.cuMemGetInfo()
    except Exception as exc:  # as in `driver_of`
        raise error(bundle, reasons.no_answer(gpu, _one_line(exc))) from exc
    if int(status) != 0:
        raise error(bundle, reasons.no_answer(gpu, f"cuMemGetInfo gave {getattr(status, 'name', status)}"))
    return dataclasses.replace(gpu, memory_bytes=int(total), free_bytes=int(free))


def _opinions(bundle: Bundle, trt: Any, driver: Driver, gpu: Gpu) -> Iterator[str]:
    """TensorRT-RTX's answer for every plan, read from its header: a note where it is suboptimal.

    Raises: the error of the first that is invalid.
    """
    runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
    for stage, engine in bundle.engines():
        path = bundle.path(engine.files[0])
        with path.open("rb") as file:
            validity, bits = runtime.get_engine_validity(file.read(runtime.engine_header_size))
        if validity == trt.EngineValidity.INVALID:
            diagnostics = trt.EngineInvalidityDiagnostics.__members__
            names = {name for name, member in diagnostics.items() if bits & int(member.value)}
            raise error(bundle, _invalid(bundle, names, path, str(trt.__version__), driver, gpu))
        if validity == trt.EngineValidity.SUBOPTIMAL:
            yield f"TensorRT-RTX calls {stage} suboptimal on {gpu}: it runs, though slower than one built for it alone"


def _invalid(bundle: Bundle, names: set[str], path: Path, here: str, driver: Driver, gpu: Gpu) -> Reason:
    """TensorRT-RTX's diagnostics in our words; the most telling where there are several."""
    backend = bundle.backend
    if "MALFORMED_ENGINE" in names:
        return reasons.no_plan(backend, path, here)
    if "VERSION_MISMATCH" in names:
        return reasons.other_version(backend, bundle.manifest.toolchain.get(backend), here)
    if "UNSUPPORTED_CC" in names:
        return reasons.other_gpu(backend, (gpu,))
    if "OLD_CUDA_DRIVER" in names:
        return reasons.old_driver(driver, needed_cuda(bundle))
    if "OLD_CUDA_RUNTIME" in names:
        return reasons.old_runtime(backend, here)
    if "INSUFFICIENT_GPU_MEMORY" in names:
        return reasons.too_little_memory(needed_bytes(bundle), gpu)
    why = ", ".join(sorted(names)) or "without a reason"
    return reasons.no_answer(gpu, f"TensorRT-RTX {here} calls {path.name} invalid ({why})")


def _target(device: Any) -> str:
    return f"sm{device.compute_capability.major}{device.compute_capability.minor}"


def _without_gpu(reason: str) -> Driver:
    return Driver(found=False, cuda_version="", gpus=(), reason=reason)


def _numbers(version: str) -> tuple[int, ...]:
    """(1, 7, 1, 116) of 1.7.1.116; what is no number ends it."""
    parts = version.split(".")
    length = next((index for index, part in enumerate(parts) if not part.isdecimal()), len(parts))
    return tuple(int(part) for part in parts[:length])


def _one_line(exc: BaseException) -> str:
    return " ".join(str(exc).split())

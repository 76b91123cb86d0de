"""What this machine has, and what can therefore be built and run on it."""

from __future__ import annotations

import importlib
import os
import platform
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import platformdirs

from nitro_rt.device import Driver, find_driver

PACKAGES = (
    "nitro-rt",
    "numpy",
    "pillow",
    "tokenizers",
    "openvino",
    "onnxruntime",
    "tensorrt-cu13",
    "tensorrt-rtx-cu13",
    "cuda-core",
    "cuda-bindings",
    "polygraphy",
    "torch",
    "diffusers",
    "transformers",
    "onnx",
    "onnxscript",
)
BACKEND_MODULES = {"openvino": "openvino", "onnxruntime": "onnxruntime", "tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
EXTRAS = {"openvino": "cpu", "onnxruntime": "cpu", "tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt-rtx"}
EXPORT_PACKAGES = ("torch", "diffusers", "transformers", "onnx", "onnxscript", "filelock")
BUILDABLE = ("openvino", "onnxruntime", "tensorrt-rtx")
RUNNABLE = ("openvino", "onnxruntime")
CPU_FEATURES = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "avx_vnni",
    "amx_tile",
    "amx_int8",
    "amx_bf16",
    "amx_fp16",
    "asimd",
    "bf16",
    "sve",
)


@dataclass(frozen=True, kw_only=True)
class Cpu:
    """This machine's processor."""

    name: str
    num_cores: int
    """Those that this process may use."""
    features: tuple[str, ...]
    """Instruction sets that decide what a backend computes in."""


@dataclass(frozen=True, kw_only=True)
class Examination:
    """Everything that `nitro-rt doctor` says."""

    python: str
    system: str
    versions: dict[str, str | None]
    """Package -> version, None where it is not installed."""
    cpu: Cpu
    driver: Driver
    cache: Path
    builds: dict[str, str]
    """Backend -> `yes`, or what is missing."""
    runs: dict[str, str]
    """Backend -> `yes`, or why not."""


def examine() -> Examination:
    """Look at this machine. Backends are imported to see that they are, which takes about a second."""
    versions = {name: _version(name) for name in PACKAGES}
    imported = {backend: _import_error(module) for backend, module in BACKEND_MODULES.items()}
    driver = find_driver()
    return Examination(
        python=f"{platform.python_version()} ({sys.executable})",
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        versions=versions,
        cpu=find_cpu(),
        driver=driver,
        cache=cache_folder(),
        builds={backend: _builds(backend, imported[backend]) for backend in BACKEND_MODULES},
        runs={backend: _runs(backend, imported[backend], driver) for backend in BACKEND_MODULES},
    )


def find_cpu(cpuinfo: Path = Path("/proc/cpuinfo")) -> Cpu:
    fields: dict[str, str] = {}
    if cpuinfo.is_file():
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
        fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    return Cpu(
        name=fields.get("model name") or platform.processor() or platform.machine(),
        num_cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        features=tuple(feature for feature in CPU_FEATURES if feature in flags),
    )


def cache_folder() -> Path:
    """Where graphs and engines are kept: NITRO_RT_CACHE, or the user's cache folder."""
    chosen = os.environ.get("NITRO_RT_CACHE")
    if chosen:
        return Path(chosen).expanduser().absolute()
    return Path(platformdirs.user_cache_path("nitro-rt"))


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _import_error(module: str) -> str | None:
    """Why `module` cannot be imported; None if it can."""
    try:
        importlib.import_module(module)
    except ImportError as exc:
        return str(exc)
    except Exception as exc:  # a broken native library may raise anything
        return repr(exc)
    return None


def _builds(backend: str, import_error: str | None) -> str:
    if backend not in BUILDABLE:
        return "no: not built by this version"
    lacking = [name for name in EXPORT_PACKAGES if _version(name) is None]
    if lacking:
        return f"no: {', '.join(lacking)} not installed; pip install 'nitro-rt[export]'"
    if import_error:
        return f"no: {import_error}; pip install 'nitro-rt[{EXTRAS[backend]}]'"
    return "yes"


def _runs(backend: str, import_error: str | None, driver: Driver) -> str:
    if backend not in RUNNABLE:
        return f"no: {driver.reason}" if driver.reason else "no: not run by this version yet"
    if import_error:
        return f"no: {import_error}; pip install 'nitro-rt[{EXTRAS[backend]}]'"
    return "yes"

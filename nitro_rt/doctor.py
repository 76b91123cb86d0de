"""What this machine has, and what can therefore be built and run on it."""

from __future__ import annotations

import importlib
import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import platformdirs

from nitro_rt import reasons
from nitro_rt.device import RTX_TARGETS, RUNTIMES, Driver, find_driver
from nitro_rt.diagnosis import import_error, is_older, missing_library
from nitro_rt.errors import BackendUnavailable
from nitro_rt.providers import PROVIDERS, Placement, missing_provider, not_started, provider_list, start_session
from nitro_rt.reasons import CUDA_MAJOR, Reason

PACKAGES = (
    "nitro-rt",
    "numpy",
    "pillow",
    "tokenizers",
    "openvino",
    "onnxruntime",
    "onnxruntime-gpu",
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
EXPORT_PACKAGES = ("torch", "diffusers", "transformers", "onnx", "onnxscript", "filelock")
BACKENDS: dict[str, str | None] = {
    "openvino": None,
    "onnxruntime": "cpu",
    **{f"onnxruntime --provider {name}": name for name in PROVIDERS if name != "cpu"},
    **dict.fromkeys(RUNTIMES),
}
"""What `doctor` lists -> ONNX Runtime's provider, None for the other backends."""
IDENTITY = bytes.fromhex(
    "08083a370a100a017812017922084964656e746974791201675a0f0a0178120a0a08080112040a02080162"
    "0f0a0179120a0a08080112040a02080142040a00100d"
)
"""An ONNX graph of one operator that does nothing, to start a provider with."""
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
    providers: tuple[str, ...]
    """What this ONNX Runtime was built with; empty where it is not installed."""
    cpu: Cpu
    driver: Driver
    cache: Path
    builds: dict[str, str]
    """By BACKENDS: `yes`, or `no: ` with the first reason and what mends it."""
    runs: dict[str, str]


def examine() -> Examination:
    """Look at this machine. Backends are imported to see that they are, which takes about a second."""
    driver, providers = find_driver(), find_providers()
    return Examination(
        python=f"{platform.python_version()} ({sys.executable})",
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        versions={name: _version(name) for name in PACKAGES},
        providers=providers,
        cpu=find_cpu(),
        driver=driver,
        cache=cache_folder(),
        builds={listed: _answer(_against_building(listed.split()[0], driver)) for listed in BACKENDS},
        runs={
            listed: _answer(_against_running(listed.split()[0], provider, driver, providers))
            for listed, provider in BACKENDS.items()
        },
    )


def find_providers() -> tuple[str, ...]:
    """The execution providers that the installed ONNX Runtime was built with; none where it cannot be imported."""
    if import_error("onnxruntime") is not None:
        return ()
    return tuple(importlib.import_module("onnxruntime").get_available_providers())


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


def _answer(against: Iterator[Reason | str]) -> str:
    """The first thing in the way; what would come after it is not looked at."""
    first = next(against, None)
    return "yes" if first is None else f"no: {first}"


def _against_building(backend: str, driver: Driver) -> Iterator[Reason | str]:
    lacking = [package for package in EXPORT_PACKAGES if _version(package) is None]
    if lacking:
        yield f"{', '.join(lacking)} not installed; pip install 'nitro-rt[export]'"
    if backend == "tensorrt" and driver.reason:
        elsewhere = "build on the machine with the GPU, or with --backend tensorrt-rtx --target sm89, which needs none"
        yield f"TensorRT compiles for the GPU that it finds, and here is {driver.reason}; {elsewhere}"
    if backend in RUNTIMES:
        yield from _missing_modules(backend, RUNTIMES[backend], "polygraphy")
    else:
        # What ONNX Runtime runs is the graph itself, so any wheel of it builds for all of its providers.
        yield from _missing_modules("cpu", backend)


def _against_running(backend: str, provider: str | None, driver: Driver, providers: tuple[str, ...]) -> Iterator[Reason | str]:
    if backend in RUNTIMES or provider in ("cuda", "tensorrt"):
        yield from _against_gpu(backend, driver)
    if backend in RUNTIMES:
        lacking = missing_library(backend)
        if lacking is not None:
            yield lacking
        return
    yield from _missing_modules("cuda" if provider in ("cuda", "tensorrt") else "cpu", backend)
    if provider is not None:
        missing = missing_provider(PROVIDERS[provider], providers)
        if missing is not None:
            yield missing
        if provider != "cpu":
            yield from _against_starting(PROVIDERS[provider])


def _against_gpu(backend: str, driver: Driver) -> Iterator[Reason]:
    if driver.reason:
        yield reasons.no_gpu(driver)
    if backend == "tensorrt-rtx" and not {gpu.target for gpu in driver.gpus} & set(RTX_TARGETS):
        yield reasons.no_rtx_gpu(driver.gpus)
    needed = f"{CUDA_MAJOR}.0"
    if is_older(driver.cuda_version, needed):
        yield reasons.old_driver(driver, needed)


def _against_starting(provider: str) -> Iterator[str]:
    """Whether a provider starts is known when it does: its libraries, CUDA's and cuDNN's, come from elsewhere."""
    onnxruntime = importlib.import_module("onnxruntime")
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 4
    try:
        start_session(onnxruntime, IDENTITY, settings, provider_list(provider, "float32", Placement()))
    except BackendUnavailable as exc:
        yield str(exc)
    except Exception as exc:  # a class of its own for each status code
        yield not_started(provider, " ".join(str(exc).split()))


def _missing_modules(extra: str, *modules: str) -> Iterator[str]:
    for module in modules:
        why = import_error(module)
        if why is not None:
            yield f"{module} cannot be imported ({why}); {reasons.install(extra)}"

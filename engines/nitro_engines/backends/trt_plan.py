"""TensorRT: an engine is one plan for the GPU that is here, compiled on it in a process of its own, with its timing cache.

TensorRT chooses kernels by timing them, so two builds of the same differ where two kernels are about as fast. The timing cache
is what was measured: it is kept with the engine, and a build that begins with it chooses the same again.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import tensorrt  # noqa: F401  where it is missing, `load_backend` says so

from nitro_engines.backends.base import SEED_TIMING, version
from nitro_engines.backends.trt_compiler import REFIT_OPTION, Compiler
from nitro_engines.progress import Progress
from nitro_rt.device import Driver, Gpu, find_driver
from nitro_rt.errors import BackendUnavailable, ConfigError
from nitro_rt.manifest import Graph

if find_spec("polygraphy") is None:  # it is loaded in the compiler's process only
    raise ImportError("No module named 'polygraphy'", name="polygraphy")

OLDEST = (11,)
"""The major release whose names we use."""
BF16_SINCE = (8, 0)


class TensorRtBackend:
    """Compiles strongly typed networks for the first GPU of this machine: the graph's types are the plan's."""

    name = "tensorrt"

    def __init__(self, driver: Driver | None = None, *, refit: bool = False) -> None:
        """
        Args: refit: plans that take new weights.
        Raises: BackendUnavailable if TensorRT is older than 11, or there is no driver or no GPU.
        """
        found = version("tensorrt-cu13", "tensorrt_cu13", "tensorrt")
        if tuple(int(part) for part in found.split(".")[:1]) < OLDEST:
            raise BackendUnavailable(
                f"--backend tensorrt needs TensorRT 11 or newer, found {found}; pip install --upgrade 'nitro-rt[tensorrt]'"
            )
        driver = driver or find_driver()
        if not driver.gpus:
            raise BackendUnavailable(
                f"--backend tensorrt compiles on the GPU that its engines are for: {driver.reason}. Build on that machine, or "
                "here with --backend tensorrt-rtx --target sm89 (RTX cards, which need not be here), openvino or onnxruntime"
            )
        self._version, self._driver, self._gpu, self._refit = found, driver, driver.gpus[0], refit

    def toolchain(self) -> dict[str, str]:
        return {"tensorrt": self._version, "polygraphy": version("polygraphy")}

    def target(self) -> dict[str, str]:
        """Kernels are chosen by their times on this GPU with this driver, so all of it decides."""
        major, minor = capability(self._gpu)
        return {
            "device": "cuda",
            "gpu": self._gpu.name,
            "targets": self._gpu.target,
            "compute_capabilities": f"{major}.{minor}",
            "driver": self._driver.version or "unknown",
            "driver_cuda": self._driver.cuda_version,
        }

    def options(self, graph_dtype: str) -> dict[str, str]:
        return {REFIT_OPTION: "yes"} if self._refit else {}

    def compute_dtype(self, graph_dtype: str) -> str:
        if graph_dtype == "bfloat16" and capability(self._gpu) < BF16_SINCE:
            raise ConfigError(f"{self._gpu} has no bfloat16, which came with sm80; say --precision fp16")
        return graph_dtype

    def compile(self, onnx_path: Path, graph: Graph, work: Path, progress: Progress | None = None) -> list[Path]:
        here = {self._gpu.target: capability(self._gpu)}
        compiler = Compiler(name="TensorRT", is_rtx=False, capabilities=here, refit=self._refit)
        timing = work / SEED_TIMING
        return compiler.compile(onnx_path, graph, work, progress, timing if timing.is_file() else None)


def capability(gpu: Gpu) -> tuple[int, int]:
    """(8, 9) of sm89, (12, 0) of sm120: the last digit is the minor."""
    number = gpu.target.removeprefix("sm")
    return int(number[:-1]), int(number[-1])

"""TensorRT-RTX: an engine is one plan for the named GPUs, compiled here without a GPU or driver, each in its own process."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import tensorrt_rtx  # noqa: F401  where it is missing, `load_backend` says so

from nitro_engines.backends.base import version
from nitro_engines.backends.trt_compiler import REFIT_OPTION, Compiler
from nitro_engines.progress import Progress
from nitro_rt.device import Driver, find_driver
from nitro_rt.errors import BackendUnavailable, ConfigError
from nitro_rt.manifest import Graph

if find_spec("polygraphy") is None:  # it is loaded in the compiler's process only
    raise ImportError("No module named 'polygraphy'", name="polygraphy")


class TensorRtRtxBackend:
    """Compiles strongly typed networks: the graph's types are the plan's."""

    name = "tensorrt-rtx"

    def __init__(self, capabilities: dict[str, tuple[int, int]], *, refit: bool = False, driver: Driver | None = None) -> None:
        """
        Args:
            capabilities: compute capability by target name; one plan serves them all.
            refit: plans that take new weights.
        Raises: BackendUnavailable for `refit` without a GPU, which that compilation asks for.
        """
        self._capabilities, self._refit = capabilities, refit
        if refit and not (driver := driver or find_driver()).gpus:
            raise BackendUnavailable(
                "--refit: TensorRT-RTX compiles plans that take new weights only where CUDA is, and here is "
                f"{driver.reason}; build on a machine with a GPU, or fuse the LoRA with --lora"
            )

    def toolchain(self) -> dict[str, str]:
        return {
            "tensorrt-rtx": version("tensorrt-rtx-cu13", "tensorrt_rtx_cu13", "tensorrt-rtx"),
            "polygraphy": version("polygraphy"),
        }

    def target(self) -> dict[str, str]:
        return {
            "device": "cuda",
            "targets": " ".join(self._capabilities),
            "compute_capabilities": " ".join(f"{major}.{minor}" for major, minor in self._capabilities.values()),
        }

    def options(self, graph_dtype: str) -> dict[str, str]:
        return {REFIT_OPTION: "yes"} if self._refit else {}

    def compute_dtype(self, graph_dtype: str) -> str:
        if graph_dtype == "float32" and "sm75" in self._capabilities:
            raise ConfigError(
                "TensorRT-RTX cannot multiply float32 matrices on sm75 (Turing); say --precision fp16 "
                "(and use a VAE made for float16), or leave sm75 out"
            )
        if graph_dtype == "bfloat16" and "sm75" in self._capabilities:
            raise ConfigError("sm75 (Turing) has no bfloat16; say --precision fp16, or leave sm75 out")
        return graph_dtype

    def compile(self, onnx_path: Path, graph: Graph, work: Path, progress: Progress | None = None) -> list[Path]:
        compiler = Compiler(name="TensorRT-RTX", is_rtx=True, capabilities=self._capabilities, refit=self._refit)
        return compiler.compile(onnx_path, graph, work, progress, None)

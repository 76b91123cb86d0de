"""Ours: a bundle drawn by `nitro_rt.Pipeline`, in a process of its own like every other side.

Options: `cuda_graphs`, as of `nitro_rt.executor.DeviceOptions`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib import metadata
from typing import Any


class Adapter:
    thread_safe = True

    def import_libraries(self) -> dict[str, str]:
        from nitro_rt import Pipeline  # noqa: F401  what is timed

        names = ("nitro-rt", "numpy", "openvino", "onnxruntime", "tensorrt-cu13", "tensorrt-rtx-cu13", "cuda-core")
        return {name: version for name in names if (version := _version(name)) is not None}

    def load(self, request: dict[str, Any]) -> dict[str, Any]:
        from nitro_bench.telemetry import read_state
        from nitro_rt import ComputeTypeDiffers, Pipeline
        from nitro_rt.bundle import open_bundle
        from nitro_rt.executor import DeviceOptions, Executor, open_executor
        from nitro_rt.references import with_steps

        opened: list[Executor] = []

        def open_here() -> Executor:
            """Keeps the executor at hand, which can tell what a pipeline does not."""
            opened.append(open_executor(only, DeviceOptions(**request["options"])))  # as Pipeline.load: its caches are kept
            return opened[0]

        gpu = read_state().gpu
        self._gpu_bytes_before = None if gpu is None else gpu.used_memory_bytes
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ComputeTypeDiffers)  # it stands in the notes of the result
            bundle = open_bundle(request["model"])
            bundle.check_files()
            # What is timed and what memory it takes is that of these step counts at this size.
            (num_steps,) = request["steps"]
            only = with_steps(bundle.at_size(request["size_px"]), num_steps)
            self._pipe = Pipeline.of(only, open_executor=open_here)
        self._timings_ms: dict[str, float] = {}
        dtypes = self._pipe.compute_dtypes
        facts = {"compute_dtype": dtypes[f"denoise/{num_steps}"], "compute_dtypes": dtypes, "notes": list(opened[0].notes)}
        # Graph capture is a part of loading only where there is a GPU.
        return facts | {"capture_ms": getattr(opened[0], "warm_up_ms", None)}

    def prepare(self, drawing: dict[str, Any]) -> Callable[[], Any]:
        def draw() -> Any:
            result = self._pipe(drawing["prompts"], seed=drawing["seed"], steps=drawing["steps"], size=drawing["size_px"])
            self._timings_ms = result.timings_ms
            return result.images

        return draw

    def timings_ms(self) -> dict[str, float]:
        return self._timings_ms

    def device_peak_bytes(self) -> int | None:
        """How much more of the GPU's memory is in use than before loading: our engines take all that they need at load."""
        from nitro_bench.telemetry import read_state

        gpu = read_state().gpu
        if gpu is None or gpu.used_memory_bytes is None or self._gpu_bytes_before is None:
            return None
        return max(0, gpu.used_memory_bytes - self._gpu_bytes_before)

    def close(self) -> None:
        self._pipe.close()


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None

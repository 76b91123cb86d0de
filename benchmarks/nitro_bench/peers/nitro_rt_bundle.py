"""Ours: a bundle drawn by `nitro_rt.Pipeline`, in a process of its own like every other side."""

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
        from nitro_rt import ComputeTypeDiffers, Pipeline
        from nitro_rt.bundle import open_bundle
        from nitro_rt.references import with_steps

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ComputeTypeDiffers)  # it stands in the notes of the result
            bundle = open_bundle(request["model"])
            bundle.check_files()
            # What is timed and what memory it takes is that of these step counts at this size.
            bundle = bundle.at_size(request["size_px"])
            (num_steps,) = request["steps"]
            self._pipe = Pipeline.of(with_steps(bundle, num_steps))
        self._timings_ms: dict[str, float] = {}
        dtypes = self._pipe.compute_dtypes
        return {"compute_dtype": dtypes[f"denoise/{num_steps}"], "compute_dtypes": dtypes}

    def prepare(self, drawing: dict[str, Any]) -> Callable[[], Any]:
        def draw() -> Any:
            result = self._pipe(drawing["prompts"], seed=drawing["seed"], steps=drawing["steps"], size=drawing["size_px"])
            self._timings_ms = result.timings_ms
            return result.images

        return draw

    def timings_ms(self) -> dict[str, float]:
        return self._timings_ms

    def device_peak_bytes(self) -> int | None:
        return None

    def close(self) -> None:
        self._pipe.close()


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None

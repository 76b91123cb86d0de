"""diffusers' StableDiffusionXLPipeline, eager, in float32: what its documentation tells a user to write. The template."""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata
from typing import Any


class Adapter:
    thread_safe = False

    def import_libraries(self) -> dict[str, str]:
        import torch  # noqa: F401  what is timed
        from diffusers import StableDiffusionXLPipeline  # noqa: F401

        return {name: metadata.version(name) for name in ("diffusers", "torch", "transformers")}

    def load(self, request: dict[str, Any]) -> dict[str, Any]:
        import torch
        from diffusers import StableDiffusionXLPipeline

        from nitro_bench._draw import shifted_scheduler

        dtype = request["options"].get("dtype", "float32")
        pipe: Any = StableDiffusionXLPipeline.from_pretrained(
            request["model"], dtype=getattr(torch, dtype), add_watermarker=False
        )
        pipe.scheduler = shifted_scheduler(pipe.scheduler.config, request["shift"])
        pipe.set_progress_bar_config(disable=True)
        self._pipe = pipe
        return {"compute_dtype": dtype}

    def prepare(self, drawing: dict[str, Any]) -> Callable[[], Any]:
        import torch

        size = drawing["size_px"]

        def draw() -> Any:
            return self._pipe(
                drawing["prompts"],
                num_inference_steps=drawing["steps"],
                guidance_scale=0.0,
                generator=torch.Generator().manual_seed(drawing["seed"]),
                height=size,
                width=size,
            ).images

        return draw

    def timings_ms(self) -> dict[str, float]:
        return {}

    def device_peak_bytes(self) -> int | None:
        return None

    def close(self) -> None:
        del self._pipe

"""What the peers that call a StableDiffusionXLPipeline have in common: diffusers itself, optimum-onnx and optimum-intel."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from nitro_bench.peers.adapter import CannotRun
from nitro_bench.peers.shifted import shifted_lcm
from nitro_bench.peers.stages import Stages


class PipelineAdapter:
    """Draws with a pipeline: guidance 0 (a UNet batch is the image batch), the shifted schedule, the benchmark's noise.

    A subclass imports, loads, and hands its pipeline to `adopt`.
    """

    thread_safe = False  # a pipeline keeps its scheduler's state

    def __init__(self) -> None:
        self._pipe: Any = None
        self._noise_as: dict[str, Any] = {}
        self._stages: Stages | None = None

    def adopt(self, pipe: Any, request: Mapping[str, Any], dtype: Any, device: str = "cpu") -> None:
        """Set the pipeline up.

        Args:
            dtype: torch's type of the latents.
            device: torch's device of the latents. On any but the CPU a call returns before its work is done, so no stages are
                timed.
        """
        pipe.scheduler = shifted_lcm(pipe.scheduler.config, request["shift"])
        pipe.set_progress_bar_config(disable=True)
        self._pipe, self._batch = pipe, request["batch"]
        self._noise_as = {"device": device, "dtype": dtype}
        if device == "cpu":
            self._stages = Stages()
            pipe.encode_prompt = self._stages.timed("text", pipe.encode_prompt)
            pipe.unet.forward = self._stages.timed("denoise", pipe.unet.forward)
            pipe.vae.decode = self._stages.timed("decode", pipe.vae.decode)

    def prepare(self, drawing: dict[str, Any]) -> Callable[[], Any]:
        import numpy as np
        import torch

        prompts = list(drawing["prompts"])
        if len(prompts) != self._batch:
            raise CannotRun(f"was loaded for {self._batch} images per call, and got {len(prompts)} prompts")
        noise_NBCHW = torch.from_numpy(np.load(drawing["noise"])).to(**self._noise_as)
        if len(noise_NBCHW) != drawing["steps"]:
            raise ValueError(f"the noise is for {len(noise_NBCHW)} steps, the image for {drawing['steps']}")

        def draw() -> Any:
            if self._stages is not None:
                self._stages.clear()
            self._pipe.scheduler.noise = noise_NBCHW
            # Images come as PIL images in host memory, so a device has finished.
            return self._pipe(
                prompts,
                latents=noise_NBCHW[0],
                num_inference_steps=drawing["steps"],
                guidance_scale=0.0,
                height=drawing["size_px"],
                width=drawing["size_px"],
            ).images

        return draw

    def timings_ms(self) -> dict[str, float]:
        return {} if self._stages is None else dict(self._stages.ms)

    def device_peak_bytes(self) -> int | None:
        return None

    def close(self) -> None:
        self._pipe = None

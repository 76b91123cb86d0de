"""The oracle of every parity test: diffusers' own SDXL pipeline with NitroFusion's shifted LCM scheduler."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import LCMScheduler, StableDiffusionXLPipeline
from numpy.typing import NDArray
from torch import Tensor

ORIGINAL_INFERENCE_STEPS = 4


class ShiftedLCMScheduler(LCMScheduler):
    """LCMScheduler whose network is told t' = floor(t * shift / 1000).

    x0 is computed at t' too, but fresh noise is mixed in at the *original* next time. Make one with `shifted`, so that
    the checkpoint's own betas are kept (a subclass with its own constructor arguments loses them in from_config).
    Source: the scheduler of github.com/ChenDarYen/NitroFusion, rewritten.
    """

    shift: int
    original_timesteps: Tensor

    @classmethod
    def shifted(cls, config: dict[str, Any], shift: int) -> ShiftedLCMScheduler:
        # As a constructor argument: set on the config afterwards it is lost on reload, and 4 steps become 999, 759, ...
        scheduler = cls.from_config(config, original_inference_steps=ORIGINAL_INFERENCE_STEPS)
        assert scheduler.config["original_inference_steps"] == ORIGINAL_INFERENCE_STEPS
        scheduler.shift = shift
        return scheduler

    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        super().set_timesteps(*args, **kwargs)
        self.original_timesteps = self.timesteps
        self.timesteps = self.timesteps * self.shift // self.config.num_train_timesteps

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> Any:
        """`timestep` is t'; the parent reads the next time from `self.timesteps`, which must be the original ones.

        The parameters are spelt out: the pipeline hands its generator only to schedulers that name one.
        """
        if self.step_index is None:
            self._init_step_index(timestep)
        told = self.timesteps
        self.timesteps = self.original_timesteps
        try:
            return super().step(model_output, timestep, sample, generator=generator, return_dict=return_dict)
        finally:
            self.timesteps = told


def oracle_pipeline(checkpoint: Path, shift: int) -> StableDiffusionXLPipeline:
    """The checkpoint in float32, with the shifted scheduler."""
    pipe = StableDiffusionXLPipeline.from_pretrained(checkpoint, dtype=torch.float32, add_watermarker=False)
    pipe.scheduler = ShiftedLCMScheduler.shifted(dict(pipe.scheduler.config), shift)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def oracle_images(
    checkpoint: Path, prompts: Sequence[str], *, seed: int, steps: int, shift: int, size_px: int | None = None
) -> NDArray[np.uint8]:
    """What diffusers draws: uint8 [B, H, W, 3]; one generator draws for the whole batch.

    Args:
        size_px: the side of the image; None means the checkpoint's own.
    """
    newest = max(path.stat().st_mtime_ns for path in checkpoint.rglob("*") if path.is_file())
    pipe = _cached_pipeline(os.fspath(checkpoint.resolve()), newest, shift)
    images = pipe(
        list(prompts),
        num_inference_steps=steps,
        guidance_scale=0.0,
        generator=torch.Generator().manual_seed(seed),
        height=size_px,
        width=size_px,
    ).images
    return np.stack([np.asarray(image) for image in images])


@lru_cache(maxsize=4)
def _cached_pipeline(checkpoint: str, newest: int, shift: int) -> StableDiffusionXLPipeline:
    """Loading costs more than drawing; `newest` makes a rewritten checkpoint load again."""
    return oracle_pipeline(Path(checkpoint), shift)

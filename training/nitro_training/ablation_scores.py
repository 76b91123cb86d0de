"""The yardstick of the ablation: how near a one-step student's images are to its teacher's, and to what was asked for.

Prompts, judge and definitions are those of `evaluation`. The teacher's images come from the recipe's own sampler, steps and
guidance, because its draws are what the students learn from, and from other noise than the students': a student that has
regressed the teacher would else be nearer to these very images than the teacher's own next ones.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file
from torch import nn

from nitro_rt.errors import ConfigError
from nitro_training import checkpoint, frechet
from nitro_training.evaluation import BATCH, Images, Prompt, Scores, choose_prompts, draw, score
from nitro_training.metric import Metric
from nitro_training.randomness import generator
from nitro_training.samplers import sample
from nitro_training.sheet import Checkpoint, pixels
from nitro_training.sources import Teacher, TeacherSourceConfig

NUM_IMAGES = 512
PROMPTS_SEED = 0
STUDENT_NOISE, TEACHER_NOISE = 0, 1

Features = NDArray[np.float32]


class Yardstick:
    """Scores one-step students against the same images of the teacher."""

    def __init__(
        self, judge: Metric, teacher: Teacher, source: TeacherSourceConfig, shift: int, num_images: int, cache: Path, key: str,
        report: Callable[[str], None],
    ) -> None:  # fmt: skip
        """Draw the teacher's images, or read their features from `cache`, if it has this `key`."""
        self.judge, self.source, self.report = judge, source, report
        self.model = Checkpoint(_on_host(teacher.text), _on_host(teacher.unet), _on_host(teacher.vae), shift)
        self.prompts = choose_prompts(judge, num_images, PROMPTS_SEED)
        if checkpoint.read_metadata(cache).get("key") == key:
            stored = load_file(cache)
            self.features_MD, self.patches_MPD = stored["features"], stored["patches"]
            return
        found = self._judged(self._draw_teacher(TEACHER_NOISE))
        self.features_MD, self.patches_MPD = found.features_MD, found.patches_MPD
        tensors = {"features": torch.from_numpy(self.features_MD), "patches": torch.from_numpy(self.patches_MPD)}
        checkpoint.write_tensors(cache, tensors, {"key": key})

    def scores(self, student: nn.Module) -> dict[str, float]:
        """Of a student's one-step images."""
        model = Checkpoint(self.model.text, _on_host(student), self.model.vae, self.model.shifted_timestep)
        images = draw(model, self.prompts, 1, STUDENT_NOISE, lambda done, total: None)
        return self._point_scores(self._judged(images))

    def teacher_scores(self) -> dict[str, float]:
        """Of the teacher itself, with the students' noise: its distances to its own other images are what there is to reach."""
        return self._point_scores(self._judged(self._draw_teacher(STUDENT_NOISE)))

    def _judged(self, images: Images) -> Scores:
        return score(images, self.prompts, self.judge)

    def _point_scores(self, scores: Scores) -> dict[str, float]:
        return {
            "frechet_to_teacher": distance(scores.features_MD[:, None], self.features_MD[:, None]),
            "patch_frechet_to_teacher": distance(scores.patches_MPD, self.patches_MPD),
            "retrieval_top1": float((scores.ranks_N < 1).mean()),
            "retrieval_top5": float((scores.ranks_N < 5).mean()),
            "colour": float(scores.is_right_colour_N.mean()),
        }

    def _draw_teacher(self, seed: int) -> Images:
        """Images uint8 [N, H, W, 3] of all prompts."""
        images = []
        for first in range(0, len(self.prompts), BATCH):
            images.append(self._draw_batch(self.prompts[first : first + BATCH], seed, first))
            self.report(f"teacher's images: {first + len(images[-1])} of {len(self.prompts)}")
        return np.concatenate(images)

    @torch.no_grad()
    def _draw_batch(self, prompts: Sequence[Prompt], seed: int, first: int) -> Images:
        text, unet, source = self.model.text, self.model.unet, self.source
        embeds, pooled = text.encode(text.tokenize([prompt.text for prompt in prompts]))
        side = unet.config.sample_size
        generators = [generator("ablation", seed, first + index) for index in range(len(prompts))]
        noise = torch.stack([torch.randn(4, side, side, generator=one) for one in generators])
        latents = sample(
            unet, embeds, pooled, noise, sampler=source.sampler, num_steps=source.num_steps, guidance=source.guidance,
            generators=generators,
        )  # fmt: skip
        drawn: Images = pixels(self.model.vae, latents).numpy()
        return drawn


def require_size(judge: Metric, size_px: int) -> None:
    """Raises: ConfigError if the judge is one of pictures of another size."""
    if judge.config.size_px != size_px:
        raise ConfigError(
            f"the recipe draws {size_px}x{size_px} pixels, the metric judges {judge.config.size_px}x{judge.config.size_px}: "
            "its scores hold for the emoji domain only; name a metric of that size with --metric"
        )


def distance(features_NPD: Features, others_NPD: Features) -> float:
    """The squared Frechet distance of two clouds of features."""
    return float(frechet.distance(frechet.moments(features_NPD), frechet.moments(others_NPD)))


def _on_host(part: Any) -> Any:
    """A copy in the CPU's memory, float32; images are judged there whatever device trains."""
    copied = copy.deepcopy(part)
    for module in copied.modules().values() if not isinstance(copied, nn.Module) else (copied,):
        nn.Module.to(module, "cpu", torch.float32)
    return copied

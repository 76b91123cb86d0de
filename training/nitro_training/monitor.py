"""What a run shows while it trains: TensorBoard scalars, the pool's history, sheets of samples.

It only looks: the run's random numbers, weights and gradients are the same with it and without it. It runs on the main
process and calls nothing that waits for other processes.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from nitro_training.engine import Engine
from nitro_training.generator import Place, predict_x0, simulate
from nitro_training.loop import Losses
from nitro_training.pool import HeadPool
from nitro_training.randomness import BatchRandom
from nitro_training.recipe import StudentRecipe
from nitro_training.samples import encode
from nitro_training.sheet import pixels, sheet
from nitro_training.sources import Teacher
from nitro_training.student import StudentStage

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

SHEET_STEPS = (1, 2, 4)


class Scalars:
    """A stage's TensorBoard log. After a kill it goes on without gaps, doubled points or points of steps that were lost."""

    def __init__(self, folder: Path) -> None:
        """Raises: ModuleNotFoundError if tensorboard is not installed."""
        from torch.utils.tensorboard import SummaryWriter

        self._open = SummaryWriter
        self.folder = folder
        self._writer: SummaryWriter | None = None

    def writer(self, done: int) -> SummaryWriter:
        """Opened at the first step of this process: TensorBoard then drops what an earlier one wrote from there on."""
        if self._writer is None:
            self._writer = self._open(str(self.folder), purge_step=done)
        return self._writer

    def add(self, done: int, values: Losses) -> None:
        writer = self.writer(done)
        for key, value in values.items():
            writer.add_scalar(key, value, done)

    def flush(self) -> None:
        if self._writer:
            self._writer.flush()

    def close(self) -> None:
        if self._writer:
            self._writer.close()
            self._writer = None


class Monitor:
    """Writes into the run's folder, on the main process only: `tensorboard/<stage>`, and `samples/<step>.png`.

    Under FSDP there are no sheets: the main process would have to hold the whole student beside its own share.
    """

    def __init__(self, recipe: StudentRecipe, folder: Path, teacher: Teacher, pool: HeadPool, engine: Engine) -> None:
        """Raises: ModuleNotFoundError if tensorboard is not installed."""
        self.recipe, self.folder, self.teacher, self.pool, self.engine = recipe, folder, teacher, pool, engine
        names = ("regression", "student") if engine.is_main else ()
        self.scalars = {name: Scalars(folder / "tensorboard" / name) for name in names}
        self.stage: StudentStage | None = None
        self.draws_sheets = bool(recipe.loop.sample_every) and engine.strategy != "fsdp"
        if engine.is_main and recipe.loop.sample_every and not self.draws_sheets:
            warnings.warn(
                "loop.sample_every: no sample sheets under FSDP, where no process holds the whole student; draw them from the "
                "checkpoint, or train with DDP",
                stacklevel=2,
            )

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        """Close the logs."""
        for scalars in self.scalars.values():
            scalars.close()

    def watch(self, stage: StudentStage) -> None:
        """The stage whose student the sample sheets show."""
        self.stage = stage

    def on_step(self, name: str, done: int, losses: Losses) -> None:
        """Called after every optimiser step of a stage, before any checkpoint of that step is written."""
        if not self.engine.is_main:
            return
        scalars, loop = self.scalars[name], self.recipe.loop
        scalars.add(done, losses)
        if name == "student":
            if done % loop.log_every == 0:
                self._add_pool(scalars.writer(done), done)
            if self.draws_sheets and done % loop.sample_every == 0:
                self._add_sheet(scalars.writer(done), done)
        scalars.flush()  # a checkpoint may follow, and what is before it will not be trained again

    def _add_pool(self, writer: SummaryWriter, done: int) -> None:
        statistics = pool_statistics(self.pool, done)
        for key, values in statistics.items():
            if len(values):
                writer.add_scalar(f"pool/{key}_mean", values.mean(), done)
                writer.add_histogram(f"pool/{key}", values, done)
        writer.add_scalar("pool/age_max", statistics["age"].max(), done)
        writer.add_scalar("pool/never_trained_share", (statistics["updates"] == 0).mean(), done)

    def _add_sheet(self, writer: SummaryWriter, done: int) -> None:
        assert self.stage is not None, "watch() comes before the first step"
        page = self.draw_sheet(self.stage.published())
        _save(page, self.folder / "samples" / f"{done:06d}.png")
        writer.add_image("samples", np.asarray(page), done, dataformats="HWC")

    @torch.no_grad()
    def draw_sheet(self, unet: nn.Module) -> Image.Image:
        """`loop.sample_prompts` at 1, 2 and 4 steps from the same noise at every call."""
        columns = {f"{num} step{'s' if num > 1 else ''}": self._draw(unet, num) for num in SHEET_STEPS}
        return sheet(list(self.recipe.loop.sample_prompts), columns)

    def _draw(self, unet: nn.Module, num_steps: int) -> Tensor:
        """Images uint8 [B, H, W, 3] on the host."""
        images = [image for batch in self._batches() for image in self._draw_batch(unet, num_steps, *batch)]
        return torch.cat(images)

    def _batches(self) -> Iterator[tuple[int, tuple[str, ...]]]:
        """The prompts in batches that training has room for, each with the number of its first prompt."""
        prompts, size = self.recipe.loop.sample_prompts, self.recipe.student.batch
        return ((first, prompts[first : first + size]) for first in range(0, len(prompts), size))

    def _draw_batch(self, unet: nn.Module, num_steps: int, first: int, prompts: tuple[str, ...]) -> Iterator[Tensor]:
        device, shift = self.engine.device, self.recipe.student.shifted_timestep
        condition = encode(self.teacher.text, prompts, device)
        embeds, pooled = condition.embeds_BTC, condition.pooled_BP
        random = BatchRandom("sample sheet", first=first, num=len(prompts))
        side = self.teacher.latents_side(self.recipe.teacher.size_px)
        noise = random.randn(4, side, side).to(device)
        place = Place(num_steps, num_steps - 1)
        times = torch.full((len(prompts),), place.time, device=device)
        assert self.stage is not None
        with torch.autocast(device.type, torch.bfloat16, enabled=self.recipe.student.precision == "bf16"):
            x = simulate(unet, noise, place, shift, embeds, pooled, self.stage.abar, random)
            latents = predict_x0(unet, x, times, shift, embeds, pooled, self.stage.abar)
        # one at a time: at 1024x1024 the decoder needs more memory than anything else here
        return (pixels(self.teacher.vae, one).cpu() for one in latents.split(1))


def pool_statistics(pool: HeadPool, done: int) -> dict[str, np.ndarray]:
    """How old the heads are (optimiser steps since birth), how often each has learnt since, and how often those that have
    learnt put a real sample above the fake beside it."""
    updates = pool.updates.cpu().numpy()
    return {
        "age": done - pool.births.cpu().numpy(),
        "updates": updates,
        "win_rate": pool.win_rate.cpu().numpy()[updates > 0],
    }


def _save(page: Image.Image, path: Path) -> None:
    """Write a PNG by one rename."""
    temporary = path.with_suffix(".partial")
    path.parent.mkdir(exist_ok=True)
    page.save(temporary, format="PNG")
    os.replace(temporary, path)

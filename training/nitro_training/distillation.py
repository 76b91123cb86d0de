"""A student from a teacher: teacher's samples, one-step weights, adversarial distillation, checkpoint."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from nitro_training import checkpoint, loop
from nitro_training.adversary import Adversary, Condition, require_crop
from nitro_training.backbone import UNetFeatures
from nitro_training.engine import Engine
from nitro_training.facts import Report, facts, write_json
from nitro_training.losses import GAMES
from nitro_training.model import LATENT_PX, save_checkpoint
from nitro_training.monitor import Monitor
from nitro_training.pool import HeadPool
from nitro_training.prompts import Prompts
from nitro_training.recipe import StudentRecipe
from nitro_training.regression import RegressionStage
from nitro_training.samples import CachedSamples, LiveSamples, TeacherSamples, build_cache
from nitro_training.sources import Teacher, load_backbone_unet, load_teacher, load_text_encoders, load_unet
from nitro_training.student import StudentStage
from nitro_training.teacher import alphas_cumprod


def stage_lengths(recipe: StudentRecipe) -> dict[str, int]:
    """The stages in order, with their steps (samples, for the teacher's cache)."""
    lengths = {
        "samples": recipe.teacher.cache_samples,
        "regression": recipe.regression.num_steps,
        "student": recipe.student.num_steps,
    }
    return {name: length for name, length in lengths.items() if length}


class Distillation:
    """One run in its folder; each method is a stage that needs the one before."""

    def __init__(self, recipe: StudentRecipe, engine: Engine) -> None:
        """Raises: ConfigError or ModelNotFound if prompts are missing."""
        self.recipe, self.engine = recipe, engine
        self.prompts = Prompts.load(recipe.prompts)

    def run(self, folder: Path, max_steps: int | None, allow_changed: bool, report: Report) -> Path:
        """Raises: ConfigError, ModelNotFound or TrainingError where something is missing or does not fit."""
        self.folder, self.max_steps, self.allow_changed, self.report = folder, max_steps, allow_changed, report
        self.teacher = load_teacher(self.recipe.teacher, torch.device("cpu"), torch.float32)
        init = self._init()
        self._freeze_on_device()
        self.side = (self.recipe.teacher.size_px or self.teacher.unet.config.sample_size * LATENT_PX) // LATENT_PX
        backbone = UNetFeatures(
            load_backbone_unet(self.recipe.backbone, self.teacher), recompute=self.recipe.student.recompute
        ).to(self.engine.device)
        pool = head_pool(self.recipe, backbone, self.side, self.engine)
        if not (folder / "run.json").exists():  # a resumed run's stays until it is known that the run goes on
            self._write_facts()
        samples = self.samples()
        monitor = Monitor(self.recipe, folder, self.teacher, pool, self.engine)
        with monitor:
            student = self.student(self.regression(init, samples, monitor), backbone, pool, samples, monitor)
        self._write_facts()
        out = folder / "checkpoint"
        if self.engine.is_main:
            text = load_text_encoders(self.teacher.checkpoint)  # the ones on the device may have been rounded
            save_checkpoint(out, vae=self.teacher.vae, text=text, unet=student, run=self.facts())
        return out

    def _init(self) -> UNet2DConditionModel:
        """The weights that the student starts from, in float32 on the host."""
        if self.recipe.student.init == "teacher":
            return copy.deepcopy(self.teacher.unet)
        return load_unet(self.recipe.student.init, self.teacher.unet)

    def _freeze_on_device(self) -> None:
        """What is never trained goes to the device; on a GPU in bfloat16, if the student runs in it: half the memory."""
        is_half = self.engine.device.type == "cuda" and self.recipe.student.precision == "bf16"
        for module in (self.teacher.unet, *self.teacher.text.modules().values()):
            module.to(self.engine.device, torch.bfloat16 if is_half else torch.float32)
        self.teacher.vae.to(self.engine.device)

    def samples(self) -> TeacherSamples:
        config = self.recipe.teacher
        self.num_cached = config.cache_samples
        if not config.cache_samples:
            return LiveSamples(config, self.prompts, self.teacher, self.engine.device)
        if self.max_steps is not None:
            self.num_cached = min(config.cache_samples, config.batch * self.max_steps)
            config = dataclasses.replace(config, cache_samples=self.num_cached)
        folder = Path(config.cache) if config.cache else self.folder / "cache"
        build_cache(
            folder, config, self.prompts, self.teacher, rank=self.engine.rank, num_processes=self.engine.num_processes,
            report=lambda done, total: self.report("samples", done, total, {}),
        )  # fmt: skip
        self.engine.barrier()
        return CachedSamples(folder, config, self.prompts, self.teacher, self.engine.device)

    def regression(self, init: UNet2DConditionModel, samples: TeacherSamples, monitor: Monitor) -> UNet2DConditionModel:
        """One-step weights; `init` itself where the recipe asks for no regression."""
        if not self.recipe.regression.num_steps:
            return init
        stage = RegressionStage(self.recipe.regression, init, self.recipe.student.shifted_timestep, samples, self.engine)
        self._train(stage, ("regression",), upstream=self._cut(), monitor=monitor)
        return stage.published()

    def student(
        self, init: UNet2DConditionModel, backbone: UNetFeatures, pool: HeadPool, samples: TeacherSamples, monitor: Monitor
    ) -> UNet2DConditionModel:
        null = null_condition(self.recipe, self.teacher, self.engine.device)
        adversary = Adversary(backbone, pool, GAMES[self.recipe.student.loss], alphas_cumprod().to(self.engine.device), null)
        stage = StudentStage(self.recipe.student, init, adversary, samples, self.engine)
        monitor.watch(stage)
        upstream = f"regression {self._done('regression')}{self._cut()}"
        self._train(stage, ("regression", "backbone", "pool", "heads", "student"), upstream=upstream, monitor=monitor)
        return stage.published().eval()

    def _cut(self) -> str:
        """What tells the states of a run with a cache cut short by --max-steps from those of a whole one."""
        return "" if self.num_cached == self.recipe.teacher.cache_samples else f", {self.num_cached} cached samples"

    def _train(self, stage: loop.Stage, sections: tuple[str, ...], *, upstream: str, monitor: Monitor) -> None:
        has_begun = False

        def report(done: int, losses: loop.Losses) -> None:
            nonlocal has_begun
            if not has_begun:
                has_begun = True
                self._write_facts()
            self.report(stage.name, done, stage.num_steps, losses)
            monitor.on_step(stage.name, done, losses)

        loop.run(
            stage, self.folder, options=self._options(*sections), upstream=upstream, config=self.recipe.loop,
            max_steps=self.max_steps, allow_changed=self.allow_changed, engine=self.engine, report=report,
        )  # fmt: skip

    def _done(self, name: str) -> int:
        return checkpoint.steps_done(self.folder / f"{name}.safetensors")

    def _options(self, *sections: str) -> dict[str, Any]:
        """What decides a stage: the recipe's sections it depends on, the teacher and the prompts."""
        options: dict[str, Any] = {section: dataclasses.asdict(getattr(self.recipe, section)) for section in sections}
        return {
            **options,
            "shifted_timestep": self.recipe.student.shifted_timestep,
            "teacher": self.teacher.digests,
            "samples": _sampling_options(self.recipe),
            "prompts_sha256": self.prompts.sha256,
            "num_processes": self.engine.num_processes,
        }

    def facts(self) -> dict[str, Any]:
        return {
            **facts(self.recipe),
            "shifted_timestep": self.recipe.student.shifted_timestep,
            "teacher_sha256": self.teacher.digests,
            "prompts_sha256": self.prompts.sha256,
            "processes": self.engine.facts({"regression": self.recipe.regression.batch, "student": self.recipe.student.batch}),
            "steps_done": {name: self._done(name) for name in ("regression", "student") if name in stage_lengths(self.recipe)},
        }

    def _write_facts(self) -> None:
        if self.engine.is_main:
            write_json(self.folder / "run.json", self.facts())


def head_pool(recipe: StudentRecipe, backbone: UNetFeatures, side: int, engine: Engine) -> HeadPool:
    """The pool for latents of side `side`.

    Raises: ConfigError if crops are larger than the latents or cannot pass the encoder.
    """
    config = recipe.pool
    sides = {}
    for task in config.tasks:
        if task.startswith("local"):
            require_crop(config.crop_latents, side)
        sides[task] = backbone.sides(config.crop_latents if task.startswith("local") else side)
    return HeadPool(config, backbone.channels(), sides, optimizer=recipe.heads, device=engine.device)


@torch.no_grad()
def null_condition(recipe: StudentRecipe, teacher: Teacher, device: torch.device) -> Condition:
    """What the unconditional task gives the backbone, for one sample."""
    embeds, pooled = teacher.text.encode(teacher.text.tokenize([""]))
    if recipe.pool.null_condition == "zeros":
        embeds, pooled = torch.zeros_like(embeds), torch.zeros_like(pooled)
    return Condition(embeds.float().to(device), pooled.float().to(device))


def _sampling_options(recipe: StudentRecipe) -> dict[str, Any]:
    """The part of [teacher] that decides the samples; not where they lie nor how they are cut into files."""
    options = dataclasses.asdict(recipe.teacher)
    return {name: value for name, value in options.items() if name not in ("cache", "shard_size", "batch", "checkpoint")}

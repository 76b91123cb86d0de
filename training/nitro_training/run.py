"""A whole run: autoencoder, teacher, student, checkpoint. Every stage resumes where it was stopped."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import platform
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from filelock import FileLock, Timeout
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from nitro_rt.errors import ConfigError, TrainingError
from nitro_training import checkpoint, loop
from nitro_training.autoencoder import AutoencoderStage, build, encode_all
from nitro_training.backbone import UNetFeatures
from nitro_training.emoji import EmojiDataset
from nitro_training.latents import CaptionedLatents, captioned_latents, normalise
from nitro_training.model import TextEncoders, build_text_encoders, build_unet, save_checkpoint
from nitro_training.pool import HeadPool
from nitro_training.recipe import Recipe, read_recipe
from nitro_training.student import StudentStage, TeacherPairs
from nitro_training.teacher import TeacherStage, sample
from nitro_training.vocabulary import read_merges, write_tokenizer

Report = Callable[[str, int, int, loop.Losses], None]
"""Called with (stage, steps done, steps in all, losses)."""


def train(
    recipe: Path,
    *,
    out: Path | None = None,
    max_steps: int | None = None,
    resume: bool = False,
    dry_run: bool = False,
    report: Report = lambda stage, done, total, losses: None,
) -> Path:
    """Run a recipe.

    Args:
        out: the run's folder; `runs/<name>` by default. The finished checkpoint is its `checkpoint` folder.
        max_steps: stop every stage after this many steps (a trial of the whole way).
        resume: go on with what the folder holds; without it, a folder with a run in it is refused.
        dry_run: check the recipe and its data, report the stages and change nothing.
    Returns: the checkpoint folder.
    Raises: ConfigError for a wrong recipe or missing data, TrainingError where the run cannot start or go on.
    """
    resolved = read_recipe(recipe)
    if max_steps is not None and max_steps < 1:
        raise ConfigError(f"--max-steps must be at least 1, got {max_steps}")
    folder = out or Path("runs") / resolved.run.name
    dataset = EmojiDataset.load(Path(resolved.run.data))
    merges = read_merges(Path(resolved.run.vocabulary), resolved.run.num_merges)
    _require_same_data(resolved, dataset)
    _require_room_for_heads(resolved)
    if dry_run:
        for name, total in stage_lengths(resolved).items():
            most = 32 * (max_steps or total) if name == "pairs" else (max_steps or total)
            report(name, 0, min(total, most), {})
        return folder / "checkpoint"
    if (folder / "run.json").exists() and not resume:
        raise TrainingError(f"{folder} already holds a run; add --resume to go on with it, or choose another --out")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # The plain attention is the fastest here: the fused CPU kernel loses on maps of 8x8 and smaller (1.11 s
        # against 0.88 s for a step of 64 latents of 16x16 through a UNet of widths 32/64/160, two cores).
        with FileLock(folder / ".lock", timeout=0), sdpa_kernel(SDPBackend.MATH):
            return Run(resolved, dataset, merges, folder, max_steps, report).finish()
    except Timeout as exc:
        raise TrainingError(f"another process is training in {folder}; wait for it or choose another --out") from exc
    except OSError as exc:
        raise TrainingError(f"cannot write to {folder}: {exc}") from exc


def stage_lengths(recipe: Recipe) -> dict[str, int]:
    """The stages in order, with their steps."""
    student = recipe.student
    return {
        "autoencoder": recipe.autoencoder.num_steps,
        "teacher": recipe.teacher.num_steps,
        "pairs": student.num_pairs,
        "student": student.warmup_steps + student.adversarial_steps,
        "decoder": recipe.decoder.num_steps,
    }


class Run:
    """One run in its folder; each method is a stage that needs the one before."""

    def __init__(
        self, recipe: Recipe, dataset: EmojiDataset, merges: list[str], folder: Path, max_steps: int | None, report: Report
    ) -> None:
        self.recipe, self.dataset, self.folder, self.max_steps, self.report = recipe, dataset, folder, max_steps, report
        self.images_NHW3 = torch.from_numpy(dataset.images_NHW3)
        self.started = time.time()
        tokenizer = write_tokenizer(merges, folder / "tokenizer")
        torch.manual_seed(recipe.model.seed)
        self.text: TextEncoders = build_text_encoders(recipe.model, tokenizer)
        self.unet = build_unet(recipe.model, recipe.emoji.size_px)
        _write_json(folder / "run.json", self.facts())

    def finish(self) -> Path:
        vae, latents = self.autoencoder()
        data = captioned_latents(self.dataset, latents, self.text, recoloured_share=self.recipe.teacher.recoloured_share)
        teacher = self.teacher(data)
        student = self.student(teacher, self.pairs(teacher, data))
        vae = self.decoder(vae)
        out = self.folder / "checkpoint"
        save_checkpoint(out, vae=vae, text=self.text, unet=student, run=self.facts())
        save_checkpoint(self.folder / "teacher", vae=vae, text=self.text, unet=teacher, run=self.facts())
        return out

    def autoencoder(self) -> tuple[AutoencoderKL, Tensor]:
        """The trained VAE with normalised latents, and the latents of all images."""
        config = self.recipe.autoencoder
        torch.manual_seed(config.seed)
        vae = build(config, self.recipe.emoji.size_px)
        path = self.folder / "latents.safetensors"
        trained = self._train(AutoencoderStage(config, vae, self.images_NHW3), ("emoji", "autoencoder"))
        digest = checkpoint.digest_of([trained, self.digest("emoji", "autoencoder")])
        if checkpoint.read_metadata(path).get("digest") != digest:
            latents = encode_all(vae, self.images_NHW3)
            normalise(vae, latents)
            mean, deviation = latents.mean(dim=(0, 2, 3), keepdim=True), latents.std(dim=(0, 2, 3), keepdim=True)
            tensors = {f"vae/{key}": value.contiguous() for key, value in vae.state_dict().items()}
            tensors["latents"] = (latents - mean) / deviation
            checkpoint.write_tensors(path, tensors, {"digest": digest})
        stored = load_file(path)
        latents = stored.pop("latents")
        vae.load_state_dict({key.removeprefix("vae/"): value for key, value in stored.items()})
        return vae, latents

    def teacher(self, data: CaptionedLatents) -> UNet2DConditionModel:
        """The averaged teacher; the text encoders take their averaged weights too."""
        stage = TeacherStage(self.recipe.teacher, self.unet, self.text, data)
        self._train(stage, ("emoji", "autoencoder", "model", "teacher"))
        averaged = stage.ema
        for name, module in self.text.modules().items():
            module.load_state_dict(averaged[f"{name}_ema"].state_dict())
            module.requires_grad_(False).eval()
        teacher = averaged["unet_ema"].eval()
        assert isinstance(teacher, UNet2DConditionModel)
        return teacher

    @torch.no_grad()
    def pairs(self, teacher: UNet2DConditionModel, data: CaptionedLatents) -> TeacherPairs:
        """The teacher's results for seeded noise and captions, cached in shards of 256."""
        config = self.recipe.student
        digest = self.digest("emoji", "autoencoder", "model", "teacher") + str(self._done("teacher"))
        num = self._num_pairs()
        digest = checkpoint.digest_of([digest, num, config.teacher_steps, config.guidance, config.seed])
        shards = []
        for first in range(0, num, 256):
            path = self.folder / "pairs" / f"{first:06d}.safetensors"
            if checkpoint.read_metadata(path).get("digest") != digest:
                shard = self._pair_shard(teacher, data, first, min(256, num - first))
                checkpoint.write_tensors(path, shard, {"digest": digest})
            shards.append(load_file(path))
            self.report("pairs", min(first + 256, num), num, {})
        joined = {key: torch.cat([shard[key] for shard in shards]) for key in shards[0]}
        embeds, pooled = encode_captions(self.text, data.input_ids_MT)
        return TeacherPairs(joined["noise"], joined["x0"], embeds[joined["rows"]], pooled[joined["rows"]])

    def _pair_shard(self, teacher: UNet2DConditionModel, data: CaptionedLatents, first: int, count: int) -> dict[str, Tensor]:
        config = self.recipe.student
        generator = loop.step_generator(config.seed, first)
        latents, rows = data.draw(count, generator)
        noise = torch.randn(latents.shape, generator=generator)
        results = []
        for part in torch.arange(count).split(64):
            embeds, pooled = self.text.encode(data.input_ids_MT[rows[part]])
            results.append(
                sample(teacher, embeds, pooled, noise[part], num_steps=config.teacher_steps, guidance=config.guidance)
            )
        return {"noise": noise, "x0": torch.cat(results), "rows": rows}

    def student(self, teacher: UNet2DConditionModel, pairs: TeacherPairs) -> UNet2DConditionModel:
        features = UNetFeatures(teacher)
        pool = HeadPool(self.recipe.pool, features.channels())
        stage = StudentStage(self.recipe.student, teacher, features, pool, pairs)
        self._train(stage, ("emoji", "autoencoder", "model", "teacher", "pool", "student"))
        averaged = stage.ema["unet_ema"].eval()
        assert isinstance(averaged, UNet2DConditionModel)
        return averaged

    def decoder(self, vae: AutoencoderKL) -> AutoencoderKL:
        """More training for the decoder alone: the latents stay what they are."""
        stage = AutoencoderStage(self.recipe.decoder, vae, self.images_NHW3)
        self._train(stage, ("emoji", "autoencoder", "decoder"))
        return vae

    def _train(self, stage: loop.Stage, sections: tuple[str, ...]) -> int:
        def report(done: int, losses: loop.Losses) -> None:
            self.report(stage.name, done, stage.num_steps, losses)

        earlier = {"teacher": ("autoencoder",), "student": ("autoencoder", "teacher"), "decoder": ("autoencoder",)}
        upstream = ", ".join(f"{name} {self._done(name)}" for name in earlier.get(stage.name, ()))
        if stage.name == "student":
            upstream += f", pairs {self._num_pairs()}"
        return loop.run(
            stage, self.folder, digest=self.digest(*sections), upstream=upstream, max_steps=self.max_steps, report=report
        )

    def _num_pairs(self) -> int:
        wanted = self.recipe.student.num_pairs
        return wanted if self.max_steps is None else min(wanted, 32 * self.max_steps)

    def _done(self, name: str) -> int:
        return checkpoint.steps_done(self.folder / f"{name}.safetensors")

    def digest(self, *sections: str) -> str:
        """Of the recipe's sections that a stage depends on, and the data."""
        options = {section: dataclasses.asdict(getattr(self.recipe, section)) for section in sections}
        return checkpoint.digest_of([options, self.dataset.manifest["sha256"]])

    def facts(self) -> dict[str, Any]:
        """What `run.json` says: the resolved recipe, versions, data digests, machine."""
        return {
            "schema_version": 1,
            "name": self.recipe.run.name,
            "licence": self.recipe.run.licence,
            "shifted_timestep": self.recipe.student.shifted_timestep,
            "recipe": dataclasses.asdict(self.recipe),
            "data_sha256": self.dataset.manifest["sha256"],
            "versions": {name: metadata.version(name) for name in ("torch", "diffusers", "transformers", "numpy")},
            "python": platform.python_version(),
            "num_threads": torch.get_num_threads(),
            "steps_done": {name: self._done(name) for name in ("autoencoder", "teacher", "student", "decoder")},
            "date": datetime.date.today().isoformat(),
        }


@torch.no_grad()
def encode_captions(text: TextEncoders, input_ids_MT: Tensor, batch: int = 256) -> tuple[Tensor, Tensor]:
    """Embeddings [M, T, C] and pooled vectors [M, P] of many captions, float16 to spare memory."""
    parts = [text.encode(chunk) for chunk in input_ids_MT.split(batch)]
    return torch.cat([p[0].half() for p in parts]), torch.cat([p[1].half() for p in parts])


def _require_room_for_heads(recipe: Recipe) -> None:
    coarsest = recipe.emoji.size_px // 8 // 2 ** (len(recipe.model.channels) - 1)
    if coarsest < 2**recipe.pool.num_blocks:
        raise ConfigError(
            f"pool.num_blocks = {recipe.pool.num_blocks} halves a feature of {coarsest}x{coarsest} below one pixel; "
            "use fewer blocks or larger pictures"
        )


def _require_same_data(recipe: Recipe, dataset: EmojiDataset) -> None:
    asked = json.loads(json.dumps(dataclasses.asdict(recipe.emoji)))
    found = dataset.manifest["config"]
    if asked != found:
        raise ConfigError(f"the data set at {recipe.run.data} was made with other [emoji] options; run `make emoji-data` again")


def _write_json(path: Path, data: dict[str, Any]) -> None:
    temporary = path.with_suffix(".partial")
    temporary.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(temporary, path)

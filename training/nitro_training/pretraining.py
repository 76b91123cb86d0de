"""A small teacher from nothing: autoencoder, text encoders and UNet, checkpoint. Every stage resumes where it was stopped."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor

from nitro_rt.errors import ConfigError
from nitro_training import checkpoint, loop
from nitro_training.autoencoder import AutoencoderStage, build, encode_all
from nitro_training.emoji import EmojiDataset
from nitro_training.facts import Report, facts, write_json
from nitro_training.latents import CaptionedLatents, captioned_latents, normalise
from nitro_training.model import TextEncoders, build_text_encoders, build_unet, save_checkpoint
from nitro_training.recipe import TeacherRecipe
from nitro_training.sheet import Checkpoint
from nitro_training.teacher import TeacherStage
from nitro_training.vocabulary import read_merges, write_tokenizer

_UNSHIFTED = 1000
"""What `run.json` says for a model that is told the true time."""


def stage_lengths(recipe: TeacherRecipe) -> dict[str, int]:
    """The stages in order, with their steps."""
    return {
        "autoencoder": recipe.autoencoder.num_steps,
        "teacher": recipe.teacher.num_steps,
        "decoder": recipe.decoder.num_steps,
    }


class Pretraining:
    """One run in its folder; each method is a stage that needs the one before."""

    def __init__(self, recipe: TeacherRecipe) -> None:
        """Raises: ConfigError if the data are missing or were made with other options."""
        self.recipe = recipe
        self.dataset = EmojiDataset.load(Path(recipe.data.folder))
        self.merges = read_merges(Path(recipe.data.vocabulary), recipe.data.num_merges)
        _require_same_data(recipe, self.dataset)

    def run(self, folder: Path, max_steps: int | None, allow_changed: bool, report: Report) -> Path:
        self.folder, self.max_steps, self.allow_changed, self.report = folder, max_steps, allow_changed, report
        self.images_NHW3 = torch.from_numpy(self.dataset.images_NHW3)
        tokenizer = write_tokenizer(self.merges, folder / "tokenizer")
        torch.manual_seed(self.recipe.model.seed)
        self.text: TextEncoders = build_text_encoders(self.recipe.model, tokenizer)
        self.unet = build_unet(self.recipe.model, self.recipe.emoji.size_px)
        if not (folder / "run.json").exists():  # a resumed run's stays until it is known that the run goes on
            write_json(folder / "run.json", self.facts())
        vae, latents = self.autoencoder()
        data = captioned_latents(self.dataset, latents, self.text, recoloured_share=self.recipe.teacher.recoloured_share)
        teacher = self.teacher(data)
        vae = self.decoder(vae)
        write_json(folder / "run.json", self.facts())
        save_checkpoint(folder / "checkpoint", vae=vae, text=self.text, unet=teacher, run=self.facts())
        return folder / "checkpoint"

    def autoencoder(self) -> tuple[AutoencoderKL, Tensor]:
        """The trained VAE with normalised latents, and the latents of all images."""
        config = self.recipe.autoencoder
        torch.manual_seed(config.seed)
        vae = build(config, self.recipe.emoji.size_px)
        path = self.folder / "latents.safetensors"
        trained = self._train(AutoencoderStage(config, vae, self.images_NHW3), ("emoji", "autoencoder"))
        digest = checkpoint.digest_of([trained, self._options("emoji", "autoencoder")])
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
        if self.recipe.teacher.start:
            _go_on_from(Checkpoint.load(Path(self.recipe.teacher.start)), self.unet, self.text)
        stage = TeacherStage(self.recipe.teacher, self.unet, self.text, data)
        self._train(stage, ("emoji", "autoencoder", "model", "teacher"))
        averaged = stage.ema
        for name, module in self.text.modules().items():
            module.load_state_dict(averaged[f"{name}_ema"].state_dict())
            module.requires_grad_(False).eval()
        teacher = averaged["unet_ema"].eval()
        assert isinstance(teacher, UNet2DConditionModel)
        return teacher

    def decoder(self, vae: AutoencoderKL) -> AutoencoderKL:
        """More training for the decoder alone: the latents stay what they are."""
        self._train(AutoencoderStage(self.recipe.decoder, vae, self.images_NHW3), ("emoji", "autoencoder", "decoder"))
        return vae

    def _train(self, stage: loop.Stage, sections: tuple[str, ...]) -> int:
        has_begun = False

        def report(done: int, losses: loop.Losses) -> None:
            nonlocal has_begun
            if not has_begun:
                has_begun = True
                write_json(self.folder / "run.json", self.facts())
            self.report(stage.name, done, stage.num_steps, losses)

        upstream = "" if stage.name == "autoencoder" else f"autoencoder {self._done('autoencoder')}"
        return loop.run(
            stage, self.folder, options=self._options(*sections), upstream=upstream, config=self.recipe.loop,
            max_steps=self.max_steps, allow_changed=self.allow_changed, report=report,
        )  # fmt: skip

    def _done(self, name: str) -> int:
        return checkpoint.steps_done(self.folder / f"{name}.safetensors")

    def _options(self, *sections: str) -> dict[str, Any]:
        """What decides a stage: the recipe's sections it depends on, and the data."""
        options = {section: dataclasses.asdict(getattr(self.recipe, section)) for section in sections}
        return {**options, "data_sha256": self.dataset.manifest["sha256"]}

    def facts(self) -> dict[str, Any]:
        return {
            **facts(self.recipe),
            "shifted_timestep": _UNSHIFTED,
            "data_sha256": self.dataset.manifest["sha256"],
            "steps_done": {name: self._done(name) for name in stage_lengths(self.recipe)},
        }


def _go_on_from(start: Checkpoint, unet: UNet2DConditionModel, text: TextEncoders) -> None:
    try:
        unet.load_state_dict(start.unet.state_dict())
        for name, module in text.modules().items():
            module.load_state_dict(start.text.modules()[name].state_dict())
    except RuntimeError as exc:
        raise ConfigError(f"teacher.start does not fit [model]: {str(exc).splitlines()[-1].strip()}") from exc


def _require_same_data(recipe: TeacherRecipe, dataset: EmojiDataset) -> None:
    asked = json.loads(json.dumps(dataclasses.asdict(recipe.emoji)))
    if asked != dataset.manifest["config"]:
        raise ConfigError(
            f"the data set at {recipe.data.folder} was made with other [emoji] options; run `make emoji-data` again"
        )

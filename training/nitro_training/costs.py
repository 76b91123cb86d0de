"""What one micro-batch of a student recipe costs: parameters, FLOPs and activations, measured on meta tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from nitro_training.adversary import require_crop
from nitro_training.backbone import UNetFeatures
from nitro_training.engine import SHARDED_BLOCKS
from nitro_training.losses import GAMES
from nitro_training.meter import Meter
from nitro_training.model import LATENT_PX, predict_noise
from nitro_training.pool import HeadPool
from nitro_training.recipe import StudentRecipe
from nitro_training.sdxl_config import ModelConfigs
from nitro_training.student import StudentConfig

_META = torch.device("meta")


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """Numbers of parameters."""

    student: int
    backbone: int
    """An encoder and mid-block, with the time and size embeddings."""
    teacher: int
    text_encoders: int
    vae: int
    pool: int
    head_set: int
    """One head for every feature level, of the first task."""
    drawn_heads: int
    """The heads that judge one micro-batch, all tasks together."""
    open_blocks: int
    """What FSDP holds whole at a time: two of its blocks, and what lies in none."""
    num_heads: int
    num_drawn: int


@dataclass(frozen=True, kw_only=True)
class Flops:
    """FLOPs of one micro-batch on one device, averaged over the stages."""

    teacher: int
    """Its samples, where they are drawn on the fly."""
    text_encoders: int
    student_forward: int
    student_simulation: int
    """The student's own earlier steps, without gradient (backward simulation)."""
    student_backward: int
    backbone_forward: int
    """Real and fake, every task at its size."""
    backbone_backward: int
    heads: int
    recomputed: int
    """What gradient checkpointing computes a second time; 0 without it."""

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))


@dataclass(frozen=True, kw_only=True)
class Activations:
    """Bytes that one micro-batch keeps for its backward passes, on one device."""

    student: int
    adversary: int
    """Backbone and heads; the graphs of all tasks live side by side."""
    student_unit: int = 0
    """The largest part of the student that is computed again in the backward pass."""
    backbone_unit: int = 0
    weight_copies: int = 0
    """The student's weights in autocast's number type, which live as long as its forward pass. (Without recomputation the
    graph keeps them, and they are counted under `student`.)"""

    @property
    def peak(self) -> int:
        return self.student + max(self.adversary + self.backbone_unit, self.student_unit, self.weight_copies)


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Everything measured of a recipe."""

    parameters: Parameters
    flops: Flops
    """Of a micro-batch."""
    flops_per_step: int
    """Of one optimiser step on one device."""
    flops_of_cache: int
    """Of the teacher's samples, once, where they are cached."""
    kept: Activations
    """Without recomputation."""
    recomputed: Activations
    """With it."""
    side: int
    """Of the latents."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One network's share of a micro-batch."""

    forward: int
    backward: int
    heads: int = 0
    """FLOPs of the heads, forward and backward."""
    unit_flops: int
    """FLOPs that recomputation adds."""
    kept: int
    """Bytes without recomputation."""
    recomputed: int
    """Bytes with it, beside a unit."""
    unit: int
    """Bytes of the largest unit."""


def measure(recipe: StudentRecipe, configs: ModelConfigs) -> Costs:
    """Measure a recipe's networks.

    Raises: ConfigError if the recipe's crops or feature levels do not fit the model.
    """
    networks = Networks(recipe, configs)
    parameters = networks.parameters()
    student = networks.student()
    by_side = {networks.side_of(task): task for task in recipe.pool.tasks}
    measured = {side: networks.look(task) for side, task in by_side.items()}  # both local tasks cost the same
    looks = [measured[networks.side_of(task)] for task in recipe.pool.tasks]
    flops = flops_of(recipe, networks.text_flops(), student, looks)
    passes = recipe.teacher.cache_samples * _teacher_passes(recipe)
    return Costs(
        parameters=parameters,
        flops=flops,
        flops_per_step=flops_per_step(recipe, flops),
        flops_of_cache=passes * student.forward // recipe.student.batch,
        kept=Activations(student=student.kept, adversary=sum(look.kept for look in looks)),
        recomputed=Activations(
            student=student.recomputed,
            adversary=sum(look.recomputed for look in looks),
            student_unit=student.unit,
            backbone_unit=max(look.unit for look in looks),
            weight_copies=networks.lowered.itemsize * parameters.student if networks.lowered else 0,
        ),
        side=networks.side,
    )


class Networks:
    """A recipe's networks as meta tensors, and what they cost."""

    def __init__(self, recipe: StudentRecipe, configs: ModelConfigs) -> None:
        self.recipe = recipe
        self.lowered = torch.bfloat16 if recipe.student.precision == "bf16" else None
        with _META:
            self.unet = UNet2DConditionModel.from_config(dict(configs.parts["unet"]))
            self.side = (recipe.teacher.size_px or self.unet.config.sample_size * LATENT_PX) // LATENT_PX
            self.backbone = UNetFeatures(self.unet)
            sides = {task: self.backbone.sides(self.side_of(task)) for task in recipe.pool.tasks}
            self.pool = HeadPool(recipe.pool, self.backbone.channels(), sides, optimizer=recipe.heads, device=_META)
            self.text = (
                CLIPTextModel(CLIPTextConfig(**configs.parts["text_encoder"])),
                CLIPTextModelWithProjection(CLIPTextConfig(**configs.parts["text_encoder_2"])),
            )
            self.vae = AutoencoderKL.from_config(dict(configs.parts["vae"]))
        if self.lowered:
            self.backbone.to(self.lowered)

    def side_of(self, task: str) -> int:
        """The side of the latents that a task's heads judge. Raises: ConfigError if the crop is larger than the whole."""
        if not task.startswith("local"):
            return self.side
        require_crop(self.recipe.pool.crop_latents, self.side)
        return self.recipe.pool.crop_latents

    def parameters(self) -> Parameters:
        pool, drawn = self.pool, [index for cells in self._draw().values() for indices in cells for index in indices]
        first = (pool.head(level * pool.config.heads_per_cell) for level in range(len(pool.levels)))
        return Parameters(
            student=_count(self.unet),
            backbone=_count(self.backbone),
            teacher=_count(self.unet),
            text_encoders=sum(_count(encoder) for encoder in self.text),
            vae=_count(self.vae),
            pool=_count(pool),
            head_set=sum(_count(head) for head in first),
            drawn_heads=sum(_count(pool.head(index)) for index in drawn),
            open_blocks=_open_blocks(self.unet),
            num_heads=len(pool),
            num_drawn=len(drawn),
        )

    def student(self) -> Measured:
        """A step of the student with its graph, forward and backward."""
        meter, recomputing = (Meter(self.unet, lowered=self.lowered) for _ in range(2))
        self.unet.enable_gradient_checkpointing(meter.unit)
        with meter:
            noise = self._noise()
        backward = _backward(lambda: torch.autograd.backward(noise, torch.empty_like(noise)))
        self.unet.enable_gradient_checkpointing()
        with recomputing:
            self._noise()
        return Measured(
            forward=meter.flops, backward=backward, unit_flops=meter.unit_flops, kept=meter.kept_bytes,
            recomputed=recomputing.kept_bytes, unit=meter.largest_unit_bytes,
        )  # fmt: skip

    def look(self, task: str) -> Measured:
        """One task's look at real and fake latents, as `Adversary.judge` takes it; `forward` is of one of the two."""
        meter, recomputing = (Meter(self.backbone, self.pool, lowered=self.lowered) for _ in range(2))
        blocks = (*self.backbone.unet.down_blocks, self.backbone.unet.mid_block)
        with meter, meter.units(blocks):
            features = self.features(task)
        forward = meter.flops
        with meter:
            d_loss, g_loss, seen = self._judge(task, features)
        heads = meter.flops - forward
        heads += _backward(lambda: torch.autograd.backward(d_loss))
        heads += _backward(lambda: torch.autograd.backward(g_loss, inputs=seen))
        backward = _backward(lambda: torch.autograd.backward(features, [torch.empty_like(one) for one in features]))
        self.backbone.recompute = True
        with recomputing:
            self._judge(task, self.features(task))
        self.backbone.recompute = False
        return Measured(
            forward=forward, backward=backward, heads=heads, unit_flops=meter.unit_flops, kept=meter.kept_bytes,
            recomputed=recomputing.kept_bytes, unit=meter.largest_unit_bytes,
        )  # fmt: skip

    def text_flops(self) -> int:
        """FLOPs of both text encoders for one micro-batch of prompts."""
        ids = torch.zeros(self.recipe.student.batch, self._num_tokens(), dtype=torch.int64, device=_META)
        with torch.no_grad(), Meter(*self.text, lowered=self.lowered) as meter:
            for encoder in self.text:
                encoder(ids)
        return meter.flops

    def _noise(self) -> Tensor:
        embeds, pooled = self._condition()
        return predict_noise(self.unet, self._latents(self.side), self._times(), embeds, pooled)

    def features(self, task: str) -> tuple[Tensor, ...]:
        """What a task's heads see of the fake latents."""
        latents = self._latents(self.side_of(task)).requires_grad_()
        embeds, pooled = self._condition()
        features: tuple[Tensor, ...] = self.backbone(
            latents, self._times(), embeds, pooled, torch.empty(len(latents), 6, device=_META)
        )
        return features

    def _judge(self, task: str, features: Sequence[Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
        """The heads' loss, the student's, and what stands for the features in the latter.

        The real features are of the fake ones' shapes; the fake ones are cut from their graph, so that the backward pass
        through the heads can be told from the one through the backbone.
        """
        drawn, game = self._draw()[task], GAMES[self.recipe.student.loss]
        real = self.pool.scores(drawn, [torch.empty_like(feature) for feature in features])
        detached = self.pool.scores(drawn, [feature.detach() for feature in features])
        seen = [feature.detach().requires_grad_() for feature in features]
        self.pool.requires_grad_(False)
        fake = self.pool.scores(drawn, seen)
        self.pool.requires_grad_(True)
        return game.d_loss(real, detached), game.g_loss(fake), [seen[level] for level in self.pool.levels]

    def _draw(self) -> dict[str, list[list[int]]]:
        return self.pool.draw(0, torch.Generator())

    def _latents(self, side: int) -> Tensor:
        return torch.empty(self.recipe.student.batch, self.unet.config.in_channels, side, side, device=_META)

    def _times(self) -> Tensor:
        return torch.empty(self.recipe.student.batch, dtype=torch.int64, device=_META)

    def _condition(self) -> tuple[Tensor, Tensor]:
        batch, width = self.recipe.student.batch, self.unet.config.cross_attention_dim
        embeds = torch.empty(batch, self._num_tokens(), width, device=_META)
        return embeds, torch.empty(batch, self.text[1].config.projection_dim, device=_META)

    def _num_tokens(self) -> int:
        return int(self.text[0].config.max_position_embeddings)


def _backward(run: Callable[[], None]) -> int:
    with Meter(lowered=None) as meter:
        run()
    return meter.flops


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _open_blocks(unet: nn.Module) -> int:
    blocks = [_count(module) for module in unet.modules() if type(module).__name__ in SHARDED_BLOCKS]
    return _count(unet) - sum(blocks) + 2 * max(blocks)


def mean_simulated_steps(config: StudentConfig) -> float:
    """How many of its own earlier steps the student simulates for a micro-batch, averaged over all stages.

    A stage k > 1 simulates with the share 1 - one_step_share: a grid of n steps out of 2..k, a place out of 1..n-1.
    """
    total = 0.0
    for stage, num_steps in enumerate(config.stage_steps, 1):
        if stage > 1:
            total += num_steps * (1 - config.one_step_share) * sum(n / 2 for n in range(2, stage + 1)) / (stage - 1)
    return total / config.num_steps


def flops_of(recipe: StudentRecipe, text: int, student: Measured, looks: Sequence[Measured]) -> Flops:
    """A micro-batch's, from the text encoders', the student's and every task's look."""
    again = student.unit_flops + sum(look.unit_flops for look in looks)
    return Flops(
        teacher=0 if recipe.teacher.cache_samples else _teacher_passes(recipe) * student.forward,
        text_encoders=text,
        student_forward=student.forward,
        student_simulation=round(mean_simulated_steps(recipe.student) * student.forward),
        student_backward=student.backward,
        backbone_forward=2 * sum(look.forward for look in looks),
        backbone_backward=sum(look.backward for look in looks),
        heads=sum(look.heads for look in looks),
        recomputed=again if recipe.student.recompute else 0,
    )


def _teacher_passes(recipe: StudentRecipe) -> int:
    """UNet passes for one sample of the teacher."""
    return recipe.teacher.num_steps * (1 if recipe.teacher.guidance in (0.0, 1.0) else 2)


def flops_per_step(recipe: StudentRecipe, flops: Flops) -> int:
    """All micro-batches of an optimiser step, and the extra updates of the heads."""
    config = recipe.student
    heads_only = flops.total - flops.student_backward - flops.backbone_backward - flops.recomputed
    return config.accumulation * (flops.total + (config.d_updates - 1) * heads_only)


def as_mapping(counts: Parameters | Flops | Activations) -> Mapping[str, int]:
    """Field -> number."""
    return {name.replace("_", " "): value for name, value in dataclasses.asdict(counts).items()}

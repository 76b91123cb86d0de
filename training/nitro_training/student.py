"""The one-to-four-step student: NitroFusion's adversarial distillation with a dynamic pool of heads.

The student draws from noise, the teacher's result from the same prompts is real, and the pool judges. Nothing but that
adversarial loss is needed; refinement is bottom-up: one step first, then steps two to four by backward simulation, all with
the same weights.

Source: Chen et al. 2024, arXiv:2412.02030, sections 3.2-3.5.
"""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.nn import functional

from nitro_rt.errors import ConfigError
from nitro_rt.schedule import MAX_STEPS
from nitro_training.adversary import Adversary, Condition
from nitro_training.checkpoint import RunState
from nitro_training.engine import Engine
from nitro_training.generator import Place, draw_place, predict_x0, simulate
from nitro_training.loop import Losses
from nitro_training.losses import GAMES
from nitro_training.randomness import BatchRandom, generator
from nitro_training.samples import TeacherSamples
from nitro_training.teacher import alphas_cumprod, update_ema


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """Training of the student. One optimiser step is `accumulation` micro-batches of `batch` on each process."""

    init: str = "teacher"
    """The one-step weights it starts from: a UNet file or folder, a checkpoint folder, or `teacher`."""
    shifted_timestep: int = 500
    """The shift: 250 in NitroSD-Realism, 500 in NitroSD-Vibrant."""
    stage_steps: tuple[int, ...] = (1000, 300, 300, 300)
    """Optimiser steps of each stage; stage k adds step k (bottom-up refinement)."""
    one_step_share: float = 0.5
    """Share of micro-batches that stay with one step in the later stages, so that it does not get worse."""
    loss: str = "hinge"
    """`hinge`, `critic` (the paper's, unbounded) or `nonsaturating`."""
    adversarial_weight: float = 1.0
    regression_weight: float = 0.0
    """Weight of a regression on the teacher's result for the same noise; 0 is the paper's purely adversarial objective."""
    d_updates: int = 1
    """Updates of the heads per update of the student."""
    batch: int = 5
    """Samples of a micro-batch, on each process."""
    accumulation: int = 20
    """Micro-batches per optimiser step."""
    lr: float = 5e-7
    warmup_steps: int = 500
    """Steps over which both learning rates rise to their value."""
    final_lr_share: float = 1.0
    """The student's learning rate falls to this share of `lr` by a cosine over all stages; 1 keeps it constant."""
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.01
    clip: float = 1.0
    """Largest norm of the student's gradient; 0 leaves it alone."""
    ema_decay: float = 0.0
    """Decay of the average of the weights that is published instead of them; 0 keeps none."""
    precision: str = "bf16"
    """`bf16` runs the networks under autocast; master weights, losses and x0 stay in float32 always. Or `fp32`."""
    recompute: bool = False
    """Recompute activations in the backward pass (gradient checkpointing): less memory, about a third more time."""
    seed: int = 51

    def __post_init__(self) -> None:
        if not 1 <= self.shifted_timestep <= 1000:
            raise ConfigError(f"student.shifted_timestep must be from 1 to 1000, got {self.shifted_timestep}")
        if not 1 <= len(self.stage_steps) <= MAX_STEPS or min(self.stage_steps) < 0 or sum(self.stage_steps) < 1:
            raise ConfigError(f"student.stage_steps needs one to {MAX_STEPS} numbers, got {list(self.stage_steps)}")
        if self.loss not in GAMES:
            raise ConfigError(f"student.loss is one of {', '.join(GAMES)}, got {self.loss!r}")
        if self.batch < 2:
            raise ConfigError("student.batch must be at least 2: with one sample the adversarial loss collapses to one mode")
        if self.accumulation < 1 or self.d_updates < 1:
            raise ConfigError("student.accumulation and student.d_updates must be at least 1")
        for name in ("one_step_share", "final_lr_share", "ema_decay"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ConfigError(f"student.{name} is a share from 0 to 1, got {getattr(self, name)}")
        for name in ("adversarial_weight", "regression_weight", "warmup_steps", "weight_decay", "clip"):
            if getattr(self, name) < 0:
                raise ConfigError(f"student.{name} must not be negative, got {getattr(self, name)}")
        if self.lr <= 0 or not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(
                f"student.lr must be above 0 and student.betas from 0 to below 1, got {self.lr} and {list(self.betas)}"
            )
        if self.adversarial_weight == 0 and self.regression_weight == 0:
            raise ConfigError("student.adversarial_weight and student.regression_weight are both 0: nothing would be learnt")
        if self.precision not in ("bf16", "fp32"):
            raise ConfigError(f"student.precision is bf16 or fp32, got {self.precision!r}")

    @property
    def num_steps(self) -> int:
        """Optimiser steps of all stages."""
        return sum(self.stage_steps)

    def stage_at(self, step: int) -> int:
        """The stage (1 to 4) of an optimiser step."""
        for stage, end in enumerate(itertools.accumulate(self.stage_steps), 1):
            if step < end:
                return stage
        raise ConfigError(f"step {step} is past the last of {self.num_steps}")


class StudentStage:
    """The adversarial distillation, as a stage of a run."""

    name = "student"

    def __init__(
        self, config: StudentConfig, init: UNet2DConditionModel, adversary: Adversary, samples: TeacherSamples, engine: Engine
    ) -> None:
        """
        Args:
            init: the one-step weights; copied.
            samples: what the teacher makes of noise and prompts.
        """
        self.config, self.adversary, self.samples, self.engine = config, adversary, samples, engine
        self.seed, self.num_steps = config.seed, config.num_steps
        self.unet = copy.deepcopy(init).requires_grad_(True).to(engine.device, memory_format=torch.channels_last)
        if config.recompute:
            self.unet.enable_gradient_checkpointing()
        average = copy.deepcopy(self.unet).requires_grad_(False) if config.ema_decay else None
        self.optimizer = torch.optim.AdamW(
            self.unet.parameters(), lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=True
        )
        self.model, self.optimizer = engine.prepare(self.unet, self.optimizer)
        self.ema = {"unet_ema": engine.prepare_average(average)} if average is not None else {}
        self.abar = alphas_cumprod().to(engine.device)

    def state(self) -> RunState:
        pool = self.adversary.pool
        return RunState(
            modules={"unet": self.unet, **self.ema, "pool": pool},
            optimizers={"unet": self.optimizer},
            holders={"heads": pool},
        )

    def step(self, step: int) -> Losses:
        config, pool = self.config, self.adversary.pool
        terms = Terms()
        for update in range(config.d_updates - 1):
            self._train_heads_only(step, update, terms)
        drawn: list[int] = []
        for micro in range(config.accumulation):
            last = micro == config.accumulation - 1
            with self.engine.accumulate(self.model, last=last):
                drawn += self._micro_batch(step, f"{micro}", terms)
        rate = warmup(step, config.warmup_steps)
        terms.add({"d_grad_norm": self._update_heads(drawn, rate)})
        terms.add({"g_grad_norm": self._update_student(step, rate)})
        self.engine.mean_tensors([pool.win_rate])
        renewed = pool.refresh(step, generator(self.seed, step, "refresh"))
        terms.add({"renewed_heads": float(len(renewed)), "stage": float(config.stage_at(step))})
        return self.engine.mean(terms.means())

    def _micro_batch(self, step: int, micro: str, terms: Terms) -> list[int]:
        """Accumulate the gradients of both sides over one micro-batch; returns the heads that judged."""
        config = self.config
        random = self._random(step, micro)
        sample = self.samples.draw(random)
        place = draw_place(config.stage_at(step), config.one_step_share, random.shared)
        fake = self._draw(sample.noise_B4hw, place, sample.condition, random)
        verdict = self.adversary.judge(sample.x0_B4hw, fake, sample.condition, random, self._autocast)
        (verdict.d_loss / config.accumulation).backward()
        loss = config.adversarial_weight * verdict.g_loss
        if config.regression_weight:
            regression = functional.smooth_l1_loss(fake, sample.x0_B4hw, beta=0.2)
            loss = loss + config.regression_weight * regression
            terms.add({"regression": regression.item()})
        self.engine.backward(loss / config.accumulation)
        terms.add({"d_loss": verdict.d_loss.item(), "g_loss": verdict.g_loss.item(), **verdict.terms})
        return verdict.drawn

    def _train_heads_only(self, step: int, update: int, terms: Terms) -> None:
        """An extra update of the heads, on samples of its own."""
        drawn: list[int] = []
        for micro in range(self.config.accumulation):
            random = self._random(step, f"d{update}.{micro}")
            sample = self.samples.draw(random)
            place = draw_place(self.config.stage_at(step), self.config.one_step_share, random.shared)
            with torch.no_grad():
                fake = self._draw(sample.noise_B4hw, place, sample.condition, random)
            verdict = self.adversary.judge(sample.x0_B4hw, fake, sample.condition, random, self._autocast)
            (verdict.d_loss / self.config.accumulation).backward()
            drawn += verdict.drawn
            terms.add({"d_loss": verdict.d_loss.item()})
        self._update_heads(drawn, warmup(step, self.config.warmup_steps))

    def _draw(self, noise: Tensor, place: Place, condition: Condition, random: BatchRandom) -> Tensor:
        """The student's x0 at `place`, after its own earlier steps."""
        shift, embeds, pooled = self.config.shifted_timestep, condition.embeds_BTC, condition.pooled_BP
        times = torch.full((len(noise),), place.time, device=noise.device)
        with self._autocast():
            x = simulate(self.model, noise, place, shift, embeds, pooled, self.abar, random)
        # A context of its own: autocast keeps the copies of weights that it makes until it ends, and in older versions of torch
        # also those made without gradients, through which the weights would learn nothing (pytorch/pytorch#112583).
        with self._autocast():
            return predict_x0(self.model, x, times, shift, embeds, pooled, self.abar)

    def _update_heads(self, drawn: list[int], lr_scale: float) -> float:
        heads = [self.adversary.pool.head(index) for index in sorted(set(drawn))]
        self.engine.mean_gradients(p for head in heads for p in head.parameters())
        return self.adversary.pool.update(drawn, lr_scale=lr_scale)

    def _update_student(self, step: int, lr_scale: float) -> float:
        config = self.config
        rate = config.lr * lr_scale * cosine(step / config.num_steps, config.final_lr_share)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        norm = self.engine.clip(self.model, config.clip or float("inf"))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema:
            update_ema(self.ema, {"unet": self.unet}, min(config.ema_decay, (1 + step) / (10 + step)))
        return norm

    def _random(self, step: int, micro: str) -> BatchRandom:
        batch = self.config.batch
        return BatchRandom(self.seed, step, micro, first=self.engine.rank * batch, num=batch)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.engine.device.type, torch.bfloat16, enabled=self.config.precision == "bf16")

    def published(self) -> UNet2DConditionModel:
        """The weights that the run is for: the average where there is one. Under FSDP every process has to ask together."""
        return self.engine.whole(self.ema["unet_ema"] if self.ema else self.unet)


class Terms:
    """Means of named numbers, each over the times it was given."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, int]] = {}

    def add(self, values: Losses) -> None:
        for key, value in values.items():
            total, count = self._sums.get(key, (0.0, 0))
            self._sums[key] = (total + value, count + 1)

    def means(self) -> Losses:
        return {key: total / count for key, (total, count) in self._sums.items()}


def warmup(step: int, warmup_steps: int) -> float:
    """The share of the learning rate at a step of a linear warm-up."""
    return min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0


def cosine(progress: float, final: float) -> float:
    """From 1 down to `final` over `progress` 0 to 1."""
    return final + (1 - final) * 0.5 * (1 + torch.cos(torch.tensor(min(1.0, progress) * torch.pi)).item())

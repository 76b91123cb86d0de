"""One-step weights where none are published: the student regresses the teacher's result from the teacher's own noise.

The paper starts from published one-step SDXL weights; a model of one's own has none.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.nn import functional

from nitro_rt.errors import ConfigError
from nitro_rt.schedule import MAX_STEPS, grid
from nitro_training.checkpoint import RunState
from nitro_training.engine import Engine
from nitro_training.generator import predict_x0
from nitro_training.loop import Losses, learning_rate, set_learning_rate
from nitro_training.randomness import BatchRandom
from nitro_training.samples import TeacherSamples
from nitro_training.teacher import add_noise, alphas_cumprod, update_ema


@dataclass(frozen=True, kw_only=True)
class RegressionConfig:
    """Training of the one-step weights; `num_steps = 0` for a student that has some already."""

    num_steps: int = 0
    batch: int = 32
    """Samples per step, on each process."""
    lr: float = 4e-4
    """Its peak, after `warmup_steps`; a cosine takes it down to a tenth."""
    warmup_steps: int = 100
    one_step_share: float = 0.5
    """Share of samples at the first time of the grid; the rest spreads evenly over the later ones."""
    weight_decay: float = 0.01
    ema_decay: float = 0.998
    """Of the average that is handed on."""
    seed: int = 53

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ConfigError(f"regression.batch must be at least 1, got {self.batch}")
        for name in ("one_step_share", "ema_decay"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ConfigError(f"regression.{name} is a share from 0 to 1, got {getattr(self, name)}")


class RegressionStage:
    """Warm-up to one-step weights, as a stage of a run."""

    name = "regression"

    def __init__(
        self, config: RegressionConfig, init: UNet2DConditionModel, shift: int, samples: TeacherSamples, engine: Engine
    ) -> None:
        """
        Args:
            init: copied.
            shift: the student's shifted timestep.
        """
        self.config, self.shift, self.samples, self.engine = config, shift, samples, engine
        self.seed, self.num_steps = config.seed, config.num_steps
        self.unet = copy.deepcopy(init).requires_grad_(True).to(engine.device, memory_format=torch.channels_last)
        average = copy.deepcopy(self.unet).requires_grad_(False)
        optimizer = torch.optim.AdamW(
            self.unet.parameters(), lr=config.lr, betas=(0.9, 0.99), weight_decay=config.weight_decay, fused=True
        )
        self.model, self.optimizer = engine.prepare(self.unet, optimizer)
        self.ema = {"unet_ema": engine.prepare_average(average)}
        self.abar = alphas_cumprod().to(engine.device)
        self.times = torch.tensor(grid(MAX_STEPS), device=engine.device)

    def state(self) -> RunState:
        return RunState(modules={"unet": self.unet, **self.ema}, optimizers={"unet": self.optimizer})

    def step(self, step: int) -> Losses:
        config = self.config
        random = BatchRandom(self.seed, step, first=self.engine.rank * config.batch, num=config.batch)
        sample = self.samples.draw(random)
        times = self._draw_times(random)
        fresh = random.randn(*sample.noise_B4hw.shape[1:]).to(self.engine.device)
        is_first = (times == self.times[0]).view(-1, 1, 1, 1)
        x = torch.where(is_first, sample.noise_B4hw, add_noise(sample.x0_B4hw, fresh, times, self.abar))
        condition = sample.condition
        with torch.autocast(self.engine.device.type, torch.bfloat16):
            fake = predict_x0(self.model, x, times, self.shift, condition.embeds_BTC, condition.pooled_BP, self.abar)
        loss = functional.smooth_l1_loss(fake, sample.x0_B4hw, beta=0.2)
        rate = learning_rate(step, peak=config.lr, num_steps=self.num_steps, warmup_steps=config.warmup_steps, final=0.1)
        set_learning_rate(self.optimizer, rate)
        self.optimizer.zero_grad(set_to_none=True)
        self.engine.backward(loss)
        norm = self.engine.clip(self.model, 1.0)
        self.optimizer.step()
        update_ema(self.ema, {"unet": self.unet}, min(config.ema_decay, (1 + step) / (10 + step)))
        return self.engine.mean({"regression_loss": loss.item(), "grad_norm": norm})

    def _draw_times(self, random: BatchRandom) -> Tensor:
        """A time of the grid for each sample, [B]; the first with `one_step_share`."""
        later = 1 + random.randint(len(self.times) - 1)
        is_first = random.randint(1_000_000) < self.config.one_step_share * 1_000_000
        return self.times[torch.where(is_first, 0, later).to(self.times.device)]

    def published(self) -> UNet2DConditionModel:
        """The averaged weights. Under FSDP every process has to ask together."""
        return self.engine.whole(self.ema["unet_ema"])

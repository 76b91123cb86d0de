"""The pool of discriminator heads: specialised by task, noise level and feature level, drawn anew and partly renewed.

A head lives in a cell (task, t*, feature level); a cell holds several interchangeable heads, of which some are drawn per
micro-batch. After each optimiser step about 1 % of all heads, chosen at random, are re-initialised.

Nothing here takes time or accelerator memory in proportion to the pool: heads rest on the host, only drawn ones travel,
and each head has an optimiser of its own, which is dropped with it.

Source: Chen et al. 2024, NitroFusion, arXiv:2412.02030, sections 3.2-3.4.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nitro_rt.errors import ConfigError
from nitro_training.randomness import generator

_NORM_GROUPS = 32
TASKS = ("global-conditional", "local-conditional", "local-unconditional")


@dataclass(frozen=True, kw_only=True)
class PoolConfig:
    """Size and renewal of the pool, and what its heads look at."""

    tasks: tuple[str, ...] = TASKS
    """What heads judge: the whole latents with the prompt, crops with the prompt, crops without (stated in the paper)."""
    noise_levels: tuple[int, ...] = (10, 250, 500, 750)
    """t*, the times at which latents are shown to the discriminator (stated in the paper)."""
    noise_level_weights: tuple[float, ...] = ()
    """How often each t* is drawn; empty means equally. SDXL-Lightning favours 10 by 5:1:1:1 late in training."""
    specialised: bool = True
    """Whether a noise level has heads of its own; if not, t* only augments and every head sees all of them."""
    heads_per_cell: int = 4
    """Interchangeable heads of a cell: 480 / (3 tasks x 4 noise levels x 10 feature levels)."""
    drawn_per_cell: int = 1
    """How many of them judge a micro-batch."""
    refresh_rate: float = 0.01
    """Share of all heads renewed after each optimiser step (stated in the paper)."""
    feature_levels: tuple[int, ...] = ()
    """Which of the backbone's features have heads; empty means all."""
    width: int = 64
    num_blocks: int = 2
    """Blocks of 4x4 convolution with stride 2, group normalisation and SiLU before the 1x1 to a logit map; fewer on small
    features: normalised over a single cell, two channels to a group, little but signs would be left."""
    crop_latents: int = 64
    """Side of the local heads' windows, in latents."""
    crop_time_ids: str = "full"
    """The size conditioning of a crop: `full` keeps the whole picture's, `crop` gives the window's offset and size."""
    null_condition: str = "zeros"
    """What the unconditional task gives the backbone: `zeros` (SDXL's own) or `empty-prompt`."""
    seed: int = 41

    def __post_init__(self) -> None:
        if not self.tasks or not set(self.tasks) <= set(TASKS) or len(set(self.tasks)) != len(self.tasks):
            raise ConfigError(f"pool.tasks needs one or more of {', '.join(TASKS)}, each once; got {list(self.tasks)}")
        if self.width < _NORM_GROUPS or self.width % _NORM_GROUPS:
            raise ConfigError(f"pool.width must be a multiple of {_NORM_GROUPS} (group normalisation), got {self.width}")
        if self.heads_per_cell < 1 or self.num_blocks < 1 or self.crop_latents < 1:
            raise ConfigError("pool.heads_per_cell, pool.num_blocks and pool.crop_latents must be at least 1")
        if not 1 <= self.drawn_per_cell <= self.heads_per_cell:
            raise ConfigError(
                f"pool.drawn_per_cell must be from 1 to heads_per_cell = {self.heads_per_cell}, got {self.drawn_per_cell}"
            )
        times = self.noise_levels
        if not times or len(set(times)) != len(times) or not all(0 <= level < 1000 for level in times):
            raise ConfigError(f"pool.noise_levels needs one or more times from 0 to 999, each once; got {list(times)}")
        if len(set(self.feature_levels)) != len(self.feature_levels):
            raise ConfigError(f"pool.feature_levels names a level twice: {list(self.feature_levels)}")
        weights = self.noise_level_weights
        if weights and (len(weights) != len(self.noise_levels) or min(weights) < 0 or sum(weights) <= 0):
            raise ConfigError(
                f"pool.noise_level_weights needs {len(self.noise_levels)} weights, one per t*, got {list(weights)}"
            )
        if not 0.0 <= self.refresh_rate <= 1.0:
            raise ConfigError(f"pool.refresh_rate is a share from 0 to 1, got {self.refresh_rate}")
        if self.crop_time_ids not in ("full", "crop"):
            raise ConfigError(f"pool.crop_time_ids is full or crop, got {self.crop_time_ids!r}")
        if self.null_condition not in ("zeros", "empty-prompt"):
            raise ConfigError(f"pool.null_condition is zeros or empty-prompt, got {self.null_condition!r}")


@dataclass(frozen=True, kw_only=True)
class HeadOptimizerConfig:
    """How a drawn head learns."""

    lr: float = 1e-5
    """Ten to twenty times the student's: heads start at random and die young."""
    betas: tuple[float, float] = (0.0, 0.99)
    weight_decay: float = 0.0
    clip: float = 1.0
    """Largest norm of the drawn heads' gradient together; 0 leaves it alone."""

    def __post_init__(self) -> None:
        for name in ("lr", "weight_decay", "clip"):
            if getattr(self, name) < 0:
                raise ConfigError(f"heads.{name} must not be negative, got {getattr(self, name)}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"heads.betas must be from 0 to below 1, got {list(self.betas)}")


class Head(nn.Module):
    """One discriminator head: [B, C, h, w] to a raw score [B]."""

    def __init__(self, channels: int, width: int, num_blocks: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for index in range(num_blocks):
            convolution = nn.Conv2d(channels if index == 0 else width, width, kernel_size=4, stride=2, padding=1)
            layers += [convolution, nn.GroupNorm(_NORM_GROUPS, width), nn.SiLU()]
        self.layers = nn.Sequential(*layers, nn.Conv2d(width if num_blocks else channels, 1, kernel_size=1))

    def forward(self, feature_BChw: Tensor) -> Tensor:
        logits: Tensor = self.layers(feature_BChw)
        return logits.float().mean(dim=(1, 2, 3))

    def reset(self, source: torch.Generator) -> None:
        """The layers' standard initialisation, drawn on the host from `source`."""
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d):
                bound = (layer.in_channels * layer.kernel_size[0] * layer.kernel_size[1]) ** -0.5
                with torch.no_grad():
                    for parameter in layer.parameters():
                        parameter.uniform_(-bound, bound, generator=source)
            elif isinstance(layer, nn.GroupNorm):
                layer.reset_parameters()


class HeadPool(nn.Module):
    """All heads with their optimisers and their history.

    Head number `((task * noise levels + t*) * levels + level) * heads_per_cell + k`.
    """

    births: Tensor
    """The optimiser step at which each head was last initialised, int64 [heads]."""
    updates: Tensor
    """How often each has learnt since, int64 [heads]."""
    win_rate: Tensor
    """Running mean of how often each scored a real sample above the fake beside it, float32 [heads]; 0.5 at birth."""

    def __init__(
        self,
        config: PoolConfig,
        channels: Sequence[int],
        sides: Mapping[str, Sequence[int]],
        *,
        optimizer: HeadOptimizerConfig | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """
        Args:
            channels: of every feature of the backbone.
            sides: per task, the smaller side of every feature, in cells.
            device: where drawn heads judge.
        Raises: ConfigError if a feature level is asked for that the backbone does not have.
        """
        super().__init__()
        self.config, self.device = config, torch.device(device)
        self.optimizer_config = optimizer or HeadOptimizerConfig()
        self.levels = config.feature_levels or tuple(range(len(channels)))
        if not all(0 <= level < len(channels) for level in self.levels):
            raise ConfigError(f"pool.feature_levels {list(self.levels)}: the backbone has levels 0 to {len(channels) - 1}")
        self.num_noise_cells = len(config.noise_levels) if config.specialised else 1
        self.heads = nn.ModuleList()
        for task in config.tasks:
            for _ in range(self.num_noise_cells):
                for level in self.levels:
                    blocks = min(config.num_blocks, max(0, sides[task][level].bit_length() - 2))
                    self.heads.extend(Head(channels[level], config.width, blocks) for _ in range(config.heads_per_cell))
        for index, head in enumerate(self._all()):
            head.reset(generator(config.seed, "head", index))
        self.optimizers: dict[int, torch.optim.AdamW] = {}
        self.register_buffer("births", torch.zeros(len(self.heads), dtype=torch.int64))
        self.register_buffer("updates", torch.zeros(len(self.heads), dtype=torch.int64))
        self.register_buffer("win_rate", torch.full((len(self.heads),), 0.5))

    def __len__(self) -> int:
        return len(self.heads)

    def head(self, index: int) -> Head:
        found = self.heads[index]
        assert isinstance(found, Head)
        return found

    def _all(self) -> Iterable[Head]:
        return (self.head(index) for index in range(len(self.heads)))

    def draw_noise_level(self, source: torch.Generator) -> int:
        """The index of a t*, by weight."""
        weights = torch.tensor(self.config.noise_level_weights or [1.0] * len(self.config.noise_levels))
        return int(torch.multinomial(weights, 1, generator=source))

    def draw(self, noise_level_index: int, source: torch.Generator) -> dict[str, list[list[int]]]:
        """Heads for one noise level: per task, `drawn_per_cell` numbers of each feature level."""
        config, drawn = self.config, {}
        noise_cell = noise_level_index if config.specialised else 0
        for number, task in enumerate(config.tasks):
            first = (number * self.num_noise_cells + noise_cell) * len(self.levels)
            drawn[task] = [
                [(first + cell) * config.heads_per_cell + pick for pick in self._pick(source)]
                for cell in range(len(self.levels))
            ]
        return drawn

    def _pick(self, source: torch.Generator) -> list[int]:
        picked: list[int] = torch.randperm(self.config.heads_per_cell, generator=source)[: self.config.drawn_per_cell].tolist()
        return picked

    def scores(self, drawn: Sequence[Sequence[int]], features: Sequence[Tensor]) -> Tensor:
        """Raw scores [H, B] float32 of one task's drawn heads, each on its feature; the heads stay on the device."""
        scores = []
        for level, indices in zip(self.levels, drawn, strict=True):
            scores += [self.head(index).to(self.device)(features[level]) for index in indices]
        return torch.stack(scores)

    def update(self, drawn: Iterable[int], *, lr_scale: float = 1.0) -> float:
        """One optimiser step of the drawn heads; they go back to the host. No other head is touched in any way.

        Args:
            lr_scale: factor of the learning rate (warm-up).
        Returns: the gradient's norm before clipping.
        """
        indices = sorted(set(drawn))
        parameters = [p for index in indices for p in self.head(index).parameters()]
        limit = self.optimizer_config.clip or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
        for index in indices:
            optimizer = self._optimizer(index)
            optimizer.param_groups[0]["lr"] = self.optimizer_config.lr * lr_scale
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            self.updates[index] += 1
            self._rest(index)
        return float(norm)

    def _optimizer(self, index: int) -> torch.optim.AdamW:
        config = self.optimizer_config
        if index not in self.optimizers:
            self.optimizers[index] = torch.optim.AdamW(
                self.head(index).parameters(), lr=config.lr, betas=config.betas, weight_decay=config.weight_decay
            )
        self._move_moments(index, self.device)
        return self.optimizers[index]

    def _rest(self, index: int) -> None:
        """Send a head and its moments home."""
        if self.device.type != "cpu":
            self.head(index).to("cpu")
            self._move_moments(index, torch.device("cpu"))

    def _move_moments(self, index: int, device: torch.device) -> None:
        if self.device.type == "cpu":
            return
        for state in self.optimizers[index].state.values():
            for key in ("exp_avg", "exp_avg_sq"):
                state[key] = state[key].to(device)

    def record(self, drawn: Sequence[Sequence[int]], real_HB: Tensor, fake_HB: Tensor) -> float:
        """Note how often each drawn head put real above fake; returns the mean over them."""
        wins_H = (real_HB > fake_HB).float().mean(dim=1).cpu()
        flat = [index for indices in drawn for index in indices]
        self.win_rate[flat] = torch.lerp(self.win_rate[flat], wins_H, 0.25)
        return float(wins_H.mean())

    def refresh(self, step: int, source: torch.Generator) -> list[int]:
        """Re-initialise about `refresh_rate` of all heads, chosen at random, and drop their optimiser state.

        Fresh weights must not inherit the moments of the head they replace.
        Args:
            step: the optimiser step that has just ended.
        Returns: the renewed heads' numbers.
        """
        count = round(self.config.refresh_rate * len(self.heads))
        renewed: list[int] = torch.randperm(len(self.heads), generator=source)[:count].tolist()
        for index in renewed:
            self.head(index).reset(source)
            self.optimizers.pop(index, None)
            self.births[index], self.updates[index], self.win_rate[index] = step + 1, 0, 0.5
        return renewed

    def tensors(self) -> dict[str, Tensor]:
        """The moments of every head that has learnt, by `<head>/<parameter>/<moment>`."""
        found: dict[str, Tensor] = {}
        for index, optimizer in self.optimizers.items():
            for number, state in optimizer.state_dict()["state"].items():
                found |= {f"{index}/{number}/{key}": value for key, value in state.items()}
        return found

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `tensors` gave; heads not in it have no optimiser state."""
        self.optimizers.clear()
        states: dict[int, dict[int, dict[str, Tensor]]] = {}
        for key, value in tensors.items():
            head, number, moment = key.split("/")
            states.setdefault(int(head), {}).setdefault(int(number), {})[moment] = value
        for index, state in states.items():
            optimizer = self._optimizer(index)
            optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
            self._rest(index)

"""The pool of discriminator heads: specialised by noise level and feature level, drawn anew and partly renewed each step.

Source: NitroFusion, arXiv:2412.02030, sections 3.2 and 3.3. A head lives in a cell (t*, feature level); a cell holds
several interchangeable heads, of which one is drawn per step. About 1 % of all heads are re-initialised each step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from nitro_rt.errors import ConfigError

_NORM_GROUPS = 32


@dataclass(frozen=True, kw_only=True)
class PoolConfig:
    """Size and renewal of the pool."""

    noise_levels: tuple[int, ...] = (10, 250, 500, 750)
    """t*, the times at which latents are shown to the discriminator (stated in the paper)."""
    heads_per_cell: int = 4
    refresh_rate: float = 0.01
    """Share of all heads renewed after each optimiser step (stated in the paper)."""
    width: int = 64
    num_blocks: int = 2
    """Blocks of 4x4 convolution with stride 2, group normalisation and SiLU before the 1x1 to a logit map."""
    seed: int = 41

    def __post_init__(self) -> None:
        if self.width % _NORM_GROUPS:
            raise ConfigError(f"pool.width must be a multiple of {_NORM_GROUPS} (group normalisation), got {self.width}")
        if self.heads_per_cell < 1 or self.num_blocks < 1:
            raise ConfigError("pool.heads_per_cell and pool.num_blocks must be at least 1")
        if not self.noise_levels or not all(0 <= level < 1000 for level in self.noise_levels):
            raise ConfigError(f"pool.noise_levels needs one or more times from 0 to 999, got {list(self.noise_levels)}")
        if not 0.0 <= self.refresh_rate <= 1.0:
            raise ConfigError(f"pool.refresh_rate is a share from 0 to 1, got {self.refresh_rate}")


class Head(nn.Module):
    """One discriminator head: [B, C, h, w] to a raw score [B]."""

    def __init__(self, channels: int, width: int, num_blocks: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for index in range(num_blocks):
            convolution = nn.Conv2d(channels if index == 0 else width, width, kernel_size=4, stride=2, padding=1)
            layers += [convolution, nn.GroupNorm(_NORM_GROUPS, width), nn.SiLU()]
        self.layers = nn.Sequential(*layers, nn.Conv2d(width, 1, kernel_size=1))

    def forward(self, feature_BChw: Tensor) -> Tensor:
        logits: Tensor = self.layers(feature_BChw)
        return logits.float().mean(dim=(1, 2, 3))

    def reset(self, generator: torch.Generator) -> None:
        """The layers' standard initialisation, drawn from `generator`."""
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d):
                bound = (layer.in_channels * layer.kernel_size[0] * layer.kernel_size[1]) ** -0.5
                with torch.no_grad():
                    for parameter in layer.parameters():
                        parameter.uniform_(-bound, bound, generator=generator)
            elif isinstance(layer, nn.GroupNorm):
                layer.reset_parameters()


class HeadPool(nn.Module):
    """All heads. `heads[level][cell * heads_per_cell + k]`, one list per noise level and feature level."""

    def __init__(self, config: PoolConfig, feature_channels: tuple[int, ...]) -> None:
        super().__init__()
        self.config = config
        self.num_levels = len(feature_channels)
        generator = torch.Generator().manual_seed(config.seed)
        self.heads = nn.ModuleList()
        for _ in config.noise_levels:
            for channels in feature_channels:
                for _ in range(config.heads_per_cell):
                    head = Head(channels, config.width, config.num_blocks)
                    head.reset(generator)
                    self.heads.append(head)

    def __len__(self) -> int:
        return len(self.heads)

    def draw(self, noise_level_index: int, generator: torch.Generator) -> list[int]:
        """One head of each feature level for a noise level: [num_levels] indices into `heads`."""
        per_cell = self.config.heads_per_cell
        picks = torch.randint(0, per_cell, (self.num_levels,), generator=generator).tolist()
        first = noise_level_index * self.num_levels * per_cell
        return [first + level * per_cell + pick for level, pick in enumerate(picks)]

    def scores(self, drawn: list[int], features: tuple[Tensor, ...]) -> Tensor:
        """Raw scores [num_levels, B] of the drawn heads, each on its feature."""
        if len(features) != self.num_levels:
            raise ConfigError(f"the backbone gives {len(features)} features, the pool has heads for {self.num_levels}")
        return torch.stack([self.heads[index](feature) for index, feature in zip(drawn, features, strict=True)])

    def refresh(self, optimizer: torch.optim.Optimizer, generator: torch.Generator) -> list[int]:
        """Re-initialise about `refresh_rate` of all heads, chosen at random, and drop their optimiser state.

        Fresh weights must not inherit the moments of the head they replace. Returns: the renewed heads' indices.
        """
        count = round(self.config.refresh_rate * len(self.heads))
        renewed: list[int] = torch.randperm(len(self.heads), generator=generator)[:count].tolist()
        for index in renewed:
            self.heads[index].reset(generator)  # type: ignore[operator]
            for parameter in self.heads[index].parameters():
                optimizer.state.pop(parameter, None)
        return renewed


def hinge_d_loss(real_LB: Tensor, fake_LB: Tensor) -> Tensor:
    """Discriminator hinge loss, averaged over heads and batch, so that its scale does not depend on their number.

    Source: Lim & Ye 2017, "Geometric GAN", arXiv:1705.02894.
    """
    return functional.relu(1 - real_LB).mean() + functional.relu(1 + fake_LB).mean()


def hinge_g_loss(fake_LB: Tensor) -> Tensor:
    """Generator loss of the hinge game: the mean score of fakes, negated."""
    return -fake_LB.mean()

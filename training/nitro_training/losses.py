"""The adversarial games, as plain functions of raw scores.

Scores are [H, B]: a row per drawn head, a column per sample. Every loss is a mean over both, so that its scale depends
neither on the number of heads nor on the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Game:
    """A pair of losses: what the heads minimise and what the student minimises."""

    d_loss: Callable[[Tensor, Tensor], Tensor]
    """(real scores, fake scores) to a scalar."""
    g_loss: Callable[[Tensor], Tensor]
    """(fake scores) to a scalar."""


def hinge_d_loss(real_HB: Tensor, fake_HB: Tensor) -> Tensor:
    """Discriminator hinge loss; 0 when every score is past its margin, 2 for heads that tell nothing apart.

    Args:
        real_HB: raw scores of the teacher's latents, float32.
        fake_HB: raw scores of the student's latents, already detached from the student.
    Source: Lim & Ye 2017, "Geometric GAN", arXiv:1705.02894.
    """
    return functional.relu(1 - real_HB).mean() + functional.relu(1 + fake_HB).mean()


def critic_d_loss(real_HB: Tensor, fake_HB: Tensor) -> Tensor:
    """The unbounded critic of the paper, E[D(fake)] - E[D(real)].

    Source: arXiv:2412.02030, equations 3-6, with the labels of real and fake in the order that makes a game of them.
    """
    return fake_HB.mean() - real_HB.mean()


def nonsaturating_d_loss(real_HB: Tensor, fake_HB: Tensor) -> Tensor:
    """-log sigmoid(real) - log(1 - sigmoid(fake)).

    Source: Goodfellow et al. 2014, arXiv:1406.2661.
    """
    return functional.softplus(-real_HB).mean() + functional.softplus(fake_HB).mean()


def linear_g_loss(fake_HB: Tensor) -> Tensor:
    """The student's loss against hinge and critic: minus the mean score."""
    return -fake_HB.mean()


def nonsaturating_g_loss(fake_HB: Tensor) -> Tensor:
    """-log sigmoid(fake)."""
    return functional.softplus(-fake_HB).mean()


GAMES = {
    "hinge": Game(hinge_d_loss, linear_g_loss),
    "critic": Game(critic_d_loss, linear_g_loss),
    "nonsaturating": Game(nonsaturating_d_loss, nonsaturating_g_loss),
}

"""The games: known values, no dependence on the number of heads, and the right way round."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from nitro_training.losses import GAMES

ONE, ZERO = torch.ones(3, 2), torch.zeros(3, 2)
LN2, SOFT = math.log(2), math.log1p(math.exp(-1))


@pytest.mark.parametrize("game", GAMES)
def test_known_values(game: str) -> None:
    check_known_values(game)


def test_every_game_has_its_known_values() -> None:
    for game in GAMES:
        check_known_values(game)


def check_known_values(game: str) -> None:
    """(real, fake, heads' loss): undecided, just right, past the margin, wholly wrong; then the student's loss of fake = 1."""
    known = {
        "hinge": ([(ZERO, ZERO, 2.0), (ONE, -ONE, 0.0), (3 * ONE, -3 * ONE, 0.0), (-ONE, ONE, 4.0)], -1.0),
        "critic": ([(ZERO, ZERO, 0.0), (ONE, -ONE, -2.0), (3 * ONE, -3 * ONE, -6.0), (-ONE, ONE, 2.0)], -1.0),
        "nonsaturating": ([(ZERO, ZERO, 2 * LN2), (ONE, -ONE, 2 * SOFT), (-ONE, ONE, 2 + 2 * SOFT)], SOFT),
    }
    cases, student = known[game]
    for real, fake, expected in cases:
        assert math.isclose(float(GAMES[game].d_loss(real, fake)), expected, abs_tol=1e-6), (game, expected)
    assert math.isclose(float(GAMES[game].g_loss(ONE)), student, abs_tol=1e-6), game


def test_the_scale_is_free_of_the_number_of_heads_and_samples() -> None:
    real, fake = torch.linspace(-2, 2, 6).view(3, 2), torch.linspace(1, -1, 6).view(3, 2)
    for game in GAMES.values():
        torch.testing.assert_close(game.d_loss(real.repeat(10, 4), fake.repeat(10, 4)), game.d_loss(real, fake))
        torch.testing.assert_close(game.g_loss(fake.repeat(10, 4)), game.g_loss(fake))


def test_heads_pull_real_up_and_fake_down_and_the_student_fake_up() -> None:
    for game in GAMES.values():
        real, fake = ZERO.clone().requires_grad_(), ZERO.clone().requires_grad_()
        game.d_loss(real, fake).backward()
        assert real.grad is not None and (real.grad < 0).all(), "a step against the gradient raises real scores"
        assert fake.grad is not None and (fake.grad > 0).all()
        for_student = ZERO.clone().requires_grad_()
        game.g_loss(for_student).backward()
        assert for_student.grad is not None and (for_student.grad < 0).all()


def test_a_toy_game_moves_fakes_to_where_the_real_ones_are() -> None:
    """Real at (2, 0), fake at (-1, 0): a linear head learns to tell them apart, and the student's gradient points there."""
    for game in GAMES.values():
        noise = torch.Generator().manual_seed(0)
        real = torch.tensor([2.0, 0.0]) + 0.1 * torch.randn(64, 2, generator=noise)
        fake = torch.tensor([-1.0, 0.0]) + 0.1 * torch.randn(64, 2, generator=noise)
        head = torch.zeros(2, requires_grad=True)

        def score(points: Tensor, weights: Tensor = head) -> Tensor:
            return (points @ weights)[None]

        optimizer = torch.optim.SGD([head], lr=0.1)
        losses = []
        for _ in range(10):
            loss = game.d_loss(score(real), score(fake))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0] - 0.2
        student = fake.clone().requires_grad_()
        game.g_loss(score(student)).backward()
        assert student.grad is not None
        step = -student.grad.mean(dim=0)
        assert step[0] > 0 and step[0] > 5 * step[1].abs(), "towards the real ones"

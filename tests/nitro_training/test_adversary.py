"""One look of the discriminator: what each task sees, and who gets which gradient."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_student import (
    CROP,
    SIDE,
    TOKENS,
    adversary,
    backbone,
    batch_random,
    condition,
    copies,
    is_free_of_gradient,
    latents,
    null,
    plain,
    same,
)  # fmt: skip
from torch import Tensor, nn
from torch.nn import functional

from nitro_rt.errors import ConfigError
from nitro_training.adversary import Verdict
from nitro_training.distillation import null_condition
from nitro_training.pool import TASKS, Head, PoolConfig
from nitro_training.teacher import alphas_cumprod

NOISELESS = torch.ones(1000)
"""An abar at which a look shows the latents themselves."""
LOCAL = TASKS[1:]
POSITIONS = torch.arange(SIDE * SIDE, dtype=torch.float32).view(1, 1, SIDE, SIDE).expand(2, 4, SIDE, SIDE)
"""Latents whose values say where they are."""


class Eyes(nn.Module):
    """A backbone that keeps what it is shown and what it sees; by `cheap`, it sees nothing but a shape."""

    def __init__(self, *, cheap: bool = False) -> None:
        super().__init__()
        self.cheap = cheap
        self.shown: list[SimpleNamespace] = []
        self.seen: list[tuple[Tensor, ...]] = []

    def forward(self, x: Tensor, times: Tensor, embeds: Tensor, pooled: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
        self.shown.append(SimpleNamespace(x=x, times=times, embeds=embeds, pooled=pooled, ids=ids))
        if self.cheap:
            return tuple(torch.zeros(len(x), width, 8, 8) for width in backbone().channels())
        found: tuple[Tensor, ...] = backbone()(x, times, embeds, pooled, ids)
        self.seen.append(found)
        return found

    def by_task(self) -> dict[str, tuple[SimpleNamespace, SimpleNamespace]]:
        """What was shown of (real, fake) in the last look."""
        last = self.shown[-2 * len(TASKS) :]
        return {task: (last[2 * number], last[2 * number + 1]) for number, task in enumerate(TASKS)}


def judge(eyes: Eyes, real: Tensor, fake: Tensor, *name: int | str, autocast: Any = plain, **options: Any) -> Verdict:
    if eyes.cheap:
        options.setdefault("feature_levels", (9,))
    return adversary(eyes=eyes, **options).judge(real, fake, condition(len(real)), batch_random(*name, num=len(real)), autocast)


def plain_score(head: Head, feature: Tensor) -> Tensor:
    """A head's score by the functions of torch, from its weights alone."""
    weights = [parameter.detach().clone().requires_grad_(True) for parameter in head.parameters()]
    head.reference = weights  # type: ignore[assignment]
    if len(weights) == 2:  # on a feature too small to halve: the 1x1 alone
        return functional.conv2d(feature, *weights).mean(dim=(1, 2, 3))
    hidden = functional.conv2d(feature, weights[0], weights[1], stride=2, padding=1)
    hidden = functional.silu(functional.group_norm(hidden, 32, weights[2], weights[3]))
    return functional.conv2d(hidden, weights[4], weights[5]).mean(dim=(1, 2, 3))


def plain_d_loss(game: str, real: Tensor, fake: Tensor) -> Tensor:
    if game == "hinge":
        return (1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean()
    if game == "critic":
        return fake.mean() - real.mean()
    return -(torch.sigmoid(real).log().mean() + (1 - torch.sigmoid(fake)).log().mean())


def test_all_see_one_noise_level_of_the_set() -> None:
    for look in range(4):
        eyes = Eyes(cheap=True)
        judge(eyes, latents(), latents("fake"), "level", look)
        levels = {time for shown in eyes.shown for time in shown.times.tolist()}
        assert len(levels) == 1 and levels <= {10, 250, 500, 750}
        assert len(eyes.shown) == 6 and all(len(shown.times) == 2 for shown in eyes.shown)


def test_every_noise_level_gets_its_turn() -> None:
    eyes = Eyes(cheap=True)
    game = adversary(eyes=eyes, feature_levels=(9,))
    for look in range(40):
        game.judge(latents(), latents("fake"), condition(), batch_random("turn", look), plain)
    assert {int(shown.times[0]) for shown in eyes.shown} == {10, 250, 500, 750}


def test_real_and_fake_are_noised_to_the_noise_level_independently() -> None:
    """Even where real and fake are the same latents; and the noise is standard normal for every sample and task."""
    eyes = Eyes(cheap=True)
    x = latents("same", num=4)
    judge(eyes, x, x, "noise", noise_levels=(500,), crop_latents=SIDE)
    abar, noises = alphas_cumprod()[500], []
    for real, fake in eyes.by_task().values():
        noises += [(shown.x - abar.sqrt() * x) / (1 - abar).sqrt() for shown in (real, fake)]
    flat = torch.stack([noise[sample].flatten() for noise in noises for sample in range(4)])
    assert len(flat) == 24 and (flat.mean(dim=1).abs() < 0.15).all() and ((flat.std(dim=1) - 1).abs() < 0.1).all()
    assert torch.corrcoef(flat).fill_diagonal_(0).abs().max() < 0.2, "1024 numbers each"


def test_the_global_task_sees_the_whole_latents() -> None:
    eyes = Eyes(cheap=True)
    judge(eyes, latents(), latents("fake"), abar=NOISELESS)
    real, fake = eyes.by_task()["global-conditional"]
    assert torch.equal(real.x, latents()) and torch.equal(fake.x, latents("fake"))


def test_local_tasks_see_the_same_window_of_real_and_fake() -> None:
    for look in range(3):
        eyes = Eyes(cheap=True)
        judge(eyes, POSITIONS, POSITIONS + 1000, "window", look, abar=NOISELESS)
        for task in LOCAL:
            real, fake = eyes.by_task()[task]
            assert real.x.shape == (2, 4, CROP, CROP)
            assert torch.equal(fake.x, real.x + 1000)
            for sample in real.x:
                top, left = divmod(int(sample[0, 0, 0]), SIDE)
                assert torch.equal(sample, POSITIONS[0, :, top : top + CROP, left : left + CROP])


def test_windows_are_random_for_every_sample_and_cover_the_latents() -> None:
    eyes = Eyes(cheap=True)
    game = adversary(eyes=eyes, abar=NOISELESS, feature_levels=(9,))
    for look in range(60):
        game.judge(POSITIONS, POSITIONS, condition(), batch_random("cover", look), plain)
    windows = [sample for shown in eyes.shown[::2] for sample in shown.x if sample.shape[-1] == CROP]
    corners = [divmod(int(window[0, 0, 0]), SIDE) for window in windows]
    assert len(corners) == 240
    for found in ({top for top, _ in corners}, {left for _, left in corners}):
        assert found == set(range(SIDE - CROP + 1))
    assert len(set(corners)) > 60, "top and left are drawn apart"
    assert sum(first != second for first, second in zip(corners[::2], corners[1::2], strict=True)) > 100


def test_a_window_as_large_as_the_latents_is_the_latents() -> None:
    eyes = Eyes(cheap=True)
    judge(eyes, latents(), latents("fake"), abar=NOISELESS, crop_latents=SIDE)
    assert torch.equal(eyes.by_task()["local-conditional"][0].x, latents())


def test_only_the_unconditional_task_is_kept_from_the_prompt() -> None:
    eyes = Eyes(cheap=True)
    judge(eyes, latents(), latents("fake"))
    for task, pair in eyes.by_task().items():
        for shown in pair:
            if task == "local-unconditional":
                assert torch.equal(shown.embeds, null().embeds_BTC.expand(2, -1, -1))
                assert torch.equal(shown.pooled, null().pooled_BP.expand(2, -1))
            else:
                assert torch.equal(shown.embeds, condition().embeds_BTC) and torch.equal(shown.pooled, condition().pooled_BP)


def test_the_null_condition_is_zeros_or_the_empty_prompt() -> None:
    asked: list[list[str]] = []

    def tokenize(texts: list[str]) -> list[str]:
        asked.append(texts)
        return texts

    text = SimpleNamespace(tokenize=tokenize, encode=lambda ids: (torch.full((1, TOKENS, 32), 3.0), torch.full((1, 16), 4.0)))
    for kind, expected in (("zeros", (0.0, 0.0)), ("empty-prompt", (3.0, 4.0))):
        recipe: Any = SimpleNamespace(pool=SimpleNamespace(null_condition=kind))
        found = null_condition(recipe, SimpleNamespace(text=text), torch.device("cpu"))  # type: ignore[arg-type]
        assert found.embeds_BTC.shape == (1, TOKENS, 32) and (found.embeds_BTC == expected[0]).all()
        assert found.pooled_BP.shape == (1, 16) and (found.pooled_BP == expected[1]).all()
    assert asked == [[""], [""]]


def test_the_size_conditioning_of_windows_is_as_asked() -> None:
    for kind in ("full", "crop"):
        eyes = Eyes(cheap=True)
        judge(eyes, POSITIONS, POSITIONS, "ids", abar=NOISELESS, crop_time_ids=kind)
        px, window = SIDE * 8, CROP * 8
        for task, pair in eyes.by_task().items():
            for shown in pair:
                for sample, ids in zip(shown.x, shown.ids.tolist(), strict=True):
                    top, left = divmod(int(sample[0, 0, 0]), SIDE)
                    of_crop = [px, px, 8 * top, 8 * left, window, window]
                    expected = of_crop if task in LOCAL and kind == "crop" else [px, px, 0, 0, px, px]
                    assert ids == expected


def test_gradients_of_the_heads_are_those_of_the_plain_loss() -> None:
    """Of each game, computed once more by torch's own functions from the features that the heads saw."""
    for game in ("hinge", "critic", "nonsaturating"):
        eyes = Eyes()
        judged = adversary(game=game, eyes=eyes)
        verdict = judged.judge(latents(), latents("fake"), condition(), batch_random("plain", game), plain)
        verdict.d_loss.backward()
        heads = [judged.pool.head(index) for index in verdict.drawn]
        assert len(heads) == 30
        sides = []
        for kind in (0, 1):
            rows = []
            for number, head in enumerate(heads):
                feature = eyes.seen[2 * (number // 10) + kind][number % 10].detach()
                rows.append((head, plain_score(head, feature), head.reference))
            sides.append(rows)
        loss = plain_d_loss(game, *(torch.stack([score for _, score, _ in rows]) for rows in sides))
        torch.testing.assert_close(verdict.d_loss.detach(), loss.detach())
        loss.backward()
        for (head, _, of_real), (_, _, of_fake) in zip(*sides, strict=True):
            for parameter, one, other in zip(head.parameters(), of_real, of_fake, strict=True):
                torch.testing.assert_close(parameter.grad, one.grad + other.grad)


def test_the_gradient_of_the_students_loss_is_that_of_the_plain_loss() -> None:
    """Through heads and backbone to x0, without noise: windows add up where they overlap."""
    real, fake = POSITIONS / 100, (POSITIONS / 100 + 0.3 * latents()).requires_grad_(True)
    eyes = Eyes()
    judged = adversary(eyes=eyes, abar=NOISELESS)
    verdict = judged.judge(real, fake, condition(), batch_random("student"), plain)
    (found,) = torch.autograd.grad(verdict.g_loss, fake)
    rows = []
    for number, shown in enumerate(eyes.shown[::2]):
        corners = [divmod(round(float(sample[0, 0, 0]) * 100), SIDE) for sample in shown.x]
        side = shown.x.shape[-1]
        views = torch.stack([x[:, top : top + side, left : left + side] for x, (top, left) in zip(fake, corners, strict=True)])
        features = backbone()(views, shown.times, shown.embeds, shown.pooled, shown.ids)
        heads = [judged.pool.head(index) for index in verdict.drawn[10 * number : 10 * number + 10]]
        rows += [plain_score(head, feature) for head, feature in zip(heads, features, strict=True)]
    (expected,) = torch.autograd.grad(-torch.stack(rows).mean(), fake)
    assert expected.abs().sum() > 0
    torch.testing.assert_close(found, expected)


def test_the_students_loss_leaves_no_gradient_in_heads_or_backbone() -> None:
    judged = adversary()
    before, fake = copies(backbone()), latents("fake").requires_grad_(True)
    verdict = judged.judge(latents(), fake, condition(), batch_random("heads"), plain)
    verdict.g_loss.backward()
    assert fake.grad is not None and fake.grad.abs().sum() > 0
    assert is_free_of_gradient(judged.pool) and is_free_of_gradient(backbone()) and same(before, backbone())
    assert all(parameter.requires_grad for parameter in judged.pool.parameters()), "the next look's heads have to learn"


def test_the_heads_loss_leaves_no_gradient_in_the_student_or_backbone() -> None:
    judged = adversary()
    fake = latents("fake").requires_grad_(True)
    verdict = judged.judge(latents().requires_grad_(True), fake, condition(), batch_random("student"), plain)
    (found,) = torch.autograd.grad(verdict.d_loss, fake, retain_graph=True, allow_unused=True)
    assert found is None, "the heads' loss does not know where the fake is from"
    verdict.d_loss.backward()
    assert fake.grad is None and is_free_of_gradient(backbone())
    with_gradient = {index for index in range(len(judged.pool)) if not is_free_of_gradient(judged.pool.head(index))}
    assert with_gradient == set(verdict.drawn), "and only drawn heads learn of it"


def test_the_scale_of_the_losses_is_free_of_the_number_of_heads() -> None:
    """Untrained heads score about nothing, so hinge is about 2 however many of them judge."""
    for options in ({}, {"drawn_per_cell": 4}, {"feature_levels": (0,)}, {"tasks": ("global-conditional",)}):
        verdict = adversary(**options).judge(latents(), latents("fake"), condition(), batch_random("scale"), plain)
        assert 1.5 < float(verdict.d_loss.detach()) < 2.5


def test_losses_are_float32_under_autocast() -> None:
    eyes = Eyes()
    fake = latents("fake").requires_grad_(True)
    verdict = judge(eyes, latents(), fake, autocast=lambda: torch.autocast("cpu", torch.bfloat16))
    assert any(feature.dtype == torch.bfloat16 for feature in eyes.seen[0]), "the test means to run in bfloat16"
    assert verdict.d_loss.dtype == verdict.g_loss.dtype == torch.float32
    assert all(shown.x.dtype == torch.float32 for shown in eyes.shown)
    verdict.g_loss.backward()
    assert fake.grad is not None and fake.grad.dtype == torch.float32 and fake.grad.isfinite().all()


def test_the_log_has_losses_and_wins_per_task_and_noise_level() -> None:
    verdict = adversary(noise_levels=(250,)).judge(latents(), latents("fake"), condition(), batch_random("log"), plain)
    per_task = {f"{kind}/{task}" for kind in ("win_rate", "d_loss", "g_loss") for task in TASKS}
    assert set(verdict.terms) == per_task | {"d_loss/t250", "g_loss/t250"}
    mean = sum(verdict.terms[f"d_loss/{task}"] for task in TASKS) / 3
    assert mean == pytest.approx(float(verdict.d_loss.detach()), rel=1e-5)


def test_the_same_randomness_gives_the_same_verdict() -> None:
    first, second = (adversary().judge(latents(), latents("fake"), condition(), batch_random("again"), plain) for _ in range(2))
    assert first.drawn == second.drawn and first.terms == second.terms


def test_a_window_larger_than_the_latents_is_refused() -> None:
    wide = adversary(feature_levels=(9,))
    wide.pool.config = PoolConfig(crop_latents=SIDE + 4)
    with pytest.raises(ConfigError, match=rf"pool.crop_latents = {SIDE + 4} is larger than the latents \({SIDE}x{SIDE}\)"):
        wide.judge(latents(), latents("fake"), condition(), batch_random("wide"), plain)

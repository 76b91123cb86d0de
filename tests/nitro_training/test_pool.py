"""The pool of heads: its cells, who is drawn, who learns, who is renewed."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from tiny_student import HEADS, copies, head_pool, is_free_of_gradient, same
from torch import Tensor, nn

from nitro_rt.errors import ConfigError
from nitro_training.pool import TASKS, Head, HeadOptimizerConfig, HeadPool, PoolConfig
from nitro_training.randomness import generator

WIDTHS = (8,) * 4 + (16,) * 3 + (24,) * 3
SDXL_SIDES = (128, 128, 128, 64, 64, 64, 32, 32, 32, 32)
"""At latent 128, as in the table of SDXL's features."""


def features(num: int = 2, *name: int) -> list[Tensor]:
    """Ten random features, the coarsest 4x4."""
    sides = (16, 16, 16, 8, 8, 8, 4, 4, 4, 4)
    source = generator("features", *name)
    return [torch.randn(num, width, side, side, generator=source) for width, side in zip(WIDTHS, sides, strict=True)]


def learn(pool: HeadPool, step: int, drawn: list[list[int]]) -> float:
    """Gradients for some heads of one task, and their update."""
    (pool.scores(drawn, features(2, step)) ** 2).mean().backward()
    return pool.update([index for cell in drawn for index in cell])


def flat(drawn: dict[str, list[list[int]]]) -> list[int]:
    return [index for cells in drawn.values() for cell in cells for index in cell]


def test_the_default_pool_has_480_heads_in_120_cells_of_four() -> None:
    config = PoolConfig()
    pool = HeadPool(config, WIDTHS, dict.fromkeys(TASKS, SDXL_SIDES))
    assert len(pool) == 480 and config.heads_per_cell == 4
    seen: Counter[int] = Counter()
    for level in range(4):
        for index in range(200):
            seen.update({cell // 4 for cell in flat(pool.draw(level, generator(level, index)))})
    assert len(seen) == 120
    for index in range(480):
        level = index // 4 % 10
        first = pool.head(index).layers[0]
        assert isinstance(first, nn.Conv2d) and first.in_channels == WIDTHS[level]


def test_one_head_of_each_cell_of_the_noise_level_is_drawn() -> None:
    """30 per look: task after task, feature level after feature level, each from a cell of its own."""
    pool = head_pool()
    for noise_level in range(4):
        drawn = pool.draw(noise_level, generator("draw", noise_level))
        assert list(drawn) == list(TASKS) and len(flat(drawn)) == 30
        for task, name in enumerate(TASKS):
            cells = [[index // 4 for index in cell] for cell in drawn[name]]
            assert cells == [[(task * 4 + noise_level) * 10 + level] for level in range(10)]


def test_every_head_of_a_cell_is_drawn_equally_often() -> None:
    pool = head_pool()
    source = generator("often")
    counts = Counter(index for _ in range(400) for index in flat(pool.draw(2, source)))
    assert len(counts) == 120 and min(counts.values()) > 60 and max(counts.values()) < 140, "100 times each, more or less"


@pytest.mark.parametrize(
    ("options", "heads", "drawn"),
    [
        ({"drawn_per_cell": 2}, 480, 60),
        ({"heads_per_cell": 16, "feature_levels": (8, 9)}, 384, 6),
        ({"heads_per_cell": 1}, 120, 30),
        ({"specialised": False}, 120, 30),
        ({"tasks": ("global-conditional",)}, 160, 10),
        ({"tasks": ("local-unconditional", "global-conditional"), "noise_levels": (10, 900)}, 160, 20),
        ({"feature_levels": (9,)}, 48, 3),
        ({"feature_levels": (3, 6, 9), "drawn_per_cell": 4}, 144, 36),
    ],
)
def test_pools_of_other_shapes(options: dict[str, object], heads: int, drawn: int) -> None:
    pool = head_pool(**options)
    assert len(pool) == heads
    levels = pool.config.feature_levels or tuple(range(10))
    for noise_level in range(len(pool.config.noise_levels)):
        found = pool.draw(noise_level, generator("shape", noise_level))
        assert len(set(flat(found))) == drawn
        for cells in found.values():
            picked = [features()[level] for level in range(10)]
            assert pool.scores(cells, picked).shape == (len(levels) * pool.config.drawn_per_cell, 2)
    shared = set(flat(pool.draw(0, generator(1)))) & set(flat(pool.draw(1, generator(1))))
    assert bool(shared) != pool.config.specialised, "a noise level has heads of its own, if they are specialised"


def test_noise_levels_are_drawn_by_weight() -> None:
    weighted, equal = head_pool(noise_level_weights=(5.0, 1.0, 0.0, 2.0)), head_pool()
    source = generator("levels")
    counts = Counter(weighted.draw_noise_level(source) for _ in range(2000))
    assert counts[2] == 0
    for level, share in ((0, 5 / 8), (1, 1 / 8), (3, 2 / 8)):
        assert abs(counts[level] / 2000 - share) < 0.04
    counts = Counter(equal.draw_noise_level(source) for _ in range(2000))
    assert all(abs(counts[level] / 2000 - 0.25) < 0.04 for level in range(4))


def test_a_head_halves_its_feature_as_often_as_it_can() -> None:
    """Four by four, stride two, group normalisation, SiLU, and a 1x1 to a logit map whose mean is the score."""
    head = Head(16, 64, 2)
    kinds = [type(layer) for layer in head.layers]
    assert kinds == [nn.Conv2d, nn.GroupNorm, nn.SiLU] * 2 + [nn.Conv2d]
    assert head.layers[0].kernel_size == (4, 4) and head.layers[0].stride == (2, 2)
    assert head.layers[1].num_groups == 32 and head.layers[-1].kernel_size == (1, 1)
    feature = torch.randn(3, 16, 32, 32)
    assert head.layers(feature).shape == (3, 1, 8, 8)
    torch.testing.assert_close(head(feature), head.layers(feature).mean(dim=(1, 2, 3)))
    pool = head_pool(num_blocks=9)
    convolutions = [sum(isinstance(layer, nn.Conv2d) for layer in pool.head(4 * level).layers) - 1 for level in range(10)]
    assert convolutions == [3, 3, 3, 2, 2, 2, 1, 1, 1, 1], "of the global task: from side 16, 8 and 4 down to 2, never to 1"


def test_scores_are_float32_and_each_of_its_own_feature() -> None:
    pool = head_pool()
    drawn = pool.draw(0, generator("scores"))[TASKS[0]]
    given = features()
    with torch.autocast("cpu", torch.bfloat16):
        assert pool.scores(drawn, given).dtype == torch.float32
    scores = pool.scores(drawn, given)
    for row, cell in enumerate(drawn):
        torch.testing.assert_close(scores[row], pool.head(cell[0])(given[row]))


def test_only_drawn_heads_learn() -> None:
    """With weight decay: whoever is not drawn keeps every bit of weights and moments, and gets no optimiser."""
    pool = head_pool()
    assert pool.optimizer_config.weight_decay > 0
    first, second = (pool.draw(1, generator("learn", step))[TASKS[1]] for step in range(2))
    learn(pool, 0, first)
    moments = {key: value.clone() for key, value in pool.tensors().items()}
    before = [copies(pool.head(index)) for index in range(len(pool))]
    learn(pool, 1, second)
    drawn = {index for cell in second for index in cell}
    changed = {index for index in range(len(pool)) if not same(before[index], pool.head(index))}
    assert changed == drawn
    assert set(pool.optimizers) == drawn | {index for cell in first for index in cell}
    kept = {key for key, value in pool.tensors().items() if key in moments and torch.equal(value, moments[key])}
    assert {int(key.split("/")[0]) for key in kept} == {index for cell in first for index in cell} - drawn
    assert set(pool.updates.nonzero().flatten().tolist()) == set(pool.optimizers)
    assert all(is_free_of_gradient(pool.head(index)) for index in range(len(pool)))


def test_a_drawn_head_learns_as_by_plain_adamw() -> None:
    """Five updates with clipping and warm-up, against torch's optimiser over the same heads."""
    pool, reference = head_pool(), head_pool()
    drawn = pool.draw(3, generator("adamw"))[TASKS[0]]
    heads = [reference.head(cell[0]) for cell in drawn]
    weights = [parameter for head in heads for parameter in head.parameters()]
    plain = torch.optim.AdamW(weights, lr=HEADS.lr, betas=HEADS.betas, weight_decay=HEADS.weight_decay)
    for step in range(5):
        scale = (step + 1) / 5
        (100 * pool.scores(drawn, features(2, step)).mean()).backward()
        norm = pool.update([cell[0] for cell in drawn], lr_scale=scale)
        (100 * torch.stack([head(f) for head, f in zip(heads, features(2, step), strict=True)]).mean()).backward()
        expected = torch.nn.utils.clip_grad_norm_(weights, HEADS.clip)
        plain.param_groups[0]["lr"] = HEADS.lr * scale
        plain.step()
        plain.zero_grad()
        assert norm > HEADS.clip, "the test means to clip"
        torch.testing.assert_close(norm, float(expected))
    for cell, head in zip(drawn, heads, strict=True):
        for found, wanted in zip(pool.head(cell[0]).parameters(), head.parameters(), strict=True):
            torch.testing.assert_close(found, wanted)


def test_no_clipping_where_none_is_asked_for() -> None:
    for clip, limit in ((0.0, math.inf), (1e-3, 1e-3)):
        pool = head_pool(HeadOptimizerConfig(lr=0.0, betas=(0.0, 0.9), clip=clip))
        drawn = pool.draw(0, generator("clip"))[TASKS[0]]
        norm = learn(pool, 0, drawn)
        moments = [state["exp_avg"] for o in pool.optimizers.values() for state in o.state.values()]
        seen = float(torch.stack([moment.norm() for moment in moments]).norm())
        assert seen == pytest.approx(min(norm, limit), rel=1e-3), "with beta 0 the first moment is the gradient"


def test_heads_learn_to_tell_separable_data_apart() -> None:
    pool = head_pool(HeadOptimizerConfig(lr=3e-3))
    drawn = pool.draw(0, generator("separable"))[TASKS[0]]
    losses = []
    for step in range(12):
        real, fake = ([f + side for f in features(4, step)] for side in (0.5, -0.5))
        real_scores, fake_scores = pool.scores(drawn, real), pool.scores(drawn, fake)
        loss = torch.relu(1 - real_scores).mean() + torch.relu(1 + fake_scores).mean()
        loss.backward()
        pool.update([cell[0] for cell in drawn])
        losses.append(loss.item())
    assert losses[0] > 1.7 and losses[-1] < 0.7 * losses[0]
    assert pool.record(drawn, real_scores, fake_scores) > 0.9


def test_exactly_the_asked_share_is_renewed_and_nothing_else() -> None:
    for rate, levels, count in ((0.01, (), 5), (0.01, (4, 9), 1), (0.25, (9,), 12), (0.0, (9,), 0), (1.0, (9,), 48)):
        pool = head_pool(refresh_rate=rate, feature_levels=levels)
        before = [copies(pool.head(index)) for index in range(len(pool))]
        renewed = pool.refresh(7, generator("refresh", str(rate)))
        assert len(set(renewed)) == len(renewed) == count
        assert {index for index in range(len(pool)) if not same(before[index], pool.head(index))} == set(renewed)


def test_whom_the_renewal_takes_is_random() -> None:
    pool = head_pool(refresh_rate=0.05)
    taken = Counter(index for step in range(200) for index in pool.refresh(step, generator("who", step)))
    assert len(taken) == 480 and max(taken.values()) < 30, "10 times each, more or less"
    assert pool.refresh(0, generator("who", 0)) == pool.refresh(1, generator("who", 0)), "by the generator alone"


def test_renewed_heads_have_no_optimiser_state_and_no_past() -> None:
    """What replaces a head that has learnt starts its moments and its bias correction anew."""
    pool = head_pool(refresh_rate=1.0)
    drawn = pool.draw(0, generator("state"))[TASKS[0]]
    for step in range(3):
        learn(pool, step, drawn)
    pool.record(drawn, torch.ones(10, 2), torch.zeros(10, 2))
    index = drawn[0][0]
    assert pool.updates[index] == 3 and pool.win_rate[index] > 0.6 and pool.optimizers
    pool.refresh(3, generator("state", "refresh"))
    assert not pool.optimizers and not pool.tensors()
    assert (pool.births == 4).all() and (pool.updates == 0).all() and (pool.win_rate == 0.5).all()
    learn(pool, 4, drawn)
    steps = {float(value) for key, value in pool.tensors().items() if key.endswith("/step")}
    assert steps == {1.0} and pool.updates[index] == 1


def test_renewed_weights_have_the_layers_standard_spread() -> None:
    """Uniform within 1 / sqrt(fan-in), as torch initialises a convolution; affine parts 1 and 0; all heads different."""
    pool = head_pool(refresh_rate=1.0)
    with torch.no_grad():
        for parameter in pool.parameters():
            parameter.fill_(7.0)
    pool.refresh(0, generator("standard"))
    torch_s_own = [Head(8, 64, 1) for _ in range(16)]
    for number, layer in enumerate(pool.head(0).layers):
        if isinstance(layer, nn.Conv2d):
            bound = 1 / math.sqrt(layer.in_channels * layer.kernel_size[0] ** 2)
            for heads in ([pool.head(index) for index in range(16)], torch_s_own):
                weights = torch.stack([head.layers[number].weight for head in heads])
                biases = torch.stack([head.layers[number].bias for head in heads])
                assert weights.abs().max() <= bound and biases.abs().max() <= bound
                assert weights.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
        elif isinstance(layer, nn.GroupNorm):
            assert (layer.weight == 1).all() and (layer.bias == 0).all()
    assert len({float(pool.head(index).layers[0].weight.detach()[0, 0, 0, 0]) for index in range(480)}) == 480


def test_a_win_is_a_real_sample_above_the_fake_beside_it() -> None:
    pool = head_pool()
    drawn = [[4], [9]]
    wins = pool.record(drawn, torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[0.0, 3.0], [-1.0, -1.0]]))
    assert wins == 0.75
    torch.testing.assert_close(pool.win_rate[torch.tensor([4, 9, 5])], torch.tensor([0.5, 0.625, 0.5]))


def test_a_pool_goes_on_from_its_tensors_bit_for_bit() -> None:
    pool, copy = head_pool(), head_pool(seed=5)
    drawn = [pool.draw(0, generator("resume", step))[TASKS[0]] for step in range(4)]
    for step in range(2):
        learn(pool, step, drawn[step])
    copy.load_state_dict(pool.state_dict())
    copy.load_tensors({key: value.clone() for key, value in pool.tensors().items()})
    for one in (pool, copy):
        for step in (2, 3):
            learn(one, step, drawn[step])
        one.refresh(3, generator("resume"))
    for expected, found in ((pool.state_dict(), copy.state_dict()), (pool.tensors(), copy.tensors())):
        assert expected.keys() == found.keys()
        assert all(torch.equal(value, found[key]) for key, value in expected.items())


def test_heads_travel_to_the_device_and_home_again() -> None:
    """On a stand-in for a device: who is moved where. A head that is not drawn is never moved."""
    pool = head_pool()
    drawn = pool.draw(0, generator("travel"))[TASKS[0]]
    moves: list[tuple[int, str]] = []
    number = {id(pool.head(index)): index for index in range(len(pool))}
    travel, move_moments = Head.to, HeadPool._move_moments
    Head.to = lambda head, device: (moves.append((number[id(head)], str(device))), head)[1]  # type: ignore[method-assign,assignment,func-returns-value]
    HeadPool._move_moments = lambda self, index, device: moves.append((index, f"moments {device}"))  # type: ignore[method-assign]
    pool.device = torch.device("cuda", 0)
    try:
        learn(pool, 0, drawn)
        pool.refresh(0, generator("travel"))
    finally:
        Head.to, HeadPool._move_moments = travel, move_moments  # type: ignore[method-assign]
    expected = ["cuda:0", "moments cuda:0", "cpu", "moments cpu"]
    for cell in drawn:
        assert [where for index, where in moves if index == cell[0]] == expected
    assert {index for index, _ in moves} == {cell[0] for cell in drawn}


@pytest.mark.gpu
def test_accelerator_memory_is_flat_as_the_pool_grows() -> None:
    """Heads that are not drawn stay on the host, and drawn ones go home with their moments."""
    peaks = []
    for heads_per_cell in (1, 4, 16):
        pool = head_pool(heads_per_cell=heads_per_cell)
        pool.device = torch.device("cuda")
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        for step in range(4):
            drawn = pool.draw(step, generator("flat", step))[TASKS[0]]
            on_device = [feature.cuda() for feature in features(2, step)]
            pool.scores(drawn, on_device).mean().backward()
            assert {p.device.type for cell in drawn for p in pool.head(cell[0]).parameters()} == {"cuda"}
            pool.update([cell[0] for cell in drawn])
            pool.refresh(step, generator("flat", step))
        del on_device
        assert {p.device.type for p in pool.parameters()} == {"cpu"}
        moments = [s[key] for o in pool.optimizers.values() for s in o.state.values() for key in ("exp_avg", "exp_avg_sq")]
        assert {moment.device.type for moment in moments} == {"cpu"}
        assert torch.cuda.memory_allocated() == held
        peaks.append(torch.cuda.max_memory_allocated() - held)
    assert max(peaks) <= 1.05 * min(peaks)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ()}, "pool.tasks"),
        ({"tasks": ("global-unconditional",)}, "pool.tasks"),
        ({"tasks": ("global-conditional", "global-conditional")}, "each once"),
        ({"width": 48}, "multiple of 32"),
        ({"heads_per_cell": 0}, "at least 1"),
        ({"drawn_per_cell": 5}, "from 1 to heads_per_cell = 4"),
        ({"noise_levels": (10, 1000)}, "from 0 to 999"),
        ({"noise_level_weights": (1.0,)}, "4 weights"),
        ({"noise_level_weights": (0.0, 0.0, 0.0, 0.0)}, "4 weights"),
        ({"refresh_rate": 1.5}, "share from 0 to 1"),
        ({"crop_time_ids": "window"}, "full or crop"),
        ({"null_condition": "none"}, "zeros or empty-prompt"),
    ],
)
def test_options_that_make_no_pool_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PoolConfig(**options)  # type: ignore[arg-type]


def test_a_feature_level_that_the_backbone_lacks_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"pool.feature_levels \[9, 10\]: the backbone has levels 0 to 9"):
        head_pool(feature_levels=(9, 10))

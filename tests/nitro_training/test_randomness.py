"""Seeds by name: what a sample sees follows from its name, not from who draws it or what is drawn beside it."""

from __future__ import annotations

import pytest
import torch

from nitro_training.randomness import BatchRandom, generator, seed_of


def test_a_seed_follows_from_its_name_on_every_machine() -> None:
    """Python's own hash differs from process to process; this must not."""
    assert seed_of(51, 0, "0", "shared") == 2003986062577308207
    assert 0 <= seed_of("x") < 2**63


def test_neighbouring_names_give_unrelated_draws() -> None:
    names = [(seed, step, micro) for seed in range(3) for step in range(10) for micro in ("0", "1", "shared")]
    draws = torch.stack([torch.randn(64, generator=generator(*name)) for name in names])
    correlation = torch.corrcoef(draws).fill_diagonal_(0)
    assert correlation.abs().max() < 0.6, "64 independent numbers"
    assert seed_of("a", "bc") != seed_of("ab", "c"), "parts are kept apart"


@pytest.mark.parametrize("num_processes", [1, 2, 4])
def test_sharding_a_batch_leaves_each_samples_draws_alone(num_processes: int) -> None:
    check_sharding(num_processes)


def test_two_processes_draw_what_one_draws() -> None:
    check_sharding(2)


def check_sharding(num_processes: int) -> None:
    """The same sequence of draws, by one process and by several: the slices are the same numbers."""

    def draws(random: BatchRandom) -> list[torch.Tensor]:
        return [random.randn(4, 3, 3), random.randint(17), random.randn(5), random.randint(1000)]

    whole = draws(BatchRandom("run", 7, "0", first=0, num=8))
    share = 8 // num_processes
    parts = [draws(BatchRandom("run", 7, "0", first=rank * share, num=share)) for rank in range(num_processes)]
    for expected, *found in zip(whole, *parts, strict=True):
        assert torch.equal(torch.cat(found), expected)


def test_what_is_shared_is_equal_on_every_process() -> None:
    first, second = (BatchRandom("run", 7, "0", first=rank * 4, num=4) for rank in range(2))
    first.randn(3)  # drawing for samples does not advance what is shared
    assert [int(torch.randint(1000, (), generator=first.shared)) for _ in range(5)] == [
        int(torch.randint(1000, (), generator=second.shared)) for _ in range(5)
    ]


def test_samples_of_a_batch_differ() -> None:
    random = BatchRandom("run", 0, "0", first=0, num=6)
    assert len({tuple(row.tolist()) for row in random.randn(4)}) == 6
    assert len(set(random.randint(10**6).tolist())) == 6


def test_drawing_what_is_shared_leaves_the_samples_alone() -> None:
    first, second = (BatchRandom("run", 0, "0", first=0, num=3) for _ in range(2))
    torch.rand(10, generator=first.shared)
    assert torch.equal(first.randn(4), second.randn(4))


def test_whole_numbers_cover_their_range() -> None:
    draws = BatchRandom("run", 0, "0", first=0, num=200).randint(5)
    assert draws.dtype == torch.int64 and set(draws.tolist()) == {0, 1, 2, 3, 4}

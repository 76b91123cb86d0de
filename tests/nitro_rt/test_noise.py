"""The noise equals torch's."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from nitro_rt.errors import ConfigError
from nitro_rt.noise import MAX_SEED, NoiseGenerator, checked_seed, draw_noise

SHAPES = [(1,), (3,), (15,), (16,), (17,), (2,), (31,), (100,), (1, 4, 16, 16), (3, 4, 17, 13), (7,), (100_003,)]
SEEDS = [0, 1, 7, 5489, 2**31, 2**32 - 1, 2**32, 2**32 + 5, 2**63, MAX_SEED]


@pytest.mark.parametrize("seed", SEEDS)
def test_successive_draws_equal_torch(seed: int) -> None:
    ours, theirs = NoiseGenerator(seed), torch.Generator().manual_seed(seed)
    for shape in SHAPES:
        found, expected = ours.normal(shape), torch.randn(shape, generator=theirs).numpy()
        assert found.dtype == np.float32 and found.shape == shape and found.flags.c_contiguous
        # torch's vectorised log, sin and cos differ from NumPy's by 5e-7 at most.
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6, err_msg=f"seed {seed}, shape {shape}")


@pytest.mark.parametrize("size", range(1, 34))
def test_every_small_size_equals_torch(size: int) -> None:
    ours, theirs = NoiseGenerator(42), torch.Generator().manual_seed(42)
    for _ in range(3):
        np.testing.assert_allclose(ours.normal((size,)), torch.randn(size, generator=theirs).numpy(), rtol=0, atol=1e-6)


def test_seeds_differ() -> None:
    assert not np.array_equal(NoiseGenerator(0).normal((64,)), NoiseGenerator(1).normal((64,)))


def test_only_the_low_32_bits_count_as_in_torch() -> None:
    assert np.array_equal(NoiseGenerator(5).normal((64,)), NoiseGenerator(5 + 2**32).normal((64,)))


def test_full_size_latents_are_quick() -> None:
    generator = NoiseGenerator(0)
    start = time.perf_counter()
    generator.normal((1, 4, 128, 128))
    assert time.perf_counter() - start < 0.1  # about 1 ms on an idle machine


@pytest.mark.parametrize("seed", [True, np.True_, 1.0, np.float32(1), "7", b"7", None, [1], -1, 2**64])
def test_wrong_seeds_are_refused(seed: object) -> None:
    with pytest.raises(ConfigError, match="seed"):
        checked_seed(seed)


def test_numpy_integers_are_seeds() -> None:
    assert checked_seed(np.uint64(MAX_SEED)) == MAX_SEED
    assert type(checked_seed(np.int64(3))) is int


def test_one_seed_draws_for_the_whole_batch_step_after_step() -> None:
    generator = torch.Generator().manual_seed(3)
    expected = [torch.randn((2, 4, 3, 5), generator=generator).numpy() for _ in range(3)]
    noise = draw_noise(3, 3, 2, 4, (4, 3, 5))
    assert noise.shape == (3, 4, 4, 3, 5)
    np.testing.assert_allclose(noise[:, :2], np.stack(expected), rtol=0, atol=1e-6)
    assert not noise[:, 2:].any()


def test_one_seed_per_image_draws_as_if_alone() -> None:
    noise = draw_noise([3, 0], 2, 2, 2, (4, 8, 8))
    for row, seed in enumerate([3, 0]):
        np.testing.assert_array_equal(noise[:, row], draw_noise(seed, 2, 1, 1, (4, 8, 8))[:, 0])

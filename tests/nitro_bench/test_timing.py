from __future__ import annotations

from typing import Any

import bench_reports
import numpy as np
import pytest

from nitro_bench import timing
from nitro_bench.peer import DrawRequest
from nitro_bench.warmup import VERY_SLOW_MS

DRAW = DrawRequest(prompts=("a", "b"), seed=1, steps=1, size_px=32, noise="noise.npy")


class Side:
    """A process whose calls take two seconds each, whatever the number of threads."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []

    def throughput_s(self, request: DrawRequest, num_threads: int, num_images: int) -> float:
        self.asked.append((num_threads, num_images))
        return 2.0 * num_images


def test_very_slow_images_are_not_drawn_again_for_one_thread() -> None:
    rng = np.random.default_rng(5)
    timed = [bench_reports.process(rng, 1000.0, 2) for _ in range(2)]
    side: Any = Side()
    one, two = timing.throughput(side, DRAW, (1, 2), VERY_SLOW_MS + 1, timed)
    assert side.asked == [(2, 2)] and two.num_calls == 2
    drawn_s = sum(sum(process.total_ms) for process in timed) / 1e3
    assert (one.num_threads, one.num_calls, one.seconds) == (1, 4, pytest.approx(drawn_s))
    assert one.images_per_s == pytest.approx(2 * 4 / drawn_s)  # two images a call


def test_other_images_are_drawn_for_one_thread() -> None:
    side: Any = Side()
    (one,) = timing.throughput(side, DRAW, (1,), 1000.0, [])
    assert side.asked == [(1, 3)] and one.images_per_s == 1.0


@pytest.mark.parametrize(("num_images", "per_block", "sizes"), [(7, 3, [3, 3, 1]), (6, 3, [3, 3]), (2, 10, [2]), (0, 5, [])])
def test_blocks_make_all_images(num_images: int, per_block: int, sizes: list[int]) -> None:
    assert list(timing.block_sizes(num_images, per_block)) == sizes

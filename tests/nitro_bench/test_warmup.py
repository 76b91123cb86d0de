from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest

from nitro_bench.warmup import MAX_SLOW_WINDOWS, MAX_WINDOWS, WINDOW, warm_up


class Machine:
    """Draws images that take what `times` says, window by window; the last one stays."""

    def __init__(self, times: Sequence[float]) -> None:
        self._times: Iterator[float] = iter(times)
        self._last, self.windows = 0.0, []

    def draw(self, count: int) -> list[float]:
        self._last = next(self._times, self._last)
        self.windows.append(count)
        return [self._last] * count


def test_it_ends_when_two_windows_agree() -> None:
    machine = Machine([50, 30, 20, 19.4, 19.3, 10])
    found = warm_up(machine.draw, first_image_ms=100)
    assert found.stable and found.num_images == 5 * WINDOW
    assert found.last_change == pytest.approx(0.1 / 19.4)
    assert machine.windows == [WINDOW] * 5 and found.last_ms == 19.3


def test_it_gives_up_at_the_cap_and_says_so() -> None:
    machine = Machine([100 * 0.9**index for index in range(50)])
    found = warm_up(machine.draw, first_image_ms=100)
    assert not found.stable and found.num_images == MAX_WINDOWS * WINDOW
    assert found.last_change == pytest.approx(0.1)


def test_very_slow_images_are_drawn_once() -> None:
    machine = Machine([50_000])
    found = warm_up(machine.draw, first_image_ms=62_500)
    assert machine.windows == [1] and found.num_images == 1
    assert not found.stable and found.last_change == pytest.approx(0.2) and found.last_ms == 50_000
    assert warm_up(Machine([50_000]).draw, first_image_ms=50_500).stable


def test_a_slow_first_image_does_not_make_the_others_slow() -> None:
    machine = Machine([900, 600, 599])
    assert warm_up(machine.draw, first_image_ms=60_000).stable
    assert machine.windows == [1] * 3


def test_slow_images_are_few() -> None:
    machine = Machine([9000, 5000, 4000, 3000])
    found = warm_up(machine.draw, first_image_ms=9000)
    assert not found.stable and found.num_images == MAX_SLOW_WINDOWS
    assert machine.windows == [1] * MAX_SLOW_WINDOWS

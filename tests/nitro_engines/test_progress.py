from __future__ import annotations

import pytest

from nitro_engines.progress import INTERVAL_S, Progress


class Clock:
    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


def told(clock: Clock, **options: float) -> tuple[Progress, list[str]]:
    lines: list[str] = []
    return Progress(lines.append, "denoise/1", clock=clock, **options), lines


def test_the_innermost_phase_is_named_with_its_share(clock: Clock) -> None:
    progress, _ = told(clock)
    progress.start("Building engine", 6)
    progress.start("Timing graph nodes", 200)
    clock.seconds = 4
    progress.step("Timing graph nodes", 50)
    assert progress.line() == "Timing graph nodes 25 %, 4 s so far, about 12 s left in this phase"
    progress.finish("Timing graph nodes")
    assert progress.line() == "Building engine, 4 s so far"  # one step of six is no measure of speed


def test_the_last_build_tells_what_is_left(clock: Clock) -> None:
    """A phase of one step, where TensorRT-RTX spends nine tenths of its time, tells nothing itself."""
    progress, _ = told(clock, expected_s=40)
    assert progress.line() == "reading the graph, 0 s so far, about 40 s left"
    progress.start("Determining refit engines", 1)
    clock.seconds = 15
    assert progress.line() == "Determining refit engines, 15 s so far, about 25 s left"
    clock.seconds = 41
    progress.finish("Determining refit engines")
    assert progress.line() == "writing the plan, 41 s so far, the last time it took 40 s"


def test_without_a_measure_no_time_is_given(clock: Clock) -> None:
    progress, _ = told(clock)
    progress.start("Determining refit engines", 1)
    clock.seconds = 100
    assert progress.line() == "Determining refit engines, 100 s so far"


def test_lines_are_few_however_much_is_reported(clock: Clock) -> None:
    progress, lines = told(clock)
    progress.start("Cloning network graph", 3500)
    for done in range(3500):
        progress.step("Cloning network graph", done)
    assert lines == []  # a compilation of no time says nothing
    for second in range(1, 3601):
        clock.seconds = second
        progress.tick()
    assert 30 < len(lines) < 60
    clock.seconds += INTERVAL_S
    progress.say("a word of the compiler's")
    assert lines[-1] == "denoise/1: a word of the compiler's"


def test_steps_never_go_back_and_never_pass_the_end(clock: Clock) -> None:
    progress, _ = told(clock)
    progress.start("Optimizing graph", 30)
    for done in (12, 9, 31):
        progress.step("Optimizing graph", done)
        progress.step("not begun", done)
    assert progress.line().startswith("Optimizing graph 100 %")

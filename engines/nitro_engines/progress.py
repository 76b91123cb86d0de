"""How far a compiler is: the phases that it reports, and the time that is left as far as it can be known.

TensorRT reports a tree of phases with numbers of steps; a phase of a single step says nothing until it ends. TensorRT-RTX
spends nine tenths of its time in such a phase, so the time left is taken from the last build of a stage of this kind, and
where there is none, from the steps of the phase at work, if it has enough of them. Otherwise no time is given.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from nitro_engines.files import Report

FIRST_LINE_S, INTERVAL_S = 5.0, 10.0
"""Compilations that are shorter than the first say nothing on the way."""
INTERVAL_SHARE = 0.1
"""Of the time so far, how long a line lasts: an hour's compilation gives some fifty lines, not hundreds."""
MIN_STEPS, MIN_DONE = 10, 3
"""Of a phase whose speed is taken for what is left of it."""


@dataclass(kw_only=True)
class Phase:
    """One phase at work."""

    name: str
    num_steps: int
    started_s: float
    done: int = 0


class Progress:
    """Takes what a compiler reports and passes on a line now and then. One thread calls it."""

    def __init__(
        self, report: Report, stage: str, *, expected_s: float | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Args: expected_s: how long the whole compilation took the last time, scaled to this graph; None: not known."""
        self._report, self._stage, self._expected_s, self._clock = report, stage, expected_s, clock
        self._started_s = clock()
        self._due_s = FIRST_LINE_S
        self._phases: list[Phase] = []
        """Those at work, the innermost last."""
        self._has_begun = False

    def start(self, name: str, num_steps: int) -> None:
        self._has_begun = True
        self._phases.append(Phase(name=name, num_steps=num_steps, started_s=self._clock()))
        self.tick()

    def step(self, name: str, done: int) -> None:
        """Args: done: how many steps of the phase have ended."""
        for phase in self._phases:
            if phase.name == name:
                phase.done = max(phase.done, done)
        self.tick()

    def finish(self, name: str) -> None:
        self._phases = [phase for phase in self._phases if phase.name != name]
        self.tick()

    def say(self, line: str) -> None:
        """Pass on a line of the compiler's own."""
        self._report(f"{self._stage}: {line}")

    def tick(self) -> None:
        """Say a line if one is due. Also to be called where nothing is reported."""
        passed_s = self._clock() - self._started_s
        if passed_s >= self._due_s:
            self._due_s = passed_s + max(INTERVAL_S, INTERVAL_SHARE * passed_s)
            self.say(self.line())

    def line(self) -> str:
        """Building engine 40 %, 12 s so far, about 20 s left."""
        passed_s = self._clock() - self._started_s
        phase = self._phases[-1] if self._phases else None
        what = f"{phase.name}{_percent(phase)}" if phase else "writing the plan" if self._has_begun else "reading the graph"
        return f"{what}, {passed_s:.0f} s so far{self._left(phase, passed_s)}"

    def _left(self, phase: Phase | None, passed_s: float) -> str:
        if self._expected_s is not None:
            left_s = self._expected_s - passed_s
            return f", about {left_s:.0f} s left" if left_s >= 1 else f", the last time it took {self._expected_s:.0f} s"
        if phase is None or phase.num_steps < MIN_STEPS or phase.done < MIN_DONE:
            return ""
        left_s = (self._clock() - phase.started_s) * (phase.num_steps - phase.done) / phase.done
        return f", about {left_s:.0f} s left in this phase"


def _percent(phase: Phase) -> str:
    return f" {min(100, 100 * phase.done // phase.num_steps)} %" if phase.num_steps >= MIN_STEPS else ""

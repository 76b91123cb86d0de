"""The shipped model beside itself on this machine, whatever else that does: no false alarm, and a planted slow-down found.

A look at six pairs of processes takes a minute and a half on two idle cores, and a comparison takes one to three.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from nitro_bench import side_by_side
from nitro_bench.compare import SLOWER, Comparison
from nitro_bench.peer import Drawn, PeerProcess
from nitro_bench.subject import Case
from nitro_rt.cli import main

pytestmark = pytest.mark.slow

RUNS, FEWEST_RUNS, BUDGET_S = 20, 5, 600.0


@pytest.fixture(scope="module")
def emoji(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("emoji")
    patch = pytest.MonkeyPatch()
    with patch.context() as here:
        here.setenv("NITRO_RT_CACHE", str(folder / "cache"))
        assert main(["build", "--steps", "1", "--gate-prompts", "1", "--out", str(folder / "nitro-emoji-1step")]) == 0
    return folder / "nitro-emoji-1step"


@pytest.fixture(autouse=True)
def verified_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one bundle that all runs compare."""
    verify, verified = side_by_side._verify, []

    def once(case: Case, report: Any) -> tuple[float, int]:
        if not verified:
            verified.append(verify(case, report))
        return verified[0]

    monkeypatch.setattr(side_by_side, "_verify", once)


def compared(emoji: Path) -> Comparison:
    found = side_by_side.compare_bundles(emoji, emoji, 0.05, lambda line: None)
    assert {line.stage for line in found.lines} >= {"total", "denoise", "decode"}
    return found


def test_runs_of_the_same_bundle_raise_no_alarm(emoji: Path) -> None:
    """Twenty runs, or as many as begin within ten minutes and at least five."""
    end_s = time.monotonic() + BUDGET_S
    num_runs = 0
    while num_runs < RUNS and (num_runs < FEWEST_RUNS or time.monotonic() < end_s):
        num_runs += 1
        assert not compared(emoji).slower, f"in run {num_runs}"


def test_ten_percent_more_time_are_found(emoji: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = PeerProcess.draw

    def slowed(self: PeerProcess, request: Any, num_images: int = 1, save: Path | None = None) -> Drawn:
        """What was measured, and a tenth more for the second bundle."""
        drawn = draw(self, request, num_images, save)
        factor = 1.1 if "/new/" in request.noise else 1.0
        return Drawn(
            image_ms=tuple(factor * ms for ms in drawn.image_ms),
            cpu_ms=tuple(factor * ms for ms in drawn.cpu_ms),
            timings_ms=tuple({name: factor * ms for name, ms in timings.items()} for timings in drawn.timings_ms),
            since_start_ms=drawn.since_start_ms,
        )

    monkeypatch.setattr(PeerProcess, "draw", slowed)
    (total,) = [line for line in compared(emoji).lines if line.stage == "total"]
    assert total.verdict == SLOWER

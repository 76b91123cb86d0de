"""The shipped model beside itself on this machine, whatever else that does: no false alarm, and a planted slow-down found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nitro_bench import side_by_side
from nitro_bench.peer import Drawn, PeerProcess
from nitro_rt.cli import main

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def emoji(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("emoji")
    patch = pytest.MonkeyPatch()
    with patch.context() as here:
        here.setenv("NITRO_RT_CACHE", str(folder / "cache"))
        assert main(["build", "--steps", "1", "--gate-prompts", "1", "--out", str(folder / "nitro-emoji-1step")]) == 0
    return folder / "nitro-emoji-1step"


@pytest.fixture(autouse=True)
def fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side_by_side, "NUM_PROCESSES", 3)
    monkeypatch.setattr(side_by_side, "NUM_PAIRS", 10)


def test_twenty_runs_of_the_same_bundle_raise_no_alarm(emoji: Path) -> None:
    alarms = []
    for _ in range(20):
        found = side_by_side.compare_bundles(emoji, emoji, 0.05, lambda line: None)
        alarms += found.slower
    assert not alarms


def test_ten_percent_more_time_are_found(emoji: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side_by_side, "NUM_PROCESSES", 5)
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
    found = side_by_side.compare_bundles(emoji, emoji, 0.05, lambda line: None)
    assert "total" in {line.stage for line in found.slower}

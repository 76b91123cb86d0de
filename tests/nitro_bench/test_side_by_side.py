"""Two bundles in turns, in processes of their own."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from hand_made import hand_made_bundle
from nitro_bench import side_by_side
from nitro_bench.compare import SLOWER
from nitro_bench.peer import Drawn, PeerProcess
from nitro_rt.errors import BundleError, ConfigError


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side_by_side, "NUM_PROCESSES", 2)
    monkeypatch.setattr(side_by_side, "NUM_PAIRS", 5)


@pytest.fixture
def other_bundle(little_bundle: Path, tmp_path: Path) -> Path:
    shutil.copytree(little_bundle, tmp_path / "other")
    return tmp_path / "other"


def test_every_common_subject_gets_a_line_per_stage(little_bundle: Path, other_bundle: Path) -> None:
    found = side_by_side.compare_bundles(little_bundle, other_bundle, 5.0, lambda line: None)
    assert {line.subject for line in found.lines} == {"other, 1 step, 32 px", "other, 2 steps, 32 px"}
    stages = [line.stage for line in found.lines if line.subject == "other, 1 step, 32 px"]
    assert set(stages) >= {"text", "denoise", "decode", "total"} and "cpu" not in stages
    for line in found.lines:
        assert line.old_ms > 0 and line.new_ms > 0 and line.wall.low <= line.wall.ratio <= line.wall.high
        assert (line.cpu is not None) == (line.stage == "total")


def test_a_slow_down_of_the_second_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = hand_made_bundle(tmp_path / "one-step", steps=(1,))
    draw = PeerProcess.draw

    def slowed(self: PeerProcess, request: Any, num_images: int = 1, save: Path | None = None) -> Drawn:
        """Whatever it really takes: 10 ms, and half as much again for the new bundle."""
        factor = 15.0 if "/new/" in request.noise else 10.0
        drawn = draw(self, request, num_images, save)
        timings = tuple({"text": factor, "total": 2 * factor} for _ in drawn.timings_ms)
        return Drawn(image_ms=(2 * factor,) * num_images, cpu_ms=(factor,) * num_images, timings_ms=timings, since_start_ms=0.0)

    monkeypatch.setattr(PeerProcess, "draw", slowed)
    found = side_by_side.compare_bundles(bundle, bundle, 0.05, lambda line: None)
    assert {line.verdict for line in found.lines} == {SLOWER}
    assert [line.wall.ratio for line in found.lines] == pytest.approx([1.5] * 2)


def test_bundles_of_different_shape_are_refused(little_bundle: Path, tmp_path: Path) -> None:
    other = hand_made_bundle(tmp_path / "larger", steps=(1,), size_px=48)
    with pytest.raises(
        ConfigError, match="nothing in common: the old one draws little, 1 step, 32 px, .* larger, 1 step, 48 px"
    ):
        side_by_side.compare_bundles(little_bundle, other, 0.05, lambda line: None)


def test_a_bundle_that_draws_something_else_is_not_compared(little_bundle: Path, spoilt_bundle: Path) -> None:
    with pytest.raises(BundleError, match="misses its quality limits"):
        side_by_side.compare_bundles(little_bundle, spoilt_bundle, 0.05, lambda line: None)


def test_bundles_that_do_not_fit_into_memory_together_are_refused(
    little_bundle: Path, other_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(side_by_side, "available_bytes", lambda: 2**20)
    with pytest.raises(ConfigError, match=r"do not fit into memory: .* 0\.0 GiB are available; write a report of each"):
        side_by_side.compare_bundles(little_bundle, other_bundle, 0.05, lambda line: None)

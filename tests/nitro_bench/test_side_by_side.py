"""Two bundles in turns, in processes of their own."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from hand_made import hand_made_bundle
from nitro_bench import side_by_side
from nitro_bench.compare import SLOWER, UNDECIDED, Line
from nitro_bench.peer import Drawn, PeerProcess
from nitro_bench.subject import Case
from nitro_rt.bundle import open_bundle
from nitro_rt.errors import BundleError, ConfigError


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side_by_side, "NUM_PROCESSES", 2)
    monkeypatch.setattr(side_by_side, "NUM_PAIRS", 5)
    monkeypatch.setattr(side_by_side, "MAX_LOOKS", 1)


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


@pytest.fixture
def taken(little_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Iterable[float]], tuple[Line, list[bool]]]:
    """A comparison whose pairs of processes have these ratios: its line, and which pairs began with the new bundle."""

    def compare(ratios: Iterable[float]) -> tuple[Line, list[bool]]:
        coming, orders = iter(ratios), []

        def unit(old: Case, new: Case, length: int, *, new_first: bool) -> list[side_by_side.Pair]:
            orders.append(new_first)
            return [({"total": 10.0, "cpu": 10.0}, dict.fromkeys(("total", "cpu"), 10.0 * next(coming)))]

        monkeypatch.setattr(side_by_side, "NUM_PROCESSES", 6)
        monkeypatch.setattr(side_by_side, "MAX_LOOKS", 3)
        monkeypatch.setattr(side_by_side, "_unit", unit)
        monkeypatch.setattr(side_by_side, "_verify", lambda case, report: (10.0, 0))
        monkeypatch.setattr(
            side_by_side, "_cases", lambda folder, work: {(): Case(bundle=open_bundle(folder), num_steps=1, batch=1, work=work)}
        )
        (line,) = side_by_side.compare_bundles(little_bundle, little_bundle, 0.05, lambda line: None).lines
        return line, orders

    return compare


def test_what_is_clear_takes_one_look_and_what_is_not_takes_more(taken: Any) -> None:
    """The first to start and to draw is not always the same bundle."""
    line, orders = taken([1.12, 1.13, 1.11, 1.12, 1.13, 1.11])
    assert line.verdict == SLOWER and orders == [False, True] * 3
    noisy = [1.00, 1.18, 1.06, 1.13, 1.02, 1.17]
    line, orders = taken(noisy * 3)
    assert line.verdict == SLOWER and len(orders) == 18
    line, orders = taken([0.85, 1.25] * 9)
    assert line.verdict == UNDECIDED and len(orders) == 18


def test_bundles_of_two_devices_are_refused(little_bundle: Path, other_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Case, "on_gpu", property(lambda case: case.bundle.folder == other_bundle))
    with pytest.raises(ConfigError, match="one of the bundles runs on a GPU and one on the processor"):
        side_by_side.compare_bundles(little_bundle, other_bundle, 0.05, lambda line: None)


def test_only_stages_that_both_have_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA graph holds as one what other executors tell apart."""
    bundle = hand_made_bundle(tmp_path / "one-step", steps=(1,))
    draw = PeerProcess.draw

    def as_graph(self: PeerProcess, request: Any, num_images: int = 1, save: Path | None = None) -> Drawn:
        drawn = draw(self, request, num_images, save)
        stages = {"device": 1.0} if "/new/" in request.noise else {"text": 0.5, "denoise": 0.5}
        return dataclasses.replace(drawn, timings_ms=tuple(stages | {"noise": 0.1} for _ in drawn.timings_ms))

    monkeypatch.setattr(PeerProcess, "draw", as_graph)
    found = side_by_side.compare_bundles(bundle, bundle, 5.0, lambda line: None)
    assert [line.stage for line in found.lines] == ["noise", "total"]


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

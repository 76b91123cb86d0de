"""Progress: bars on a terminal, plain and rare lines elsewhere."""

from __future__ import annotations

import io
import sys

import pytest

from nitro_rt.cli import output


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_lines_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    with output.progress("building") as report:
        report("text: [built]")
    assert capsys.readouterr().err == "text: [built]\n"


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with output.progress("building [all]") as report:
        report("text: [built]")
    assert "text: [built]" in terminal.getvalue() and "building [all]" in terminal.getvalue()


def test_stages_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with output.stage_progress() as report:
        for done in range(11):
            report("teacher", done, 10, {"loss": 0.25})
    assert "teacher" in terminal.getvalue() and "10/10" in terminal.getvalue() and "loss 0.25" in terminal.getvalue()


def test_stages_elsewhere_write_the_ends_and_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now_s)
    with output.stage_progress() as report:
        for done in range(61):
            now_s = float(done)
            report("teacher", done, 60, {})
        report("student", 0, 5, {"d": 1.0, "g": 2.0})
    assert capsys.readouterr().err.splitlines() == [
        "teacher: 0 of 60",
        "teacher: 30 of 60, 0:30 left",
        "teacher: 60 of 60",
        "student: 0 of 5 d 1, g 2",
    ]


def test_the_time_left_counts_from_where_a_resumed_stage_begins(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now_s)
    with output.stage_progress() as report:
        for done in (901, 902, 903):  # a minute and a half each
            report("student", done, 1000, {"d_loss": 2.0})
            now_s += 90.0
    assert capsys.readouterr().err.splitlines() == [
        "student: 901 of 1000 d_loss 2",
        "student: 902 of 1000, 2:27:00 left d_loss 2",
        "student: 903 of 1000, 2:25:30 left d_loss 2",
    ]


def test_steps_of_minutes_have_a_time_left_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 0.0
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    monkeypatch.setattr("rich.console.monotonic", lambda: now_s)
    with output.stage_progress() as report:
        for done in (901, 902, 903):
            report("student", done, 1000, {})
            now_s += 90.0
    assert "2:25:30" in terminal.getvalue()


def test_facts_are_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_facts([("a", 1), ("long", "x")])
    assert capsys.readouterr().out == "a     1\nlong  x\n"

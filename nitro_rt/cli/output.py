"""What the commands share: progress, JSON, and the pip line for a missing extra."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import click

from nitro_rt.errors import BackendUnavailable

StageReport = Callable[[str, int, int, Mapping[str, float]], None]
LINE_INTERVAL_S = 30.0

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")


def print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, default=str))


def print_facts(facts: Iterable[tuple[str, object]]) -> None:
    """Aligned `name  value` lines."""
    rows = [(name, str(value)) for name, value in facts]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        click.echo(f"{name:<{width}}  {value}")


@contextmanager
def progress(title: str) -> Iterator[Callable[[str], None]]:
    """A function that reports a line of progress, on stderr.

    On a terminal the lines scroll over a moving bar with the time so far; elsewhere they are plain lines.
    """
    if not sys.stderr.isatty():
        yield lambda line: click.echo(line, err=True)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(bar_width=20), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None)

        def report(line: str) -> None:
            bar.console.print(line, markup=False, highlight=False)
            bar.update(task, description=title)

        yield report


@contextmanager
def stage_progress() -> Iterator[StageReport]:
    """A function that reports (stage, steps done, steps in all, losses) as often as it likes, on stderr.

    On a terminal each stage is a bar; elsewhere a line is written when a stage begins or ends and every half minute. Both
    say how long the stage still takes.
    """
    if not sys.stderr.isatty():
        yield _stage_lines()
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TaskID,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[losses]}", markup=False),
    )
    tasks: dict[str, TaskID] = {}
    # over the usual 30 s the speed of steps that take longer than that would never be known
    with Progress(*columns, console=Console(stderr=True), speed_estimate_period=1800.0) as bars:

        def report(stage: str, done: int, total: int, losses: Mapping[str, float]) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total, losses="")
            bars.update(tasks[stage], completed=done, losses=_losses(losses))

        yield report


def _stage_lines() -> StageReport:
    current, last_s = "", 0.0
    begun_at, begun_s = 0, 0.0

    def report(stage: str, done: int, total: int, losses: Mapping[str, float]) -> None:
        nonlocal current, last_s, begun_at, begun_s
        now_s = time.monotonic()
        if stage == current and done != total and now_s - last_s < LINE_INTERVAL_S:
            return
        if stage != current:
            begun_at, begun_s = done, now_s
        current, last_s = stage, now_s
        left = f", {_duration(left_s)} left" if (left_s := _left_s(done, total, begun_at, now_s - begun_s)) else ""
        click.echo(f"{stage}: {done} of {total}{left} {_losses(losses)}".rstrip(), err=True)

    return report


def _left_s(done: int, total: int, begun_at: int, passed_s: float) -> float:
    """Seconds that are left at the speed so far; 0 where it is not known yet."""
    return (total - done) * passed_s / (done - begun_at) if done > begun_at else 0.0


def _duration(seconds: float) -> str:
    """As in "2:05:09" or "5:09"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _losses(losses: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in losses.items())


@contextmanager
def needs_extra(extra: str) -> Iterator[None]:
    """Turn a missing third-party package into the pip line that brings it. Our own missing modules stay bugs."""
    try:
        yield
    except ModuleNotFoundError as exc:
        missing = (exc.name or "").partition(".")[0]
        if not missing or missing.startswith("nitro_"):
            raise
        raise BackendUnavailable(f"this needs the package {missing}, which is not installed; {pip_line(extra)}") from exc


def pip_line(extra: str) -> str:
    return f"pip install 'nitro-rt[{extra}]'"

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

    On a terminal each stage is a bar; elsewhere a line is written when a stage begins or ends and every half minute.
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
    with Progress(*columns, console=Console(stderr=True)) as bars:

        def report(stage: str, done: int, total: int, losses: Mapping[str, float]) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total, losses="")
            bars.update(tasks[stage], completed=done, losses=_losses(losses))

        yield report


def _stage_lines() -> StageReport:
    current, last_s = "", 0.0

    def report(stage: str, done: int, total: int, losses: Mapping[str, float]) -> None:
        nonlocal current, last_s
        now_s = time.monotonic()
        if stage == current and done != total and now_s - last_s < LINE_INTERVAL_S:
            return
        current, last_s = stage, now_s
        click.echo(f"{stage}: {done} of {total} {_losses(losses)}".rstrip(), err=True)

    return report


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

"""`nitro-rt bench-compare`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click

from nitro_rt.cli.interrupt import tidy_when_ended
from nitro_rt.cli.output import json_option, needs_extra, print_json, progress
from nitro_rt.errors import ConfigError


def share(text: str) -> float:
    """5% or 0.05."""
    try:
        value = float(text.strip().removesuffix("%")) / (100 if text.strip().endswith("%") else 1)
    except ValueError as exc:
        raise click.BadParameter(f"{text!r} is no share, such as 5% or 0.05") from exc
    if not 0 < value < 1:
        raise click.BadParameter(f"{text!r} is not between 0% and 100%")
    return value


@click.command(name="bench-compare")
@click.argument("old", type=click.Path(path_type=Path))
@click.argument("new", type=click.Path(path_type=Path))
@click.option(
    "--max-slowdown", type=share, metavar="SHARE", default="5%", show_default=True, help="What a stage may become slower."
)
@json_option
def command(old: Path, new: Path, max_slowdown: float, as_json: bool) -> int:
    """Say whether NEW is slower than OLD; exit code 1 if it is.

    Both are reports (the JSON of nitro-rt bench) of one machine, or both are bundles: these are then timed in turns, which
    tells smaller changes on a machine that is not idle.
    """
    with needs_extra("bench"), tidy_when_ended():
        from nitro_bench.compare import compare, read_report, sentences
        from nitro_bench.side_by_side import compare_bundles

        if old.is_dir() != new.is_dir():
            raise ConfigError(f"{old} and {new}: one is a folder, one is not; give two reports (JSON) or two bundles")
        if old.is_dir():
            with progress("timing in turns") as report:
                found = compare_bundles(old, new, max_slowdown, report)
        else:
            found = compare(read_report(old), read_report(new), max_slowdown)
        if as_json:
            print_json(dataclasses.asdict(found) | {"regression": bool(found.slower)})
        else:
            for line in sentences(found):
                click.echo(line)
    return 1 if found.slower else 0

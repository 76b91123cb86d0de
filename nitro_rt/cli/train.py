"""`nitro-rt train`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import click

from nitro_rt.cli.output import StageReport, needs_extra, stage_progress

_SHOWN = ("psnr_db", "loss", "regression_loss", "d_loss", "g_loss", "regression")
"""Of each step's numbers, those that fit into a line; the log and TensorBoard have all."""


@click.command(name="train")
@click.argument("recipe", type=click.Path(path_type=Path), metavar="RECIPE.toml")
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR", help="Where the run and its checkpoint go.")
@click.option("--max-steps", type=click.IntRange(min=1), help="Stop after this many optimiser steps of each part.")
@click.option("--resume", is_flag=True, help="Go on with a run that was stopped.")
@click.option("--allow-changed", is_flag=True, help="Go on although the recipe has changed since (with --resume).")
@click.option("--dry-run", is_flag=True, help="Say what would be trained, and do nothing.")
def command(recipe: Path, out: Path | None, max_steps: int | None, resume: bool, allow_changed: bool, dry_run: bool) -> None:
    """Train a model as RECIPE.toml says. The folder of the result is the last line printed.

    Under `accelerate launch` the first process speaks for all.
    """
    with needs_extra("train"):
        import nitro_training

        if dry_run:
            if _is_first_process():
                click.echo(nitro_training.describe(recipe, max_steps))
            return
        with _progress() as report:
            folder = nitro_training.train(
                recipe, out=out, max_steps=max_steps, resume=resume, allow_changed=allow_changed, report=report
            )
    if _is_first_process():
        click.echo(folder)


@contextmanager
def _progress() -> Iterator[StageReport]:
    if not _is_first_process():
        yield lambda stage, done, total, losses: None
        return
    with stage_progress() as show:

        def report(stage: str, done: int, total: int, losses: Mapping[str, float]) -> None:
            show(stage, done, total, {name: losses[name] for name in _SHOWN if name in losses})

        yield report


def _is_first_process() -> bool:
    """As accelerate's launcher tells it: known before torch is loaded."""
    return int(os.environ.get("RANK", "0")) == 0

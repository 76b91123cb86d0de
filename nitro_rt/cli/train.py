"""`nitro-rt train`."""

from __future__ import annotations

from pathlib import Path

import click

from nitro_rt.cli.output import needs_extra, stage_progress


@click.command(name="train")
@click.argument("recipe", type=click.Path(path_type=Path), metavar="RECIPE.toml")
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR", help="Where the run and its checkpoint go.")
@click.option("--max-steps", type=click.IntRange(min=1), help="Stop after this many optimiser steps of each part.")
@click.option("--resume", is_flag=True, help="Go on with a run that was stopped.")
@click.option("--dry-run", is_flag=True, help="Say what would be trained, and do nothing.")
def command(recipe: Path, out: Path | None, max_steps: int | None, resume: bool, dry_run: bool) -> None:
    """Train a model as RECIPE.toml says. The folder of the result is the last line printed."""
    with needs_extra("train"):
        import nitro_training

        with stage_progress() as report:
            folder = nitro_training.train(recipe, out=out, max_steps=max_steps, resume=resume, dry_run=dry_run, report=report)
    click.echo(folder)

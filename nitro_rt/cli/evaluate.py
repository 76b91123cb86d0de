"""`nitro-rt evaluate`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nitro_rt.cli.build import parse_counts
from nitro_rt.cli.output import json_option, needs_extra, print_json, stage_progress
from nitro_rt.errors import ConfigError

if TYPE_CHECKING:
    from nitro_training.bootstrap import Interval
    from nitro_training.evaluation import Evaluation, Row

TITLES = {
    "retrieval_top1": "top-1",
    "retrieval_top5": "top-5",
    "colour": "colour",
    "frechet": "Frechet",
    "patch_frechet": "patch Frechet",
    "frechet_to_teacher": "to teacher",
    "patch_frechet_to_teacher": "patch, to teacher",
}
"""Score -> its heading, in the table's order."""


# The defaults are nitro_training.evaluation's: an option that is not given is not passed on, and a test compares.
@click.command(name="evaluate")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--teacher", type=click.Path(path_type=Path), metavar="DIR", help="The teacher's checkpoint: adds ratios to it.")
@click.option("--steps", callback=parse_counts, show_default="1,2,4", metavar="N[,N...]", help="Step counts, each 1 to 4.")
@click.option("--num-images", type=int, show_default="640", help="Images per column, half of them of held-out pairs.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), show_default="0", help="Of prompts, noise and intervals.")
@click.option("--metric", type=click.Path(path_type=Path), metavar="DIR", help="The judge; the repository's if not given.")
@click.option("--data", type=click.Path(path_type=Path), metavar="DIR", help="The judge's data set: adds rows of real images.")
@json_option
@click.option("-o", "--out", type=click.Path(path_type=Path), metavar="FILE", help="Write the JSON document there too.")
def command(*, checkpoint: Path, out: Path | None, as_json: bool, **options: Any) -> None:
    """Score the model at CHECKPOINT, per step count, with 95 % bootstrap intervals. An engine bundle draws from the same
    noise as its checkpoint, so that its scores can be compared with the checkpoint's.

    \b
    top-1, top-5   share of images of held-out (colour, concept) pairs whose pair is found among all pairs
    colour         share of the same images whose most frequent colour is the one asked for
    Frechet        distance between the features of drawn and real images; lower is better

    The scores are in-domain, by a judge trained on the emoji data set: the distance is no FID. See docs/evaluation.md.
    """
    if out is not None:
        _require_place(out)
    with needs_extra("train"):
        from nitro_training.evaluation import evaluate

        with stage_progress() as report:
            given = {name: value for name, value in options.items() if value is not None}
            evaluation = evaluate(checkpoint, report=report, **given)
    if out is not None:
        _write(out, evaluation.as_dict())
    if as_json:
        print_json(evaluation.as_dict())
    else:
        click.echo("\n".join(lines(evaluation)))


def lines(evaluation: Evaluation) -> Iterator[str]:
    """The tables: scores, then ratios to the teacher, then differences to the fewest steps."""
    yield (
        f"{evaluation.num_pair_images} images of held-out pairs among {evaluation.num_candidates} pairs, "
        f"{evaluation.num_caption_images} of captions; {evaluation.level:.0%} intervals, seed {evaluation.seed}"
    )
    yield from _table("", {row.name: row.scores for row in evaluation.rows})
    students = [row for row in evaluation.rows if row.kind == "student"]
    yield from _table("to the teacher's", _said(students, "ratios_to_teacher"))
    yield from _table(f"against {students[0].name}", _said(students, "changes"), sign="+")


def _said(rows: list[Row], part: str) -> dict[str, Mapping[str, Interval | None]]:
    return {row.name: getattr(row, part) for row in rows if getattr(row, part)}


def _table(title: str, rows: Mapping[str, Mapping[str, Interval | None]], sign: str = "") -> Iterator[str]:
    if not rows:
        return
    keys = [key for key in TITLES if any(key in row for row in rows.values())]
    cells = [[title, *(TITLES[key] for key in keys)]]
    cells += [[name, *(_cell(row[key], sign) if key in row else "" for key in keys)] for name, row in rows.items()]
    widths = [max(len(row[column]) for row in cells) for column in range(len(keys) + 1)]
    yield ""
    for row in cells:
        yield "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()


def _cell(found: Interval | None, sign: str) -> str:
    if found is None:
        return "teacher has 0"
    return f"{found.value:{sign}.3f} [{found.low:{sign}.3f}, {found.high:{sign}.3f}]"


def _require_place(path: Path) -> None:
    """Refuse before the minutes of drawing, not after."""
    if path.is_dir() or not path.absolute().parent.is_dir() or not os.access(path.absolute().parent, os.W_OK):
        raise ConfigError(f"-o {path} cannot be written: it is a folder, or its folder is not there or read-only")


def _write(path: Path, value: Any) -> None:
    temporary = path.with_name(f".{path.name}.partial")
    try:
        temporary.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    except OSError as exc:
        temporary.unlink(missing_ok=True)
        raise ConfigError(f"-o {path} cannot be written: {exc.strerror}") from exc

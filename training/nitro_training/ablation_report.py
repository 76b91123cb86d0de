"""The tables of the ablation."""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nitro_rt.errors import ConfigError
from nitro_training.ablation_result import Result

BEGIN, END = "<!-- ablation: begin -->", "<!-- ablation: end -->"
FULL = "full"


@dataclass(frozen=True)
class Column:
    """A score as the tables show it."""

    key: str
    title: str
    factor: float
    digits: int

    def show(self, value: float, sign: str = "") -> str:
        return f"{self.factor * value:{sign}.{self.digits}f}"


COLUMNS = (
    Column("frechet_to_teacher", "Frechet distance to the teacher, lower is better", 1.0, 3),
    Column("patch_frechet_to_teacher", "of patches, lower is better", 1.0, 3),
    Column("retrieval_top1", "retrieval top-1, %, higher is better", 100.0, 1),
    Column("colour", "colour, %, higher is better", 100.0, 1),
)


def markdown(results: Sequence[Result], titles: Mapping[str, str]) -> str:
    """The tables: means over the seeds with their spread, then the change against the full method, seed by seed.

    Args:
        titles: of the variants, in order.
    """
    by_name = {name: [result for result in results if result.name == name] for name in ("teacher", "init", *titles)}
    full = by_name[FULL]
    scores = [column.title for column in COLUMNS]
    rows = [_row("the teacher itself, other noise", by_name["teacher"]), _row("before: the one-step weights", by_name["init"])]
    rows += [_row(title, by_name[name]) for name, title in titles.items()]
    changes = [_change(title, by_name[name], full) for name, title in titles.items() if name != FULL]
    return f"""Mean of {len(full)} seeds ± standard deviation (smallest to largest). {_budget(full[0])}

{_table(["", "heads", "s per step", *scores], rows)}

Change against the full method with the same seed: mean (smallest to largest).

{_table(["", *scores], changes)}

{_made_with(full[0])}"""


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _row(title: str, results: Sequence[Result]) -> list[str]:
    cells = [title, str(results[0].about.get("num_heads", "")), _time(results)]
    return cells + [_spread(column, results) for column in COLUMNS]


def _time(results: Sequence[Result]) -> str:
    times = [result.about["step_s"] for result in results if "step_s" in result.about]
    return f"{statistics.median(times):.2f}" if times else ""


def _spread(column: Column, results: Sequence[Result]) -> str:
    values = [result.scores[column.key] for result in results]
    if len(values) == 1:
        return column.show(values[0])
    spread = f"{column.show(min(values))} to {column.show(max(values))}"
    return f"{column.show(statistics.mean(values))} ± {column.show(statistics.stdev(values))} ({spread})"


def _change(title: str, results: Sequence[Result], full: Sequence[Result]) -> list[str]:
    base = {result.seed: result.scores for result in full}
    cells = [title]
    for column in COLUMNS:
        changes = [result.scores[column.key] - base[result.seed][column.key] for result in results]
        spread = f" ({column.show(min(changes), '+')} to {column.show(max(changes), '+')})" if len(changes) > 1 else ""
        cells.append(column.show(statistics.mean(changes), "+") + spread)
    return cells


def _budget(result: Result) -> str:
    student, samples = result.key["student"], result.key["samples"]
    batch = student["batch"] * student["accumulation"]
    return (
        f"Every run: {result.about['num_steps']} optimiser steps of {batch} samples, from the same weights, among the same "
        f"{samples['cache_samples'] or 'freshly drawn'} samples of the teacher ({samples['num_steps']} steps). "
        f"Scored: {result.key['num_images']} one-step images, half of held-out pairs (retrieval, colour), half of captions "
        "(distances)."
    )


def _made_with(result: Result) -> str:
    about = result.about
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    return f"Made on {about['date']} with {versions}, Python {about['python']}, {about['num_threads']} CPU threads."


def require_marks(page: Path) -> None:
    """Raises: ConfigError if the page has no place for the tables."""
    _split(page)


def put_into(page: Path, tables: str) -> None:
    """Replace what stands between the page's two marks, by one rename."""
    before, after = _split(page)
    temporary = page.with_suffix(".partial")
    temporary.write_text(f"{before}{BEGIN}\n{tables}\n{END}{after}", encoding="utf-8")
    os.replace(temporary, page)


def _split(page: Path) -> tuple[str, str]:
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ConfigError(f"{page} has no lines {BEGIN} and {END} between which the tables go; add them where they belong")
    return before, after

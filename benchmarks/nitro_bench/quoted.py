"""Figures that a page quotes from committed reports: each stands between two comments that say where it comes from.

<!-- from benchmarks/reports/x.json: subjects/0/ratio .2f -->0.42<!-- end -->

python -m nitro_bench.quoted README.md            exit code 1 if one differs from its report
python -m nitro_bench.quoted README.md --write    put what the reports say
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from nitro_rt.errors import ConfigError, NitroError

QUOTE = re.compile(r"(<!-- from (\S+\.json): (\S+) (\S+) -->)(.*?)(<!-- end -->)")


def checked(page: str, root: Path) -> tuple[str, list[str]]:
    """The page as its reports have it, and a sentence for every figure that differs.

    Args:
        root: the folder that the reports' paths start from.
    Raises: ConfigError for a report, place or format that does not exist.
    """
    differing: list[str] = []

    def replaced(match: re.Match[str]) -> str:
        begin, report, place, form, found, end = match.groups()
        expected = figure(root / report, place, form)
        if found != expected:
            differing.append(f"{report}: {place} is {expected}, the page says {found or 'nothing'}")
        return begin + expected + end

    return QUOTE.sub(replaced, page), differing


def figure(report: Path, place: str, form: str) -> str:
    """A number of a report, formatted.

    Args:
        place: names and indices with slashes between: `subjects/0/total/p50_ms`.
        form: Python's format of a number: `.2f`, `,.0f`, `.0%`.
    """
    try:
        value: Any = json.loads(report.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise ConfigError(f"{report} cannot be read: {exc}; make the report again, or quote another") from exc
    for name in place.split("/"):
        try:
            value = value[int(name)] if isinstance(value, list) else value[name]
        except (KeyError, IndexError, ValueError, TypeError):
            has = (
                ", ".join(map(str, value))
                if isinstance(value, dict)
                else f"{len(value)} entries"
                if isinstance(value, list)
                else value
            )
            raise ConfigError(f"{report} has no {place}: at {name!r} there is {has}") from None
    try:
        return format(value, form)
    except (ValueError, TypeError) as exc:
        raise ConfigError(f"{report}: {place} is {value!r}, which cannot be written as {form!r}: {exc}") from exc


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m nitro_bench.quoted", description=__doc__)
    parser.add_argument("pages", type=Path, nargs="+")
    parser.add_argument("--write", action="store_true", help="mend the pages instead of complaining")
    options = parser.parse_args(arguments)
    status = 0
    try:
        for page in options.pages:
            text = page.read_text(encoding="utf-8")
            mended, differing = checked(text, page.parent)
            if options.write and mended != text:
                page.write_text(mended, encoding="utf-8")
            for sentence in differing:
                print(f"{page}: {sentence}", file=sys.stderr)
            if differing and not options.write:
                status = 1
    except NitroError as exc:
        print(f"nitro_bench.quoted: {exc}", file=sys.stderr)
        return 1
    return status


if __name__ == "__main__":
    sys.exit(main())

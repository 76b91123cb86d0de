"""`nitro-rt cache`."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import TYPE_CHECKING, Any

import click

from nitro_rt.cli.output import json_option, needs_extra, print_json

if TYPE_CHECKING:
    from nitro_engines.inventory import Item
    from nitro_engines.prune import Pruned

SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
BYTES = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}
LISTED = ("engine", "graphs", "model")
"""Kinds with a line for each; of the others there are many, and small ones."""


def parse_age(_: click.Context, __: click.Parameter, value: str | None) -> float | None:
    """30d -> 2592000.0 seconds."""
    return None if value is None else _number(value, SECONDS, "an age such as 30d, 12h or 2w")


def parse_bytes(_: click.Context, __: click.Parameter, value: str | None) -> int | None:
    """20GB -> 20000000000."""
    return None if value is None else int(_number(value.upper(), BYTES, "a size such as 20GB, 500MB or 16GiB"))


def _number(text: str, units: dict[str, int], expected: str) -> float:
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", text)
    if found is None or found[2] not in units:
        raise click.BadParameter(f"{text!r} is not {expected}")
    return float(found[1]) * units[found[2]]


@click.group(name="cache", invoke_without_command=True)
@json_option
@click.pass_context
def command(context: click.Context, as_json: bool) -> None:
    """List what is cached, or prune it.

    Engines, graphs, assembled checkpoints, reference pictures and records of what was measured. NITRO_RT_CACHE says where.
    """
    if context.invoked_subcommand is not None:
        return
    with needs_extra("export"):
        from nitro_engines import EngineCache
        from nitro_engines.inventory import inventory, unique_bytes, unnamed_files

        cache = EngineCache()
        items = inventory(cache)
        files = unnamed_files(cache, items)
        total = unique_bytes([*(path for item in items for path in item.paths), *files])
    if as_json:
        facts = {"root": cache.root, "num_bytes": total, "unnamed_files": len(files), "items": list(map(_facts, items))}
        print_json(facts)
        return
    click.echo("\n".join(_lines(items, time.time())))
    if files:
        click.echo(f"{len(files)} unnamed files, {_size(unique_bytes(files))}: nitro-rt cache prune removes them")
    click.echo(f"{cache.root}: {_size(total)}, what is shared counted once")


@command.command(name="prune")
@click.option(
    "--older-than", "older_than_s", callback=parse_age, metavar="AGE", help="What was not used for so long: 30d, 12h."
)
@click.option(
    "--max-size",
    "max_bytes",
    callback=parse_bytes,
    metavar="SIZE",
    help="The longest unused until the rest has no more than this: 20GB.",
)
@click.option("--dry-run", is_flag=True, help="Say what would go, and remove nothing.")
@json_option
def prune_command(older_than_s: float | None, max_bytes: int | None, dry_run: bool, as_json: bool) -> None:
    """Remove what was not used for long, or what is too much, and files that nothing names.

    Bundles keep their files: they have names of their own for them. What a build at work uses stays.
    """
    with needs_extra("export"):
        from nitro_engines import EngineCache
        from nitro_engines.prune import prune

        pruned = prune(
            EngineCache(),
            older_than_s=older_than_s,
            max_bytes=max_bytes,
            dry_run=dry_run,
            report=lambda line: click.echo(line, err=True),
        )
    if as_json:
        facts = {"removed": list(map(_facts, pruned.items)), "unnamed_files": len(pruned.files), "busy": pruned.busy}
        print_json(facts | {"freed_bytes": pruned.freed_bytes, "kept_bytes": pruned.kept_bytes, "dry_run": dry_run})
    else:
        click.echo("\n".join(_summary(pruned, dry_run)))


def _summary(pruned: Pruned, dry_run: bool) -> Iterator[str]:
    yield from _lines(pruned.items, time.time())
    yield from (f"stays: {what}" for what in pruned.busy)
    verb = "would be removed" if dry_run else "removed"
    things = f"{len(pruned.items)} things, and {len(pruned.files)} files that nothing else names"
    yield f"{verb}: {things}; {_size(pruned.freed_bytes)} freed, {_size(pruned.kept_bytes)} left in the cache"


def _lines(items: Iterable[Item], now: float) -> Iterator[str]:
    """A row per thing; small ones of a kind together."""
    rows = [("what", "", "size", "age", "last use")]
    by_kind = sorted(items, key=lambda item: (item.kind not in LISTED, item.kind, item.used_at))
    for kind, group in groupby(by_kind, key=lambda item: item.kind):
        found = list(group)
        if kind in LISTED:
            rows += [(kind, item.what, _size(item.num_bytes), _age(now - item.made_at), _last(item, now)) for item in found]
        else:
            num_bytes, made_at = sum(item.num_bytes for item in found), min(item.made_at for item in found)
            rows.append((kind, f"{len(found)} of them", _size(num_bytes), _age(now - made_at), _last(found[-1], now)))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    for row in rows if len(rows) > 1 else ():
        cells = [cell.rjust(w) if c == 2 else cell.ljust(w) for c, (cell, w) in enumerate(zip(row, widths, strict=True))]
        yield "  ".join(cells).rstrip()


def _facts(item: Item) -> dict[str, Any]:
    names = ("kind", "key", "what", "num_bytes", "made_at", "used_at")
    return {name: getattr(item, name) for name in names}


def _last(item: Item, now: float) -> str:
    return _age(now - item.used_at) if item.used_at else "never"


def _age(seconds: float) -> str:
    """3 h, 12 d."""
    unit, length = next(
        ((unit, length) for unit, length in (("d", 86_400), ("h", 3600), ("min", 60)) if seconds >= length), ("s", 1)
    )
    return f"{max(0, int(seconds // length))} {unit}"


def _size(num_bytes: int) -> str:
    unit, length = next(
        ((unit, length) for unit, length in (("GiB", 1 << 30), ("MiB", 1 << 20)) if num_bytes >= length), ("KiB", 1 << 10)
    )
    return f"{num_bytes / length:.1f} {unit}"

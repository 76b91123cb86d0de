"""What is in the cache: each thing with its files, its age and its last use, and the files that nothing names."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nitro_engines.assemble import RECORD
from nitro_engines.cache import EngineCache
from nitro_engines.history import TIMINGS
from nitro_rt.errors import BundleError
from nitro_rt.manifest import EXPORT_FILE, FileRef

RECORDS = ("recipes", "gates", "speeds", "builds", "durations", TIMINGS)
"""Folders of small JSON records, beside those of engines and references."""
DAMAGED = "damaged"
"""What a thing is whose record cannot be read: nobody finds it any more."""
_KEY = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class Item:
    """One thing that is kept as a whole, and goes as a whole."""

    kind: str
    """engine, graphs, model, reference, or the kind of a record: recipes, gates, ..."""
    key: str
    lock: str
    """Who makes or removes it holds this lock of the cache."""
    what: str
    head: Path
    """Its record: the file whose time is its last use. Without it, it does not exist."""
    paths: tuple[Path, ...]
    """Everything of it: files that it may share with other items, and folders that are its own."""
    num_bytes: int
    made_at: float
    """Seconds since 1970."""
    used_at: float


def inventory(cache: EngineCache) -> list[Item]:
    """Everything in the cache, the longest unused first. What cannot be read is in it, too, as damaged."""
    found = [*_engines(cache), *_graphs(cache), *_models(cache), *_references(cache), *_records(cache)]
    return sorted(found, key=lambda item: (item.used_at, item.kind, item.key))


def unnamed_files(cache: EngineCache, items: Iterable[Item]) -> list[Path]:
    """Files of engines that none of `items` names: of entries that are gone, of builds that were cut, tokenizers."""
    named = {path for item in items for path in item.paths}
    return [path for path in _listed(cache.engines / "files") if path not in named]


def contents(paths: Iterable[Path]) -> dict[tuple[int, int], os.stat_result]:
    """Every content of files and of all that is in folders, by its number on disk, however many names it has."""
    return {(facts.st_dev, facts.st_ino): facts for facts in _facts(paths)}


def unique_bytes(paths: Iterable[Path]) -> int:
    return sum(facts.st_size for facts in contents(paths).values())


def files_in(path: Path) -> Iterator[Path]:
    """The file itself, or the files of a folder at any depth."""
    if path.is_dir() and not path.is_symlink():
        for folder, _, names in os.walk(path):
            yield from (Path(folder) / name for name in names)
    else:
        yield path


def _engines(cache: EngineCache) -> Iterator[Item]:
    for head, record in _json(cache.engines / "entries"):
        engine = record.get("engine") or {}
        files = _paths(cache, engine.get("files") or ())
        fields = record.get("fields") or {}
        target = fields.get("target") or {}
        made_for = target.get("targets") or target.get("device") or ""
        what = f"{fields.get('stage')}, {engine.get('precision')}, {engine.get('backend')} {made_for}".strip()
        yield _item("engine", head, what if files else DAMAGED, (head, *files))


def _graphs(cache: EngineCache) -> Iterator[Item]:
    for folder in _folders(cache.graphs):
        record = _read(folder / EXPORT_FILE)
        source, steps = record.get("source") or {}, ",".join(sorted(record.get("denoise") or {}))
        what = f"{source.get('name')} at {record.get('size_px')} px, steps {steps}, {record.get('precision')}"
        yield _item("graphs", folder / EXPORT_FILE, what if source else DAMAGED, (folder,), key=folder.name)


def _models(cache: EngineCache) -> Iterator[Item]:
    """Assembled checkpoints only: other folders there, and files, are the user's."""
    for folder in _folders(cache.root / "models"):
        head = folder / RECORD
        if head.is_file():
            what = str(_read(head).get("what", DAMAGED))
            yield _item("model", head, what, (folder,), key=folder.name, lock=f"model-{folder.name}")


def _references(cache: EngineCache) -> Iterator[Item]:
    for head, record in _json(cache.root / "references"):
        files = _paths(cache, [record.get("file") or {}])
        fields = record.get("fields") or {}
        what = f"{fields.get('prompt')!r} at {fields.get('size_px')} px" if files else DAMAGED
        yield _item("reference", head, what, (head, *files))


def _records(cache: EngineCache) -> Iterator[Item]:
    for kind in RECORDS:
        for head, record in _json(cache.root / kind):
            files = _paths(cache, [record.get("file") or {}]) if kind == TIMINGS else []
            yield _item(kind, head, "", (head, *files))


def _item(kind: str, head: Path, what: str, paths: tuple[Path, ...], *, key: str = "", lock: str = "") -> Item:
    found = contents(paths).values()
    try:
        used_at = head.stat().st_mtime
    except OSError:  # its record is gone: it is of no use to anybody
        used_at = 0.0
    key = key or head.stem
    return Item(
        kind=kind,
        key=key,
        lock=lock or key,
        what=what,
        head=head,
        paths=paths,
        num_bytes=sum(facts.st_size for facts in found),
        made_at=min((facts.st_mtime for facts in found), default=used_at),
        used_at=used_at,
    )


def _paths(cache: EngineCache, references: Iterable[Mapping[str, Any]]) -> list[Path]:
    """Where the named files are; what an edited record names outside is left out."""
    found = []
    for reference in references:
        with contextlib.suppress(BundleError, TypeError):
            found.append(cache.path(FileRef(**reference)))
    return found


def _json(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    for path in _listed(folder):
        if path.suffix == ".json":
            yield path, _read(path)


def _read(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _folders(parent: Path) -> list[Path]:
    """Those whose names are keys."""
    return [path for path in _listed(parent) if _KEY.fullmatch(path.name) and path.is_dir()]


def _listed(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _facts(paths: Iterable[Path]) -> Iterator[os.stat_result]:
    for path in paths:
        for file in files_in(path):
            with contextlib.suppress(OSError):
                yield file.stat(follow_symlinks=False)

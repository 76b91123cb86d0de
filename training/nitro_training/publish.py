"""A result that is either whole or absent: written under a hidden name beside its place, then renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from nitro_rt.errors import ConfigError, TrainingError

MARK = "model_index.json"
"""A folder with this file in it is a checkpoint; no other folder is ever replaced."""


def require_free(out: Path, *, force: bool, inputs: tuple[Path, ...]) -> Path:
    """`out` as an absolute path, after making sure that a result may be put there.

    Args:
        force: replace a file, or a checkpoint folder, that is there.
        inputs: what the result is made of, which it must not replace.
    Raises: ConfigError.
    """
    place = Path(os.path.abspath(out.expanduser()))
    if not place.name:
        raise ConfigError(f"{out} is no place for a result; choose another --out")
    real = place.resolve()
    for path in inputs:
        used = path.resolve()
        if real == used or real in used.parents or used in real.parents:
            raise ConfigError(f"--out {out} overlaps with the input {path}; choose another --out")
    if not os.path.lexists(place):
        return place
    if place.is_dir() and not (place / MARK).is_file() and any(place.iterdir()):
        raise ConfigError(f"{out} is a folder without {MARK}, so no checkpoint; it is not replaced, choose another --out")
    if not force:
        raise ConfigError(f"{out} is already there; add --force to replace it, or choose another --out")
    return place


@contextmanager
def published(out: Path, *, num_bytes: int = 0) -> Iterator[Path]:
    """Yields the hidden path to write a file or a folder at; when the block ends well, that stands at `out`.

    Args:
        out: from `require_free`.
        num_bytes: about what will be written, to refuse before the work where there is no room.
    Raises: TrainingError if it cannot be written; what was at `out` is then still there, and nothing half-written is left.
    """
    lock = out.with_name(f".{out.name}.lock")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(lock, timeout=0):
            try:
                yield from _whole(out, num_bytes)
            finally:
                lock.unlink(missing_ok=True)
    except Timeout as exc:
        raise TrainingError(f"another process is writing {out}; wait for it or choose another --out") from exc
    except OSError as exc:
        reason = exc.strerror or exc
        raise TrainingError(
            f"cannot write {out}: {reason}; {_free(out)} bytes are free there, what was there before is kept; "
            "free some space, or choose another --out"
        ) from exc


def _whole(out: Path, num_bytes: int) -> Iterator[Path]:
    hidden, old = out.with_name(f".{out.name}.partial"), out.with_name(f".{out.name}.old")
    _put_back(old, out)  # a process was killed between the two renames
    if num_bytes > _free(out):
        raise TrainingError(
            f"{out} needs {num_bytes} bytes, {_free(out)} are free there; free some space, or choose another --out"
        )
    _remove(hidden)
    try:
        yield hidden
        if hidden.is_dir() and os.path.lexists(out):
            os.replace(out, old)  # a folder cannot take a folder's place in one rename
        os.replace(hidden, out)
    finally:
        _remove(hidden)
        _put_back(old, out)


def _put_back(old: Path, out: Path) -> None:
    """`old` becomes `out` again where nothing took its place, and goes where something did."""
    if not os.path.lexists(old):
        return
    if os.path.lexists(out):
        _remove(old)
    else:
        os.replace(old, out)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _free(path: Path) -> int:
    existing = next(parent for parent in path.parents if parent.exists())
    return shutil.disk_usage(existing).free

"""Publishing a bundle: assembled in a hidden sibling, made visible by one rename, recovered after a kill.

Beside `<name>` these may lie while a build publishes, all hidden and all owned by whoever holds the lock:

    .<name>.nitro-lock     the lock
    .<name>.nitro-new      being assembled
    .<name>.nitro-old      the bundle that is being replaced; put back if its successor never arrived
    .<name>.nitro-trash    being deleted
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from nitro_engines.files import Report, fsync, link_or_copy, locked, silent, storage_errors, write_durably
from nitro_rt.bundle import Bundle
from nitro_rt.errors import BuildError, BundleError
from nitro_rt.manifest import BUNDLE_FILE, BundleManifest, Engine, FileRef, check_file, resolve, to_json

_CONTENT_NAME = re.compile(r"files/[0-9a-f]{64}(\.[A-Za-z0-9]+)?")


def files_of(manifest: BundleManifest) -> tuple[FileRef, ...]:
    """Every file that a bundle names, once each, by path."""
    return _nowhere(manifest).files()


def engines_of(manifest: BundleManifest) -> Iterator[tuple[str, Engine]]:
    """Every engine of a bundle with its stage: `text`, `denoise/1`, ..., `decode`, `decode@1024`."""
    return _nowhere(manifest).engines()


def _nowhere(manifest: BundleManifest) -> Bundle:
    """A bundle that is not written yet, for what its manifest alone tells."""
    return Bundle(folder=Path(), manifest=manifest, digest="")


def prepare(out: Path, report: Report = silent) -> Path:
    """Before the long work: `out` can be written and may be replaced. Leftovers of killed builds are put right.

    Returns: `out`, absolute and without links.
    Raises: BuildError if its parent is not writable, or something that is no bundle stands there.
    """
    out = _absolute(out)
    with storage_errors("preparing the output folder", out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with _holding(out, report):
            _check_replaceable(out)
        _recover_siblings(out.parent)
    return out


def publish_bundle(out: Path, manifest: BundleManifest, path_of: Callable[[FileRef], Path], report: Report = silent) -> bool:
    """Make the bundle visible at `out`, replacing an older bundle.

    Args:
        path_of: where each file of the manifest is now.
    Returns: False if exactly this bundle, undamaged, stands there already; it is then left alone.
    Raises: BuildError if it cannot be written, or if something that is no bundle stands at `out`.
    """
    out = _absolute(out)
    with storage_errors("publishing the bundle", out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with _holding(out, report):
            _check_replaceable(out)
            if _is_same(out, manifest):
                return False
            try:
                assemble(_sibling(out, "new"), manifest, path_of)
                _swap(out)
            finally:
                _recover(out)
    return True


def assemble(folder: Path, manifest: BundleManifest, path_of: Callable[[FileRef], Path]) -> None:
    """Write a bundle into `folder`, which must not exist: its files as hard links or copies, then its manifest."""
    (folder / "files").mkdir(parents=True)
    for reference in files_of(manifest):
        target = resolve(folder, reference)
        link_or_copy(path_of(reference), target)
        if target.stat().st_size != reference.num_bytes:
            raise BuildError(f"{path_of(reference)} changed while the bundle was assembled; run the build again")
    write_durably(folder / BUNDLE_FILE, to_json(manifest))
    fsync(folder / "files")
    fsync(folder)


def _swap(out: Path) -> None:
    """One rename where nothing stands; otherwise two, between which `_recover` knows what to put back."""
    if out.exists():
        os.rename(out, _sibling(out, "old"))
    os.rename(_sibling(out, "new"), out)
    fsync(out.parent)


def _recover(out: Path) -> None:
    """Bring the siblings of `out` to rest, wherever a build was cut. The caller holds the lock."""
    new, old, trash = (_sibling(out, kind) for kind in ("new", "old", "trash"))
    if old.exists() and not out.exists():
        os.rename(old, out)
    # Deleting takes many steps. Under another name a half-deleted bundle is never taken for the one to put back.
    for leftover in (old, new):
        if trash.exists():
            shutil.rmtree(trash)
        if leftover.exists():
            os.rename(leftover, trash)
    if trash.exists():
        shutil.rmtree(trash)


def _recover_siblings(parent: Path) -> None:
    """Recover other bundles of this folder whose builders died; those that live hold their locks."""
    for leftover in sorted(parent.glob(".*.nitro-*")):
        name = leftover.name[1:].rpartition(".nitro-")[0]
        out = parent / name
        lock = FileLock(_sibling(out, "lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            continue
        try:
            _recover(out)
            _sibling(out, "lock").unlink(missing_ok=True)
        finally:
            lock.release()


def _check_replaceable(out: Path) -> None:
    """Only a bundle, whole or damaged, or an empty folder may be replaced: everything in it is ours by its name."""
    if not out.exists():
        return
    if not out.is_dir():
        raise BuildError(f"{out} is a file, so no bundle can be published there; choose another --out")
    for folder, _, names in os.walk(out):
        for name in names:
            inside = (Path(folder) / name).relative_to(out).as_posix()
            if inside != BUNDLE_FILE and not _CONTENT_NAME.fullmatch(inside):
                raise BuildError(
                    f"{out} holds {inside!r}, which is no part of a bundle, so the folder is not replaced; "
                    "choose another --out, or move that file away"
                )


def _is_same(out: Path, manifest: BundleManifest) -> bool:
    try:
        if (out / BUNDLE_FILE).read_bytes() != to_json(manifest).encode():
            return False
        for reference in files_of(manifest):
            check_file(out, reference)
    except (OSError, BundleError):
        return False
    found = sum(1 for path in (out / "files").iterdir())
    return found == len(files_of(manifest))


@contextmanager
def _holding(out: Path, report: Report) -> Iterator[None]:
    """The lock of `out`, with its siblings brought to rest. The lock file is removed while held: nobody is misled,
    since a waiting process notices that the file it locked has no name any more, and tries again."""
    path = _sibling(out, "lock")
    with locked(path, f"another build is publishing {out}; waiting for it", report):
        try:
            _recover(out)
            yield
        finally:
            path.unlink(missing_ok=True)


def _sibling(out: Path, kind: str) -> Path:
    return out.with_name(f".{out.name}.nitro-{kind}")


def _absolute(out: Path) -> Path:
    resolved = Path(out).expanduser().resolve()
    if not resolved.name:
        raise BuildError(f"{out} is no folder that a bundle could replace; choose another --out")
    return resolved

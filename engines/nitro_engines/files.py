"""Writing that is either whole or absent: durable files, hard links, and storage failures as typed errors."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

import nitro_rt
from nitro_rt.errors import BuildError, NitroError

Report = Callable[[str], None]
"""Takes one line for the user."""

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_READ_ONLY = {errno.EACCES, errno.EPERM, errno.EROFS}
_NO_HARD_LINK = {errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}


def silent(line: str) -> None:
    """The report that nobody reads."""


@contextmanager
def storage_errors(doing: str, at: Path) -> Iterator[None]:
    """Turn the operating system's refusals into a BuildError that says what was done where, and what to do next."""
    try:
        yield
    except OSError as exc:
        raise BuildError(f"{doing} failed at {exc.filename or at}: {exc.strerror or exc}{_advice(exc, at)}") from exc


@contextmanager
def foreign_errors(doing: str, at: Path) -> Iterator[None]:
    """As `storage_errors`, for libraries that raise anything: their message is kept, and a full disk is named.

    A library that cannot write often says something else, so the free space stands in the message.
    """
    try:
        yield
    except NitroError:
        raise
    except OSError as exc:
        raise BuildError(f"{doing} failed at {exc.filename or at}: {exc.strerror or exc}{_advice(exc, at)}") from exc
    except Exception as exc:  # parsers and compilers raise kinds of their own, without a common base
        reason = " ".join(str(exc).split()) or type(exc).__name__
        raise BuildError(f"{doing} failed: {reason} ({free_mib(at)} MiB are free at {at})") from exc


def free_mib(at: Path) -> int:
    """Free space in MiB where `at` is or would be."""
    existing = next((path for path in (at, *at.parents) if path.exists()), Path("/"))
    return shutil.disk_usage(existing).free >> 20


def fsync(path: Path) -> None:
    """Make a file's content, or a folder's entries, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def link_or_copy(source: Path, target: Path) -> bool:
    """`target` with `source`'s content: a hard link (True), or a durable copy where the file system has no such link."""
    try:
        os.link(source, target)
    except OSError as exc:
        if exc.errno not in _NO_HARD_LINK:
            raise
        shutil.copyfile(source, target)
        fsync(target)
        return False
    return True


@contextmanager
def locked(path: Path, waiting: str, report: Report) -> Iterator[FileLock]:
    """Hold the lock file `path`. The system frees it however its holder dies, so it never outlives a killed build."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        report(waiting)
        lock.acquire()
    try:
        yield lock
    finally:
        lock.release()


def source_sha256(package: Path, without: tuple[str, ...] = ()) -> str:
    """Digest of a package's Python files: what code made an artefact is part of its key.

    Args: without: what the paths inside begin with that are left out.
    """
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")) if package.is_dir() else [package]:
        name = path.name if path == package else path.relative_to(package).as_posix()
        if name.startswith(without):
            continue
        content = path.read_bytes()
        digest.update(f"{name}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


def runtime_sha256() -> str:
    """Digest of the code that draws: all of nitro_rt but its command line, whose words change no picture."""
    return source_sha256(Path(str(nitro_rt.__file__)).parent, without=("cli/",))


def _advice(exc: OSError, at: Path) -> str:
    if exc.errno in _FULL:
        return (
            f"; {free_mib(at)} MiB are free there: free some space, or point --out or NITRO_RT_CACHE at another disk; "
            "nothing was published"
        )
    if exc.errno in _READ_ONLY:
        return "; make it writable, or choose another folder with --out or NITRO_RT_CACHE"
    return ""

"""Builds in a process of their own, for tests that kill them, starve them or run two at once.

    python build_child.py GRAPHS OUT CACHE BACKEND [--log FILE] [--seconds S] [--file-limit BYTES] [--no-links]
    python build_child.py GRAPHS OUT CACHE copy --kill-at N[,N...]
    python build_child.py GRAPHS OUT CACHE copy --kill-after SHARE[,SHARE...]

With --kill-at one fork per N builds OUT/N/bundle with the cache CACHE/N and kills itself before its Nth change of the
file system (0: not at all; it then prints how many changes there were).

With --kill-after one fork per SHARE builds OUT with CACHE, compiling everything anew, and is killed after that share of the
time that a whole build took. After each, all that is in the cache and at OUT must be whole; it prints what was found.
"""

from __future__ import annotations

import argparse
import errno
import os
import resource
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from conftest import CopyBackend  # noqa: E402

import nitro_engines.backends.onnx_graph  # noqa: E402, F401  (imported now: a fork then has no import to do)
from nitro_engines.backends import load_backend  # noqa: E402
from nitro_engines.bundle import bundle_from_graphs  # noqa: E402
from nitro_engines.cache import EngineCache  # noqa: E402
from nitro_rt.bundle import open_bundle  # noqa: E402
from nitro_rt.errors import NitroError  # noqa: E402
from nitro_rt.manifest import sha256_of  # noqa: E402

CHANGES = {"os.rename", "os.link", "os.mkdir", "os.remove", "os.rmdir"}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("paths", nargs=3, type=Path)
    parser.add_argument("backend")
    parser.add_argument("--kill-at")
    parser.add_argument("--kill-after")
    parser.add_argument("--log", type=Path)
    parser.add_argument("--seconds", type=float, default=0.0)
    parser.add_argument("--file-limit", type=int)
    parser.add_argument("--no-links", action="store_true", help="as on a file system without hard links")
    options = parser.parse_args()
    graphs, out, cache = options.paths
    if options.kill_at:
        for moment in map(int, options.kill_at.split(",")):
            _killed(graphs, out / str(moment) / "bundle", EngineCache(cache / str(moment)), moment)
        return 0
    if options.kill_after:
        _kill_after(graphs, out, EngineCache(cache), [float(share) for share in options.kill_after.split(",")])
        return 0
    backend = CopyBackend(options.log, options.seconds) if options.backend == "copy" else load_backend(options.backend)
    if options.file_limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (options.file_limit, options.file_limit))
    if options.no_links:
        os.link = _no_links
    try:
        bundle_from_graphs(graphs, out, backend, EngineCache(cache))
    except NitroError as exc:
        print(f"{type(exc).__name__}: {exc}")
        return 1
    return 0


def _no_links(source: Path, target: Path) -> None:
    raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))


def _killed(graphs: Path, out: Path, cache: EngineCache, moment: int) -> None:
    process = os.fork()
    if process:
        _, status = os.waitpid(process, 0)
        expected = signal.SIGKILL if moment else 0
        assert os.WTERMSIG(status) == expected and (moment or status == 0), (moment, status)
        return
    changes = 0

    def count(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal changes
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if event in CHANGES or writes:
            changes += 1
            if changes == moment:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    bundle_from_graphs(graphs, out, CopyBackend(), cache)
    print(changes, flush=True)
    os._exit(0)


def _kill_after(graphs: Path, out: Path, cache: EngineCache, shares: list[float]) -> None:
    started = time.monotonic()
    assert _build_and_kill(graphs, out, cache, "whole", None) == 0
    seconds = time.monotonic() - started
    for number, share in enumerate(shares):
        status = _build_and_kill(graphs, out, cache, str(number), share * seconds)
        num_entries = _require_whole(cache, out)
        print("killed" if status == signal.SIGKILL else "ended", num_entries, flush=True)


def _build_and_kill(graphs: Path, out: Path, cache: EngineCache, version: str, after_s: float | None) -> int:
    """Fork, build with a backend of this version, which nothing cached is of. Returns: the status it ended with."""
    process = os.fork()
    if not process:
        backend = CopyBackend(seconds=0.05)
        backend.version = version
        bundle_from_graphs(graphs, out, backend, cache)
        os._exit(0)
    if after_s is not None:
        time.sleep(after_s)
        os.kill(process, signal.SIGKILL)
    return os.waitpid(process, 0)[1]


def _require_whole(cache: EngineCache, out: Path) -> int:
    """Every entry has its files, every file its digest, and the bundle is whole or absent. Returns: how many entries."""
    entries = list((cache.engines / "entries").glob("*"))
    for entry in entries:
        lines: list[str] = []
        assert cache.find(entry.stem, lines.append) is not None and not lines, lines
    for file in (cache.engines / "files").iterdir():
        assert sha256_of(file) == file.stem, file
    if out.exists():
        open_bundle(out).verify()
    return len(entries)


if __name__ == "__main__":
    sys.exit(main())

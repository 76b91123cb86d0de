"""Builds in a process of their own, for tests that kill them, starve them or run two at once.

    python build_child.py GRAPHS OUT CACHE BACKEND [--log FILE] [--seconds S] [--file-limit BYTES] [--no-links]
    python build_child.py GRAPHS OUT CACHE copy --kill-at N[,N...]

With --kill-at one fork per N builds OUT/N/bundle with the cache CACHE/N and kills itself before its Nth change of the
file system (0: not at all; it then prints how many changes there were).
"""

from __future__ import annotations

import argparse
import errno
import os
import resource
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from conftest import CopyBackend  # noqa: E402

import nitro_engines.backends.onnx_graph  # noqa: E402, F401  (imported now: a fork then has no import to do)
from nitro_engines.backends import load_backend  # noqa: E402
from nitro_engines.bundle import bundle_from_graphs  # noqa: E402
from nitro_engines.cache import EngineCache  # noqa: E402
from nitro_rt.errors import NitroError  # noqa: E402

CHANGES = {"os.rename", "os.link", "os.mkdir", "os.remove", "os.rmdir"}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("paths", nargs=3, type=Path)
    parser.add_argument("backend")
    parser.add_argument("--kill-at")
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


if __name__ == "__main__":
    sys.exit(main())

"""A build in a process of its own, for tests that kill it, starve it or run two at once.

    python build_child.py GRAPHS OUT CACHE BACKEND [--kill-at N] [--log FILE] [--seconds S] [--file-limit BYTES]

With --kill-at the process kills itself before its Nth change of the file system; it prints how many there were.
"""

from __future__ import annotations

import argparse
import os
import resource
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from conftest import CopyBackend  # noqa: E402

from nitro_engines.backends import load_backend  # noqa: E402
from nitro_engines.bundle import bundle_from_graphs  # noqa: E402
from nitro_engines.cache import EngineCache  # noqa: E402
from nitro_rt.errors import NitroError  # noqa: E402

CHANGES = {"os.rename", "os.link", "os.mkdir", "os.remove", "os.rmdir"}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("paths", nargs=3, type=Path)
    parser.add_argument("backend")
    parser.add_argument("--kill-at", type=int, default=0)
    parser.add_argument("--log", type=Path)
    parser.add_argument("--seconds", type=float, default=0.0)
    parser.add_argument("--file-limit", type=int)
    options = parser.parse_args()
    graphs, out, cache = options.paths
    changes = 0

    def count(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal changes
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if event not in CHANGES and not writes:
            return
        changes += 1
        if changes == options.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    backend = CopyBackend(options.log, options.seconds) if options.backend == "copy" else load_backend(options.backend)
    if options.file_limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (options.file_limit, options.file_limit))
    sys.addaudithook(count)
    try:
        bundle_from_graphs(graphs, out, backend, EngineCache(cache))
    except NitroError as exc:
        print(f"{type(exc).__name__}: {exc}")
        return 1
    print(changes)
    return 0


if __name__ == "__main__":
    sys.exit(main())

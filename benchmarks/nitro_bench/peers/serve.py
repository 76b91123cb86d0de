"""The child process of a benchmark: loads one adapter and serves it. Standard library only.

    PYTHON -I .../peers/serve.py ADAPTER.py

It runs under the interpreter of the peer's own environment. Commands come as JSON objects, one a line, on standard input; each
is answered by one line on what standard output was at the start (later, standard output is standard error, because libraries
print). `nitro_bench.peer` is the other end and names the fields.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import signal
import sys
import threading
import time
import traceback
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
PR_SET_PDEATHSIG = 1
"""Of Linux's prctl."""


def share_package() -> None:
    """Make `nitro_bench` importable without putting the folder it was installed in, and all beside it, on the path."""
    package = types.ModuleType("nitro_bench")
    package.__path__ = [str(FOLDER.parent)]
    sys.modules["nitro_bench"] = package


def load_adapter(path: Path) -> Any:
    """An instance of the class `Adapter` in the file `path`."""
    spec = importlib.util.spec_from_file_location(f"adapter_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.Adapter()


def peak_rss_bytes() -> int | None:
    # VmHWM and not getrusage: ru_maxrss of a child starts at what its parent had when it forked.
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)


class Server:
    """One adapter and its commands. Each method answers one command; its arguments are the command's other fields."""

    def __init__(self, adapter: Any) -> None:
        self._adapter = adapter

    def load(self, request: dict[str, Any]) -> dict[str, Any]:
        start_s = time.perf_counter()
        versions = self._adapter.import_libraries()
        imported_s = time.perf_counter()
        facts = self._adapter.load(request)
        capture_ms = facts.pop("capture_ms", None)
        load_ms = 1e3 * (time.perf_counter() - imported_s) - (capture_ms or 0.0)
        timings = {"import_ms": 1e3 * (imported_s - start_s), "load_ms": load_ms, "capture_ms": capture_ms}
        return {"versions": versions, "notes": [], **facts, **timings}

    def draw(self, request: dict[str, Any], num_images: int, save: str | None) -> dict[str, Any]:
        """Draw `num_images` times; `save` is where the last one's pixels go, as .npy."""
        draw = self._adapter.prepare(request)
        image_ms, cpu_ms, timings_ms, images = [], [], [], None
        for _ in range(num_images):
            start_s, start_cpu_s = time.perf_counter(), time.process_time()
            images = draw()
            image_ms.append(1e3 * (time.perf_counter() - start_s))
            cpu_ms.append(1e3 * (time.process_time() - start_cpu_s))
            timings_ms.append(self._adapter.timings_ms())
        # CLOCK_MONOTONIC, so the parent may subtract the moment at which it started this process.
        at_s = time.perf_counter()
        if save is not None:
            save_pixels(Path(save), images)
        return {"image_ms": image_ms, "cpu_ms": cpu_ms, "timings_ms": timings_ms, "at_s": at_s}

    def throughput(self, request: dict[str, Any], num_threads: int, num_images: int) -> dict[str, Any]:
        """Draw `num_images` from `num_threads` threads on one pipeline; seconds from their start to the last image."""
        if not self._adapter.thread_safe:
            raise RuntimeError("this peer is not called from several threads")
        draws = [self._adapter.prepare(request) for _ in range(num_threads)]
        pending, errors = iter(range(num_images)), []
        lock = threading.Lock()

        def work(draw: Callable[[], Any]) -> None:
            try:
                while True:
                    with lock:
                        if next(pending, None) is None:
                            return
                    draw()
            except Exception as exc:  # of whatever library draws; raised again below, in the thread that answers
                errors.append(exc)

        threads = [threading.Thread(target=work, args=(draw,)) for draw in draws]
        start_s = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seconds = time.perf_counter() - start_s
        if errors:
            raise errors[0]
        return {"seconds": seconds}

    def memory(self) -> dict[str, Any]:
        return {"peak_rss_bytes": peak_rss_bytes(), "device_peak_bytes": self._adapter.device_peak_bytes()}

    def quit(self) -> dict[str, Any]:
        self._adapter.close()
        return {}


COMMANDS = ("load", "draw", "throughput", "memory", "quit")


def save_pixels(path: Path, images: Any) -> None:
    """uint8 [B, H, W, 3]."""
    import numpy as np

    pixels_BHWC = np.stack([np.asarray(image) for image in images])
    if pixels_BHWC.dtype != np.uint8 or pixels_BHWC.ndim != 4 or pixels_BHWC.shape[3] != 3:
        raise TypeError(f"the adapter drew {pixels_BHWC.dtype} {list(pixels_BHWC.shape)}, expected uint8 [B, H, W, 3]")
    np.save(path, pixels_BHWC)


def answer(server: Server, line: str) -> dict[str, Any]:
    """`ok` with the command's facts, or `cannot_run` or `error` with the reason."""
    try:
        fields = json.loads(line)
        command = fields.pop("command")
        if command not in COMMANDS:
            raise ValueError(f"unknown command {command!r}")
        facts = {"ok": True, **getattr(server, command)(**fields)}
        json.dumps(facts)  # what an adapter tells may hold a NumPy number
        return facts
    except Exception as exc:  # of whatever library draws: the answer tells it, and the other side goes on
        traceback.print_exc()
        what = "cannot_run" if type(exc).__name__ == "CannotRun" or isinstance(exc, ImportError) else "error"
        text = str(exc) if type(exc).__name__ == "CannotRun" else f"{type(exc).__name__}: {exc}"
        return {"ok": False, what: text}


def die_with_parent() -> None:
    """A benchmark that is killed must not leave a process behind that computes for another hour."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> None:
    die_with_parent()
    # The protocol keeps the real standard output; what libraries print goes to standard error.
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    share_package()
    started_at_s = time.perf_counter()
    server = Server(load_adapter(Path(sys.argv[1])))
    print(json.dumps({"ok": True, "started_at_s": started_at_s}), file=replies, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(server, line)), file=replies, flush=True)
        if json.loads(line).get("command") == "quit":
            return


if __name__ == "__main__":
    main()

"""An adapter for tests: draws a stored picture after a while, and misbehaves when told to (`options["mode"]`)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from nitro_bench.peers.adapter import CannotRun


class Adapter:
    thread_safe = True

    def import_libraries(self) -> dict[str, str]:
        print("a library that prints on standard output", flush=True)
        return {"fake": "1.0"}

    def load(self, request: dict[str, Any]) -> dict[str, Any]:
        self._options, self._num_drawn = request["options"], 0
        mode = self._mode = self._options.get("mode", "")
        if mode == "cannot":
            raise CannotRun("needs a device of another kind")
        if mode == "alone" and _ours_lives():
            raise CannotRun("ours is alive")
        if mode == "missing":
            import a_package_that_nobody_has  # type: ignore[import-not-found]  # noqa: F401
        if mode == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        if mode == "exit":
            print("a last word", file=sys.stderr)
            os._exit(3)
        if mode == "hang":
            subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
            time.sleep(600)
        if mode == "nonsense":
            os.write(int(next(name for name in os.listdir("/proc/self/fd") if _is_reply(name))), b"not json\n")
        if mode == "numpy":
            return {"compute_dtype": "float32", "capture_ms": np.float32(1)}
        if mode == "silent":
            return {}
        if mode == "stuck":
            threading.Thread(target=time.sleep, args=(600,)).start()  # outlives the main thread, which ends at once
            os.close(int(next(name for name in os.listdir("/proc/self/fd") if _is_reply(name))))
        facts = {"compute_dtype": self._options.get("dtype", "float32"), "notes": [request["model"]], "capture_ms": 1.0}
        return facts | ({"differs": self._options["differs"]} if "differs" in self._options else {})

    def prepare(self, drawing: dict[str, Any]) -> Callable[[], Any]:
        shape = np.load(drawing["noise"]).shape
        path = self._options.get("picture")
        size = drawing["size_px"]

        def draw() -> Any:
            self._num_drawn += 1
            if self._mode == "late" and self._num_drawn > 5:
                os._exit(4)
            time.sleep(float(self._options.get("seconds", "0.002")))
            assert shape[0] == drawing["steps"]
            if path:
                return list(np.load(path))
            return np.zeros((len(drawing["prompts"]), size, size, 3), np.uint8)

        return draw

    def timings_ms(self) -> dict[str, float]:
        return {"total": 2.0, "denoise": 1.0}

    def device_peak_bytes(self) -> int | None:
        return 12345

    def close(self) -> None:
        pass


def _ours_lives() -> bool:
    """Whether the benchmark that started this process has a process of ours beside it."""
    pid = os.getppid()
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        children = file.read().split()
    return any(_command_of(child).endswith("nitro_rt_bundle.py") for child in children)


def _command_of(pid: str) -> str:
    with open(f"/proc/{pid}/cmdline") as file:
        return file.read().rstrip("\0")


def _is_reply(name: str) -> bool:
    """Whether a file descriptor is the pipe that answers go through: neither standard stream nor a file."""
    try:
        return int(name) > 2 and os.readlink(f"/proc/self/fd/{name}").startswith("pipe:")
    except OSError:
        return False

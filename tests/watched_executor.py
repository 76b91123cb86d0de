"""An executor that is watched: it draws what the bundle's own draws, waits at a gate, and fails when told to."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from nitro_rt.bundle import Bundle
from nitro_rt.executor import Drawing, open_executor

PATIENCE_S = 20.0
"""How long a test waits for what must happen."""


class WatchedExecutor:
    """One pipeline's executors, one after another: `open` is what `Pipeline.of(open_executor=...)` takes."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self.gate = threading.Event()
        self.gate.set()
        self.begun = threading.Semaphore(0)
        """Released by every call that has reached the gate."""
        self.calls: list[tuple[int, int, int]] = []
        """Steps, size and number of used rows of every call."""
        self.events: list[tuple[str, int]] = []
        """open and close, when they have ended, with the thread they happened on."""
        self.threads: set[int] = set()
        self.on_draw: Callable[[np.ndarray[Any, Any]], None] = lambda ids_BT: None
        """Called with the token ids of every call; what it raises, the call raises."""
        self.on_open: Callable[[], None] = lambda: None
        self.on_close: Callable[[], None] = lambda: None
        self._inner: Any = None

    def open(self) -> WatchedExecutor:
        self.on_open()
        self._inner = open_executor(self.bundle)
        self._note("open")
        return self

    @property
    def notes(self) -> tuple[str, ...]:
        return self._inner.notes  # type: ignore[no-any-return]

    @property
    def compute_dtypes(self) -> dict[str, str]:
        return self._inner.compute_dtypes  # type: ignore[no-any-return]

    def prepare(self, num_steps: int, size_px: int) -> bool:
        self.threads.add(threading.get_ident())
        return self._inner.prepare(num_steps, size_px)  # type: ignore[no-any-return]

    def draw(self, num_steps: int, size_px: int, ids_BT: Any, ids_2_BT: Any, noise_NBCHW: Any) -> Drawing:
        self.threads.add(threading.get_ident())
        used = int((noise_NBCHW[0] != 0).any(axis=(1, 2, 3)).sum())
        self.calls.append((num_steps, size_px, used))
        self.begun.release()
        assert self.gate.wait(PATIENCE_S)
        self.on_draw(ids_BT)
        return self._inner.draw(num_steps, size_px, ids_BT, ids_2_BT, noise_NBCHW)  # type: ignore[no-any-return]

    def close(self) -> None:
        self._inner.close()
        self.on_close()
        self._note("close")

    def wait_for_call(self) -> None:
        """Return when one more call has reached the gate."""
        assert self.begun.acquire(timeout=PATIENCE_S)

    def _note(self, event: str) -> None:
        self.events.append((event, threading.get_ident()))


def wait_until(condition: Callable[[], bool]) -> None:
    end_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end_s, "it did not happen"
        time.sleep(0.002)

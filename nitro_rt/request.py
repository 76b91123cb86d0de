"""Requests: futures that wait in a bounded queue for the thread that draws them.

Shapes: N steps, B rows (one per prompt), T tokens, C channels, H height, W width.

A request that waits holds one of the queue's places. Whoever takes it out of there owns it: the worker to draw it, or its
caller to cancel it, or `close` to refuse it. That is one removal from one set under one lock, so exactly one of them wins.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue

import numpy as np
from numpy.typing import NDArray

from nitro_rt.errors import DeadlineExceeded, NitroError, QueueFull
from nitro_rt.executor import Executor
from nitro_rt.result import Result

Float32 = NDArray[np.float32]
Ids = NDArray[np.int64]
Rows = tuple[Ids, Ids, Float32]
"""What the executor reads: input_ids_BT, input_ids_2_BT, noise_NBCHW."""


class Request(Future[Result]):
    """One call that is to be drawn. `cancel` works as long as it waits."""

    def __init__(
        self,
        *,
        prompts: tuple[str, ...],
        seed: int | tuple[int, ...],
        num_steps: int,
        size_px: int,
        start_s: float,
        deadline_s: float | None,
    ) -> None:
        """
        Args:
            start_s: when the call began, of `time.perf_counter`.
            deadline_s: seconds from then within which drawing must have begun.
        """
        super().__init__()
        self.prompts, self.seed, self.num_steps, self.size_px = prompts, seed, num_steps, size_px
        self.start_s, self.deadline_s = start_s, deadline_s
        self.timings_ms: dict[str, float] = {}
        self.cuts: tuple[str, ...] = ()
        """What is said about prompts that are too long."""
        self.load_notes: tuple[str, ...] = ()
        """What the engines loaded for this request have to say; its caller warns of it."""
        self.rows: Rows | None = None
        """Until it is drawn: the noise of a future that somebody keeps is not kept."""
        self.admission: Future[None] | None = None
        """Where the queue was full: done as soon as there is a place."""
        self._queue: RequestQueue | None = None

    @property
    def num_rows(self) -> int:
        return len(self.prompts)

    def remaining_s(self) -> float | None:
        """Seconds to the deadline, negative after it; None without one."""
        if self.deadline_s is None:
            return None
        return min(self.start_s + self.deadline_s - time.perf_counter(), threading.TIMEOUT_MAX)

    def is_late(self, now_s: float) -> bool:
        return self.deadline_s is not None and now_s > self.start_s + self.deadline_s

    def deadline_error(self) -> DeadlineExceeded:
        return DeadlineExceeded(
            f"the request waited longer than its deadline of {self.deadline_s:g} s and was not drawn; give it more time, or "
            "ask for less at once"
        )

    def cancel(self) -> bool:
        """Take it out of the queue; False where drawing has begun: the GPU cannot be interrupted."""
        if self._queue is None or not self._queue.withdraw(self):
            return self.cancelled()
        self.rows = None
        super().cancel()
        self.set_running_or_notify_cancel()  # `concurrent.futures.wait` hears of it too
        return True

    def finish(self, result: Result) -> None:
        self.rows = None
        self.set_result(result)

    def fail(self, error: BaseException) -> None:
        self.rows = None
        self.set_exception(error)


class Errand(Request):
    """Something else for the thread that draws: done after all requests that came before, and before those that come after."""

    def __init__(self, run: Callable[[Executor], None]) -> None:
        super().__init__(prompts=(), seed=0, num_steps=0, size_px=0, start_s=time.perf_counter(), deadline_s=None)
        self.run = run

    def wait(self) -> None:
        """Raises: what `run` raised, or why it was not called."""
        error = self.exception()
        if error is not None:
            raise error


class RequestQueue:
    """The requests that wait, in order of arrival: many threads put them in, one worker takes them out.

    What is put in goes through a `SimpleQueue`. `end` needs no lock, so a finaliser may call it wherever the garbage
    collector runs, the worker's own thread included.
    """

    def __init__(self, max_waiting: int) -> None:
        self._max_waiting = max_waiting
        self._lock = threading.RLock()  # a signal handler that closes may run inside of any call here
        self._places: set[Request] = set()
        """Those that are being made ready, or wait in line."""
        self._outside: deque[Request] = deque()
        """Those that wait for a place."""
        self._refusal: Callable[[], NitroError] | None = None
        self._arrivals: SimpleQueue[Request | None] = SimpleQueue()
        """None is the end."""
        self._line: list[Request] = []
        """The worker's own: what has arrived and is not taken yet."""
        self._has_ended = False

    def enter(self, request: Request, *, wait: bool) -> None:
        """Give the request a place, or, where it may wait, an `admission` that is done when it has one.

        Raises: QueueFull; what `refuse` was given.
        """
        with self._lock:
            if self._refusal is not None:
                raise self._refusal()
            if len(self._places) < self._max_waiting:
                self._places.add(request)
            elif wait:
                request.admission = Future()
                self._outside.append(request)
            else:
                raise QueueFull(
                    f"{self._max_waiting} requests wait already, which is all that the queue takes; try again later (HTTP: "
                    "503), wait for a place with submit(..., wait=True), or load with a larger max_queue"
                )
            request._queue = self

    def line_up(self, request: Request) -> None:
        """Put a request that has a place and its rows in the line. Raises: what `refuse` was given."""
        with self._lock:
            if self._refusal is not None:
                raise self._refusal()
            self._arrivals.put(request)

    def withdraw(self, request: Request) -> bool:
        """Take a request out; False where it is out already: drawing, drawn, refused or withdrawn."""
        with self._lock:
            if request in self._places:
                self._places.remove(request)
                self._admit()
            elif request in self._outside:
                self._outside.remove(request)
            else:
                return False
            return True

    def take(self, max_rows: int) -> list[Request]:
        """The oldest request and, up to `max_rows`, those of its steps and size that wait behind it; waits for the first.

        Among equals the order is kept: one that does not fit any more stops those behind it. What is late fails here.
        Returns: an empty list after the end, when all that had come before is served.
        """
        while self._receive():
            batch, late = self._claim(max_rows)
            for request in late:
                request.fail(request.deadline_error())
            if batch:
                return batch
        return []

    def refuse(self, make_error: Callable[[], NitroError], *, waiting: bool) -> None:
        """From now on, refuse everybody who enters; those who wait for a place, and with `waiting` those who have one, fail."""
        with self._lock:
            self._refusal = make_error
            outside, self._outside = self._outside, deque()
            refused = list(self._places) if waiting else []
            self._places.difference_update(refused)
        for request in outside:
            if request.admission is not None and request.admission.set_running_or_notify_cancel():
                request.admission.set_exception(make_error())
        for request in refused:
            request.fail(make_error())

    def end(self) -> None:
        """The worker's `take` ends after what is in line now. Never blocks."""
        self._arrivals.put(None)

    def _receive(self) -> bool:
        """Collect what has arrived; waits where the line is empty. False when there is nothing and nothing will come."""
        if not self._line and not self._has_ended:
            self._accept(self._arrivals.get())
        while not self._arrivals.empty():
            self._accept(self._arrivals.get())
        return bool(self._line)

    def _accept(self, arrival: Request | None) -> None:
        if arrival is None:
            self._has_ended = True
        else:
            self._line.append(arrival)

    def _claim(self, max_rows: int) -> tuple[list[Request], list[Request]]:
        """Take from the line what is drawn next and what is late; drop what was withdrawn."""
        batch: list[Request] = []
        late: list[Request] = []
        kept: list[Request] = []
        free_rows, now_s, errand_waits = max_rows, time.perf_counter(), False
        with self._lock:
            for request in self._line:
                if request not in self._places:
                    continue
                if request.is_late(now_s):
                    late.append(request)
                elif not batch or not errand_waits and _share(batch[0], request) and request.num_rows <= free_rows:
                    batch.append(request)
                    free_rows -= request.num_rows
                else:
                    kept.append(request)
                    errand_waits |= isinstance(request, Errand)
                    if _share(batch[0], request):
                        free_rows = 0
            self._line = kept
            self._places.difference_update(batch, late)
            self._admit()
        for request in batch:
            request.set_running_or_notify_cancel()
        return batch, late

    def _admit(self) -> None:
        """Give free places to those who wait for one, in order. The lock is held."""
        while self._outside and len(self._places) < self._max_waiting:
            request = self._outside.popleft()
            assert request.admission is not None
            if request.admission.set_running_or_notify_cancel():
                self._places.add(request)
                request.admission.set_result(None)


def _share(first: Request, second: Request) -> bool:
    """Whether one call of the executor can draw both."""
    if isinstance(first, Errand) or isinstance(second, Errand):
        return False
    return first.num_steps == second.num_steps and first.size_px == second.size_px

"""The bounded queue between many callers and the one thread that draws.

What waits holds one of the queue's places. Whoever takes it out of there owns it: the worker to draw it, or its caller to
cancel it, or `close` to refuse it. That is one removal from one set under one lock, so exactly one of them wins.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any

from nitro_rt.errors import NitroError, QueueFull
from nitro_rt.request import Errand, Request, Turn


class RequestQueue:
    """The requests that wait, in order of arrival: many threads put them in, one worker takes them out.

    What is put in goes through a `SimpleQueue`. `end` needs no lock, so a finaliser may call it wherever the garbage
    collector runs, the worker's own thread included.
    """

    def __init__(self, max_waiting: int) -> None:
        self._max_waiting = max_waiting
        self._lock = threading.RLock()  # a signal handler that closes may run inside of any call here
        self._places: set[Turn[Any]] = set()
        """Those that are being made ready, or wait in line."""
        self._outside: deque[Turn[Any]] = deque()
        """Those that wait for a place."""
        self._refusal: Callable[[], NitroError] | None = None
        self._arrivals: SimpleQueue[Turn[Any] | None] = SimpleQueue()
        """None is the end."""
        self._line: list[Turn[Any]] = []
        """The worker's own: what has arrived and is not taken yet."""
        self._has_ended = False

    def enter(self, turn: Turn[Any], *, wait: bool) -> None:
        """Give it a place, or, where it may wait for one, an `admission` that is done when it has it.

        Raises: QueueFull; what `refuse` was given.
        """
        with self._lock:
            if self._refusal is not None:
                raise self._refusal()
            turn.withdraw = self._withdraw
            if len(self._places) < self._max_waiting:
                self._places.add(turn)
            elif wait:
                turn.admission = Future()
                self._outside.append(turn)
            else:
                raise QueueFull(
                    f"{self._max_waiting} requests wait already, which is all that the queue takes; try again later (HTTP: "
                    "503), wait for a place with submit(..., wait=True), or load with a larger max_queue"
                )

    def line_up(self, turn: Turn[Any]) -> None:
        """Put what has a place, and is ready, in the line. Raises: what `refuse` was given."""
        with self._lock:
            if self._refusal is not None:
                raise self._refusal()
            self._arrivals.put(turn)

    def take(self, max_rows: int) -> list[Request] | Errand | None:
        """What comes next: an errand, or the oldest request and, up to `max_rows`, those behind it that can share its call.

        Among equals the order is kept: one that does not fit any more stops those behind it. What is late fails here.
        Waits for the first to come. Returns: None after the end, when all that had come before is served.
        """
        while self._receive():
            taken, late = self._claim(max_rows)
            for turn in late:
                turn.fail(turn.deadline_error())
            if taken:
                return taken
        return None

    def refuse(self, make_error: Callable[[], NitroError], *, waiting: bool) -> None:
        """From now on, refuse everybody who enters; those who wait for a place, and with `waiting` those who have one, fail."""
        with self._lock:
            self._refusal = make_error
            outside, self._outside = self._outside, deque()
            refused = list(self._places) if waiting else []
            self._places.difference_update(refused)
        for turn in outside:
            if turn.admission is not None and turn.admission.set_running_or_notify_cancel():
                turn.admission.set_exception(make_error())
        for turn in refused:
            turn.fail(make_error())

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

    def _accept(self, arrival: Turn[Any] | None) -> None:
        if arrival is None:
            self._has_ended = True
        else:
            self._line.append(arrival)

    def _claim(self, max_rows: int) -> tuple[list[Request] | Errand | None, list[Turn[Any]]]:
        """Take from the line what is next and what is late; drop what was withdrawn or refused."""
        now_s = time.perf_counter()
        taken: list[Request] | Errand | None = None
        claimed: list[Turn[Any]] = []
        with self._lock:
            waiting = [turn for turn in self._line if turn in self._places]
            late = [turn for turn in waiting if turn.is_late(now_s)]
            self._line = [turn for turn in waiting if turn not in late] if late else waiting
            if self._line:
                taken = _next(self._line, max_rows)
                claimed = [taken] if isinstance(taken, Errand) else [*taken]
                self._line = [turn for turn in self._line if turn not in claimed]
            self._places.difference_update(claimed, late)
            self._admit()
        for turn in claimed:
            turn.set_running_or_notify_cancel()
        return taken, late

    def _withdraw(self, turn: Turn[Any]) -> bool:
        with self._lock:
            if turn in self._places:
                self._places.remove(turn)
                self._admit()
            elif turn in self._outside:
                self._outside.remove(turn)
            else:
                return False
            return True

    def _admit(self) -> None:
        """Give free places to those who wait for one, in order. The lock is held."""
        while self._outside and len(self._places) < self._max_waiting:
            turn = self._outside.popleft()
            assert turn.admission is not None
            if turn.admission.set_running_or_notify_cancel():
                self._places.add(turn)
                turn.admission.set_result(None)


def _next(line: list[Turn[Any]], max_rows: int) -> list[Request] | Errand:
    first = line[0]
    if isinstance(first, Errand):
        return first
    assert isinstance(first, Request)
    batch, free_rows = [first], max_rows - first.num_rows
    for turn in line[1:]:
        if not isinstance(turn, Request) or free_rows <= 0:
            break  # an errand: nothing overtakes it
        if turn.shares_call_with(first):
            if turn.num_rows > free_rows:
                break
            batch.append(turn)
            free_rows -= turn.num_rows
    return batch

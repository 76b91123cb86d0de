"""What waits for the thread that draws: requests for images, and errands.

Shapes: N steps, B rows (one per prompt), T tokens, C channels, H height, W width.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from nitro_rt.errors import DeadlineExceeded
from nitro_rt.executor import Executor
from nitro_rt.result import Result

Float32 = NDArray[np.float32]
Ids = NDArray[np.int64]
Rows = tuple[Ids, Ids, Float32]
"""What the executor reads: input_ids_BT, input_ids_2_BT, noise_NBCHW."""

T = TypeVar("T")


class Turn(Future[T]):
    """A future that waits in a queue for its turn. `cancel` works as long as it waits."""

    def __init__(self, *, start_s: float, deadline_s: float | None) -> None:
        """
        Args:
            start_s: when it was asked for, of `time.perf_counter`.
            deadline_s: seconds from then within which it must have begun.
        """
        super().__init__()
        self.start_s, self.deadline_s = start_s, deadline_s
        self.admission: Future[None] | None = None
        """Where the queue was full: done as soon as there is a place."""
        self.withdraw: Callable[[Turn[Any]], bool] | None = None
        """Takes it out of the queue that it is in; False where it is out already."""

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
        """Take it out of the queue; False where it has begun: the GPU cannot be interrupted."""
        if self.withdraw is None or not self.withdraw(self):
            return self.cancelled()
        super().cancel()
        self.set_running_or_notify_cancel()  # `concurrent.futures.wait` hears of it too
        self.let_go()
        return True

    def finish(self, result: T) -> None:
        self.let_go()
        self.set_result(result)

    def fail(self, error: BaseException) -> None:
        self.let_go()
        self.set_exception(error)

    def let_go(self) -> None:
        """Drop what only the executor needs: somebody may keep the future."""


class Request(Turn[Result]):
    """One call that is to be drawn."""

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
        super().__init__(start_s=start_s, deadline_s=deadline_s)
        self.prompts, self.seed, self.num_steps, self.size_px = prompts, seed, num_steps, size_px
        self.timings_ms: dict[str, float] = {}
        self.cuts: tuple[str, ...] = ()
        """What is said about prompts that are too long."""
        self.load_notes: tuple[str, ...] = ()
        """What the engines loaded for this request have to say; its caller warns of it."""
        self.rows: Rows | None = None

    @property
    def num_rows(self) -> int:
        return len(self.prompts)

    def shares_call_with(self, other: Request) -> bool:
        """Whether one call of the executor can draw both."""
        return self.num_steps == other.num_steps and self.size_px == other.size_px

    def let_go(self) -> None:
        self.rows = None


class Errand(Turn[None]):
    """Something else for the thread that draws: done after all that came before, and before all that comes after."""

    def __init__(self, run: Callable[[Executor], None]) -> None:
        super().__init__(start_s=time.perf_counter(), deadline_s=None)
        self.run: Callable[[Executor], None] | None = run

    def let_go(self) -> None:
        self.run = None

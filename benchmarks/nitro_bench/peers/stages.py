"""How long the stages of one image took, by wrapping what a pipeline calls for each."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


class Stages:
    """Milliseconds by stage since the last `clear`. Wall clock, so only for calls that return when the work is done."""

    def __init__(self) -> None:
        self.ms: dict[str, float] = {}

    def timed(self, stage: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """`call`, with the time of each call added to `stage`."""

        def timed_call(*args: Any, **kwargs: Any) -> Any:
            start_s = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self.ms[stage] = self.ms.get(stage, 0.0) + 1e3 * (time.perf_counter() - start_s)

        return timed_call

    def clear(self) -> None:
        self.ms = {}

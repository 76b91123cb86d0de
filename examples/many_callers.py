"""Draw for many callers at once: threads, futures and asyncio on one pipeline.

    python examples/many_callers.py engines/nitro-emoji-1step --callers 8

Nothing but nitro_rt is imported here.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from nitro_rt import DeadlineExceeded, Pipeline, QueueFull, Result

PROMPT = "a red apple"


def from_threads(pipe: Pipeline, num_callers: int) -> list[Result]:
    """Each caller is a thread that waits for its image."""
    with ThreadPoolExecutor(num_callers) as threads:
        return list(threads.map(lambda seed: pipe(PROMPT, seed=seed), range(num_callers)))


def from_futures(pipe: Pipeline, num_callers: int) -> list[Result]:
    """One thread asks for everything; what the queue does not take is drawn when there is a place."""
    futures = [pipe.submit(PROMPT, seed=seed, wait=True) for seed in range(num_callers)]
    return [future.result() for future in futures]


async def from_tasks(pipe: Pipeline, num_callers: int, deadline_s: float) -> list[Result]:
    """Each caller is a task with a deadline, as in a web server; who comes too late gets nothing."""

    async def one(seed: int) -> Result | None:
        try:
            return await pipe.submit_async(PROMPT, seed=seed, deadline_s=deadline_s, wait=False)
        except (QueueFull, DeadlineExceeded) as exc:
            print(f"caller {seed}: {exc}")
            return None

    results = await asyncio.gather(*(one(seed) for seed in range(num_callers)))
    return [result for result in results if result is not None]


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw for many callers at once.")
    parser.add_argument("bundle", type=Path, help="an engine bundle")
    parser.add_argument("--callers", type=int, default=8, help="how many ask at the same time (default: 8)")
    parser.add_argument("--deadline", type=float, default=10.0, help="seconds that a task waits for its turn (default: 10)")
    options = parser.parse_args()
    with Pipeline.load(options.bundle) as pipe:
        ways = {
            "threads": lambda: from_threads(pipe, options.callers),
            "futures": lambda: from_futures(pipe, options.callers),
            "tasks": lambda: asyncio.run(from_tasks(pipe, options.callers, options.deadline)),
        }
        for name, draw in ways.items():
            start_s = time.perf_counter()
            results = draw()
            took_ms = (time.perf_counter() - start_s) * 1e3
            if results:
                waited_ms = statistics.median(result.timings_ms["queue"] for result in results)
                shared = max(result.num_images_in_call for result in results)
                print(
                    f"{name}: {len(results)} images in {took_ms:.0f} ms, median wait {waited_ms:.0f} ms, {shared} in one call"
                )


if __name__ == "__main__":
    main()

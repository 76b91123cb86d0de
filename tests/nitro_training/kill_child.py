"""Runs that can be killed; test_kill.py starts this and kills what it forks.

Loading torch and diffusers takes longer than a tiny run, so this process loads them once, and then forks another for each
run: a whole process of its own, with all that a run has in memory, that dies by SIGKILL like any other.

Reads a line of JSON for each run: `recipe`, `out`, `ticks`, and where to stop, `write` or `rename`. Answers with the pid of
the run's process, then with its exit code (negative: the signal). The run appends a byte to the file `ticks` at every report
of progress; where it is to stop it appends another, and waits to be killed.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch.utils.tensorboard  # noqa: F401
from tiny_run import train

import nitro_training.run  # noqa: F401  # with all that a run needs
from nitro_training import checkpoint

WAIT_S = 600.0


def tick(path: str) -> None:
    with open(path, "ab", buffering=0) as file:
        file.write(b".")


def wait_to_be_killed(ticks: str) -> None:
    tick(ticks)
    time.sleep(WAIT_S)
    os._exit(3)


def stop_in_write(number: int, ticks: str) -> None:
    """Stop in the `number`-th write of a state or a part of the cache, with half of it on the disk."""
    save, calls = checkpoint.save_file, 0

    def half(tensors: Any, path: str, **options: Any) -> None:
        nonlocal calls
        calls += 1
        save(tensors, path, **options)
        if calls == number:
            os.truncate(path, os.path.getsize(path) // 2)
            wait_to_be_killed(ticks)

    checkpoint.save_file = half


def stop_before_rename(name: str, number: int, ticks: str) -> None:
    """Stop before the `number`-th rename to a file or folder of this name."""
    replace, calls = os.replace, 0

    def late(source: Any, target: Any) -> None:
        nonlocal calls
        calls += Path(target).name == name
        if calls == number:
            wait_to_be_killed(ticks)
        replace(source, target)

    os.replace = late


def run(request: dict[str, Any]) -> None:
    ticks = request["ticks"]
    if "write" in request:
        stop_in_write(request["write"], ticks)
    if "rename" in request:
        stop_before_rename(*request["rename"], ticks)
    train(Path(request["recipe"]), Path(request["out"]), resume=True, report=lambda *progress: tick(ticks))


def main() -> None:
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            os.dup2(os.open(os.devnull, os.O_RDWR), 0)
            os.dup2(2, 1)
            try:
                run(json.loads(line))
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    main()

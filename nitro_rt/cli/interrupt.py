"""Signals that end a command: Ctrl-C while a library works that cannot be interrupted, and an end asked for from outside.

Python raises KeyboardInterrupt between two of its own instructions. Loading a network of gigabytes is one call of a library,
and until it returns nothing would seem to happen: it is said, and a second Ctrl-C ends the process at once.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import click

PATIENCE_S = 1.0
ENDING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))
"""`timeout` and a service manager send the first, a terminal that closes the second; nohup ignores it."""
INTERRUPTED = 130
"""The exit code of what was interrupted."""


@contextmanager
def interruptible(cannot: str) -> Iterator[None]:
    """Watch Ctrl-C inside. For the main thread of a process.

    Args: cannot: what to say where nothing stops within a second of the first Ctrl-C.
    """
    noticed = threading.Event()

    def handler(number: int, frame: FrameType | None) -> None:
        noticed.set()
        signal.default_int_handler(number, frame)

    ours, theirs = socket.socketpair()
    theirs.setblocking(False)  # the signal's own handler writes into it, and must not wait
    previous = signal.signal(signal.SIGINT, handler)
    previous_descriptor = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    watcher = threading.Thread(target=_watch, args=(ours, noticed, cannot), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous_descriptor)
        signal.signal(signal.SIGINT, previous)
        theirs.close()  # which ends the watcher
        watcher.join()
        ours.close()


@contextmanager
def tidy_when_ended() -> Iterator[None]:
    """SIGTERM and SIGHUP raise SystemExit inside, so that child processes and scratch folders go too. For the main thread."""

    def handler(number: int, frame: FrameType | None) -> None:
        for each in previous:  # `timeout` signals the process and then its group: the second must not cut the tidying short
            signal.signal(each, signal.SIG_IGN)
        raise SystemExit(128 + number)

    previous = {number: signal.signal(number, handler) for number in ENDING if signal.getsignal(number) == signal.SIG_DFL}
    try:
        yield
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


def _watch(signals: socket.socket, noticed: threading.Event, cannot: str) -> None:
    """Every signal puts its number into the socket, at once, whatever the main thread does."""
    said = False
    while numbers := signals.recv(64):
        if signal.SIGINT not in numbers:
            continue
        if said and not noticed.is_set():
            click.echo("nitro-rt: interrupted", err=True)
            os._exit(INTERRUPTED)
        if not noticed.wait(PATIENCE_S):
            click.echo(f"nitro-rt: {cannot}", err=True)
            said = True

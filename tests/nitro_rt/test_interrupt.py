"""Ctrl-C in a process of its own: in Python's code, and in a library's call that holds the main thread."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from nitro_rt.cli.interrupt import tidy_when_ended

CODE = """
import hashlib, sys, time
from nitro_rt.cli import interrupt
interrupt.PATIENCE_S = 0.2
try:
    with interrupt.interruptible("it cannot be interrupted"):
        print("ready", flush=True)
        {work}
except KeyboardInterrupt:
    print("stopped", flush=True)
    sys.exit(130)
print("done", flush=True)
"""
IN_PYTHON = "time.sleep(60)"
IN_A_LIBRARY = "hashlib.pbkdf2_hmac('sha256', b'', b'', {rounds})"
"""One call without an end before its time, as loading a network is; a million rounds take from 0.3 to 2 s."""


@contextmanager
def at_work(work: str) -> Iterator[subprocess.Popen[str]]:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", CODE.format(work=work)], text=True, **pipes) as process:  # type: ignore[call-overload]
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.2)
        yield process
        process.kill()


def test_python_code_stops_at_once() -> None:
    with at_work(IN_PYTHON) as process:
        started = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=30) == ("stopped\n", "")
        assert process.returncode == 130 and time.monotonic() - started < 5


def test_a_call_that_holds_on_is_named_and_a_second_interrupt_ends_it() -> None:
    with at_work(IN_A_LIBRARY.format(rounds=2_000_000_000)) as process:
        process.send_signal(signal.SIGINT)
        assert process.stderr.readline() == "nitro-rt: it cannot be interrupted\n"
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=30) == ("", "nitro-rt: interrupted\n")
        assert process.returncode == 130


def test_a_call_that_holds_on_is_waited_for_otherwise() -> None:
    with at_work(IN_A_LIBRARY.format(rounds=2_500_000)) as process:
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=120) == ("stopped\n", "nitro-rt: it cannot be interrupted\n")
        assert process.returncode == 130


def test_without_an_interrupt_nothing_is_left() -> None:
    with at_work("pass") as process:
        assert process.communicate(timeout=30) == ("done\n", "")


ENDED = """
import signal, time
from nitro_rt.cli import interrupt
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whatever started the tests may ignore it
with interrupt.tidy_when_ended():
    try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        print("tidying", flush=True)
        time.sleep(0.3)
        print("tidied", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_an_end_from_outside_leaves_time_to_tidy_up(number: signal.Signals) -> None:
    with subprocess.Popen([sys.executable, "-c", ENDED], text=True, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert process.stdout.readline() == "tidying\n"
        process.send_signal(number)  # once more, as `timeout` does
        assert process.communicate(timeout=30)[0] == "tidied\n"
    assert process.returncode == 128 + number


def test_signals_that_are_ignored_stay_ignored() -> None:
    """nohup ignores the end of the terminal."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with tidy_when_ended():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)

"""The drawing thread: what shares a call, what fails alone, how it ends, and what is left then."""

from __future__ import annotations

import concurrent.futures
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nitro_rt import Bundle, DeviceLost, NitroError, Pipeline, PipelineClosed, Result, open_bundle
from nitro_rt.errors import DeadlineExceeded, EngineMismatch
from nitro_rt.executor import Drawing
from watched_executor import PATIENCE_S, WatchedExecutor, wait_until


@pytest.fixture(scope="module")
def bundle(make_bundle: Any, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("worker") / "bundle"
    return open_bundle(make_bundle(folder, steps=(1, 2), batch=3, size_px=32, more_sizes_px=(64,)))


@pytest.fixture(scope="module")
def alone(bundle: Bundle) -> Iterator[Pipeline]:
    """Draws one request after another."""
    with Pipeline.of(bundle) as pipe:
        yield pipe


@pytest.fixture
def watched(bundle: Bundle) -> WatchedExecutor:
    return WatchedExecutor(bundle)


@pytest.fixture
def pipe(bundle: Bundle, watched: WatchedExecutor) -> Iterator[Pipeline]:
    with Pipeline.of(bundle, open_executor=watched.open) as pipeline:
        yield pipeline
        watched.gate.set()


def hold(pipe: Pipeline, watched: WatchedExecutor) -> concurrent.futures.Future[Result]:
    """A request that is being drawn until the gate opens."""
    watched.gate.clear()
    held = pipe.submit("a house", seed=9)
    watched.wait_for_call()
    return held


def equal(left: Result, right: Result) -> bool:
    return np.array_equal(left.array_BHWC, right.array_BHWC)


def test_equals_that_wait_share_one_call_and_are_drawn_as_alone(
    pipe: Pipeline, watched: WatchedExecutor, alone: Pipeline
) -> None:
    held = hold(pipe, watched)
    prompts = ["a dog", "a red apple", "one blue pear"]
    singles = [pipe.submit(prompt, seed=seed, steps=2) for seed, prompt in enumerate(prompts)]
    other = pipe.submit("a dog", seed=0, steps=2, size=64)
    pair = pipe.submit(prompts[:2], seed=5, steps=2)
    watched.gate.set()
    results = [future.result(PATIENCE_S) for future in singles]
    assert watched.calls == [(1, 32, 1), (2, 32, 3)] or watched.calls[:2] == [(1, 32, 1), (2, 32, 3)]
    for seed, (prompt, result) in enumerate(zip(prompts, results, strict=True)):
        assert equal(result, alone(prompt, seed=seed, steps=2)) and result.num_images_in_call == 3
    assert equal(pair.result(PATIENCE_S), alone(prompts[:2], seed=5, steps=2))
    assert equal(other.result(PATIENCE_S), alone("a dog", seed=0, steps=2, size=64))
    assert watched.calls == [(1, 32, 1), (2, 32, 3), (2, 64, 1), (2, 32, 2)]
    assert held.result().num_images_in_call == 1


def test_rows_of_an_earlier_call_are_not_left_in_a_smaller_one(
    pipe: Pipeline, watched: WatchedExecutor, alone: Pipeline
) -> None:
    pipe(["a dog", "a red apple"], seed=1)
    assert equal(pipe("a dog", seed=1), alone("a dog", seed=1))
    assert watched.calls == [(1, 32, 2), (1, 32, 1)]


def test_the_queue_time_is_the_wait(pipe: Pipeline, watched: WatchedExecutor) -> None:
    hold(pipe, watched)
    waiting = pipe.submit("a dog", seed=0)
    time.sleep(0.05)
    watched.gate.set()
    timings_ms = waiting.result(PATIENCE_S).timings_ms
    assert 45 <= timings_ms["queue"] <= timings_ms["total"]


def test_one_thread_opens_uses_and_closes(bundle: Bundle, watched: WatchedExecutor) -> None:
    with Pipeline.of(bundle, open_executor=watched.open) as pipeline:
        pipeline("a dog", seed=0)
        callers = [threading.Thread(target=pipeline, args=("a dog",)) for _ in range(4)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
    ((opened, on), (closed, then)) = watched.events
    assert (opened, closed) == ("open", "close") and watched.threads == {on} == {then} != {threading.get_ident()}


def fail_for(word: int) -> Any:
    def on_draw(ids_BT: np.ndarray[Any, Any]) -> None:
        if word in ids_BT[:, 1:]:
            raise ValueError("this prompt cannot be drawn")

    return on_draw


def test_what_fails_in_a_shared_call_fails_alone(pipe: Pipeline, watched: WatchedExecutor, alone: Pipeline) -> None:
    hold(pipe, watched)
    watched.on_draw = fail_for(9)  # apple
    good, bad, last = (pipe.submit(prompt, seed=1) for prompt in ("a dog", "a red apple", "a house"))
    watched.gate.set()
    assert equal(good.result(PATIENCE_S), alone("a dog", seed=1))
    with pytest.raises(ValueError, match="cannot be drawn"):
        bad.result(PATIENCE_S)
    assert equal(last.result(PATIENCE_S), alone("a house", seed=1)) and last.result().num_images_in_call == 1
    assert pipe("a dog", seed=0).steps == 1


def test_an_image_that_is_no_number_spoils_no_other(
    pipe: Pipeline, watched: WatchedExecutor, alone: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = watched.draw

    def not_finite(*call: Any) -> Drawing:
        drawing = draw(*call)
        return Drawing(images_BHWC=drawing.images_BHWC, timings_ms={}, finite=9 not in call[2][:, 1:])

    monkeypatch.setattr(watched, "draw", not_finite)
    hold(pipe, watched)
    good, bad = (pipe.submit(prompt, seed=1) for prompt in ("a dog", "a red apple"))
    watched.gate.set()
    assert equal(good.result(PATIENCE_S), alone("a dog", seed=1))
    with pytest.raises(EngineMismatch, match="not finite"):
        bad.result(PATIENCE_S)


def test_a_late_request_is_not_drawn(pipe: Pipeline, watched: WatchedExecutor) -> None:
    hold(pipe, watched)
    late, patient = pipe.submit("a dog", deadline_s=0.02), pipe.submit("a dog", steps=2, deadline_s=1e9)
    time.sleep(0.05)
    watched.gate.set()
    with pytest.raises(DeadlineExceeded, match="deadline of 0.02 s"):
        late.result(PATIENCE_S)
    patient.result(PATIENCE_S)
    assert watched.calls == [(1, 32, 1), (2, 32, 1)]


def test_a_cancelled_request_is_not_drawn_and_a_running_one_is(pipe: Pipeline, watched: WatchedExecutor) -> None:
    held, waiting = hold(pipe, watched), pipe.submit("a dog")
    assert waiting.cancel() and not held.cancel()
    watched.gate.set()
    assert held.result(PATIENCE_S).images
    pipe("a dog", steps=2)
    assert watched.calls == [(1, 32, 1), (2, 32, 1)]


def test_images_of_the_last_call_are_not_kept(pipe: Pipeline, watched: WatchedExecutor) -> None:
    import gc
    import weakref

    future = pipe.submit(["a dog", "a dog", "a dog"], seed=0)
    array = weakref.ref(future.result().array_BHWC.base)
    assert array() is not None
    del future
    wait_until(lambda: gc.collect() >= 0 and array() is None)


# --- closing ------------------------------------------------------------------------------------------------------------


def closing(pipe: Pipeline, wait: bool) -> threading.Thread:
    thread = threading.Thread(target=pipe.close, kwargs={"wait": wait})
    thread.start()
    return thread


def test_closing_draws_what_waits(pipe: Pipeline, watched: WatchedExecutor) -> None:
    futures = [hold(pipe, watched), pipe.submit("a dog", steps=2)]
    closer = closing(pipe, wait=True)
    wait_until(lambda: _is_refused(pipe))
    assert not any(future.done() for future in futures)
    watched.gate.set()
    assert all(future.result(PATIENCE_S).images for future in futures)
    closer.join(PATIENCE_S)
    assert [event for event, _ in watched.events] == ["open", "close"] and pipe.compute_dtypes == {}


def _is_refused(pipe: Pipeline) -> bool:
    try:
        pipe.submit("a dog").cancel()
    except PipelineClosed:
        return True
    return False


def test_closing_at_once_refuses_what_waits(pipe: Pipeline, watched: WatchedExecutor) -> None:
    held, waiting = hold(pipe, watched), pipe.submit("a dog")
    closer = closing(pipe, wait=False)
    with pytest.raises(PipelineClosed, match="is closed; load it again"):
        waiting.result(PATIENCE_S)  # at once: the gate is still shut
    watched.gate.set()
    assert held.result(PATIENCE_S).images  # what is being drawn is finished
    closer.join(PATIENCE_S)
    assert watched.calls == [(1, 32, 1)] and watched.events[-1][0] == "close"


def test_a_second_closer_may_lose_patience(pipe: Pipeline, watched: WatchedExecutor) -> None:
    hold(pipe, watched)
    waiting = pipe.submit("a dog")
    closers = [closing(pipe, wait=True) for _ in range(4)] + [closing(pipe, wait=False)]
    assert isinstance(waiting.exception(PATIENCE_S), PipelineClosed)
    watched.gate.set()
    for closer in closers:
        closer.join(PATIENCE_S)
        assert not closer.is_alive()
    pipe.close()
    assert [event for event, _ in watched.events] == ["open", "close"]


def test_who_comes_in_while_the_thread_ends_is_refused(pipe: Pipeline, watched: WatchedExecutor) -> None:
    worker, late = pipe._worker, pipe._request("a dog", 0, None, None, None, None, None)
    assert worker is not None
    worker.queue.enter(late, wait=False)  # it has its place, and is not in line when the end comes
    worker.queue.end()
    assert isinstance(late.exception(PATIENCE_S), PipelineClosed)
    with pytest.raises(PipelineClosed):
        worker.queue.line_up(late)


def test_an_exception_in_the_with_block_does_not_wait_for_the_queue(bundle: Bundle, watched: WatchedExecutor) -> None:
    with pytest.raises(KeyError), Pipeline.of(bundle, open_executor=watched.open) as pipeline:
        hold(pipeline, watched)
        waiting = pipeline.submit("a dog")
        threading.Timer(0.05, watched.gate.set).start()
        raise KeyError
    assert isinstance(waiting.exception(PATIENCE_S), PipelineClosed) and watched.calls == [(1, 32, 1)]


def test_what_closing_the_executor_raises_reaches_the_closer(bundle: Bundle, watched: WatchedExecutor) -> None:
    def on_close() -> None:
        raise OSError("the cache cannot be written")

    watched.on_close = on_close
    pipeline = Pipeline.of(bundle, open_executor=watched.open)
    with pytest.raises(OSError, match="cache cannot be written"):
        pipeline.close()
    pipeline.close()


def test_a_callback_may_close_and_submit_but_not_wait(pipe: Pipeline, watched: WatchedExecutor) -> None:
    happened: list[Any] = []

    def callback(future: concurrent.futures.Future[Result]) -> None:
        happened.append(pipe.submit("a dog", steps=2))
        for wait_for_itself in (lambda: pipe("a dog"), lambda: pipe.submit("a dog", wait=True), lambda: pipe.refit({})):
            with pytest.raises(NitroError, match="in the callback of a future.*use submit"):
                wait_for_itself()
        pipe.close()
        happened.append("closed")

    held = hold(pipe, watched)
    held.add_done_callback(callback)
    watched.gate.set()
    wait_until(lambda: len(happened) == 2)
    assert happened[0].result(PATIENCE_S).images


@pytest.mark.parametrize("error", [OSError("no such device"), EngineMismatch("another GPU")])
def test_what_opening_raises_reaches_the_loader(error: Exception, bundle: Bundle, watched: WatchedExecutor) -> None:
    def on_open() -> None:
        raise error

    watched.on_open = on_open
    before = threading.active_count()
    with pytest.raises(type(error), match=str(error)):
        Pipeline.of(bundle, open_executor=watched.open)
    wait_until(lambda: threading.active_count() == before)


def test_what_the_first_load_raises_reaches_the_loader(
    bundle: Bundle, watched: WatchedExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prepare(num_steps: int, size_px: int) -> bool:
        raise MemoryError("4 GiB asked for, 1 GiB free")

    monkeypatch.setattr(watched, "prepare", prepare)
    with pytest.raises(MemoryError, match="4 GiB asked"):
        Pipeline.of(bundle, open_executor=watched.open)
    assert [event for event, _ in watched.events] == ["open", "close"]


# --- a lost device ------------------------------------------------------------------------------------------------------


def lose(ids_BT: object) -> None:
    raise DeviceLost("CUDA error 719 (cudaErrorLaunchFailure)")


def test_a_lost_device_fails_all_and_reopening_goes_on(pipe: Pipeline, watched: WatchedExecutor, alone: Pipeline) -> None:
    held = hold(pipe, watched)
    waiting = [pipe.submit("a dog", seed=seed, steps=steps) for seed, steps in enumerate((1, 1, 1, 2))]
    watched.on_draw, watched.on_close = lose, lambda: time.sleep(0.1)
    watched.gate.set()
    for future in (held, *waiting):
        with pytest.raises(DeviceLost, match=r"CUDA error 719 .*pipe.reopen\(\)"):
            future.result(PATIENCE_S)
    for call in (pipe, pipe.submit):
        with pytest.raises(DeviceLost, match=r"cannot draw any more: CUDA error 719 .*pipe.reopen\(\)"):
            call("a dog")  # type: ignore[operator]
    assert watched.calls == [(1, 32, 1)]
    watched.on_draw = lambda ids_BT: None
    pipe.reopen()
    assert equal(pipe("a dog", seed=3, steps=2), alone("a dog", seed=3, steps=2))
    assert [event for event, _ in watched.events] == ["open", "close", "open"]  # freed before it is loaded anew


def test_a_device_lost_while_a_shared_call_is_repeated(pipe: Pipeline, watched: WatchedExecutor) -> None:
    hold(pipe, watched)
    futures = [pipe.submit("a dog", seed=seed) for seed in range(3)]
    failures: Iterator[Exception | None] = iter([None, ValueError("together"), None, DeviceLost("CUDA error 700")])

    def on_draw(ids_BT: object) -> None:
        failure = next(failures)
        if failure is not None:
            raise failure

    watched.on_draw = on_draw
    watched.gate.set()
    assert futures[0].result(PATIENCE_S).images  # alone, before the loss
    for future in futures[1:]:
        assert isinstance(future.exception(PATIENCE_S), DeviceLost)


def test_many_threads_reopen_once(pipe: Pipeline, watched: WatchedExecutor) -> None:
    watched.on_draw = lose
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        lost = list(threads.map(lambda _: isinstance(pipe.submit("a dog").exception(), DeviceLost), range(1)))
        watched.on_draw = lambda ids_BT: None
        list(threads.map(lambda _: pipe.reopen(), range(8)))
        images = list(threads.map(lambda seed: pipe("a dog", seed=seed).images, range(8)))
    assert lost == [True] and len(images) == 8
    assert [event for event, _ in watched.events] == ["open", "close", "open"]


def test_reopening_may_fail_and_be_tried_again(pipe: Pipeline, watched: WatchedExecutor) -> None:
    def on_open() -> None:
        raise DeviceLost("CUDA error 46: the device is not ready")

    pipe.reopen()  # nothing is lost
    watched.on_draw = lose
    with pytest.raises(DeviceLost):
        pipe("a dog")
    watched.on_open, watched.on_draw = on_open, lambda ids_BT: None
    with pytest.raises(DeviceLost, match="error 46"):
        pipe.reopen()
    with pytest.raises(DeviceLost, match="error 719"):
        pipe("a dog")
    watched.on_open = lambda: None
    pipe.reopen()
    assert pipe("a dog").images


def test_a_closed_pipeline_is_not_reopened(pipe: Pipeline, watched: WatchedExecutor) -> None:
    watched.on_draw = lose
    with pytest.raises(DeviceLost):
        pipe("a dog")
    pipe.close()
    for call in (pipe.reopen, lambda: pipe("a dog")):
        with pytest.raises(PipelineClosed, match="is closed; load it again"):
            call()


def test_a_callback_cannot_reopen(pipe: Pipeline, watched: WatchedExecutor) -> None:
    errors: list[BaseException] = []

    def callback(future: concurrent.futures.Future[Result]) -> None:
        try:
            pipe.reopen()
        except NitroError as exc:
            errors.append(exc)

    held = hold(pipe, watched)
    held.add_done_callback(callback)
    watched.on_draw = lose
    watched.gate.set()
    wait_until(lambda: bool(errors))
    assert "would wait for itself" in str(errors[0])


# --- the interpreter's exit ---------------------------------------------------------------------------------------------

EXIT = """
import sys, threading, time
sys.path[:0] = {path!r}
from nitro_rt import Pipeline, open_bundle
from watched_executor import WatchedExecutor
bundle = open_bundle({folder!r})
watched = WatchedExecutor(bundle)
watched.on_close = lambda: print("freed")
pipe = Pipeline.of(bundle, open_executor=watched.open)
pipe("a dog")
{then}
"""
EXITS = {
    "idle": "",
    "in the middle of a call": """
watched.on_draw = lambda ids: (time.sleep(0.3), print("drawn"))
pipe.submit("a dog"); watched.wait_for_call(); watched.wait_for_call()
pipe.submit("a dog", steps=2)
""",
    "with a daemon that waits": """
watched.on_draw = lambda ids: (time.sleep(0.3), print("drawn"))
threading.Thread(target=lambda: [pipe("a dog") for _ in range(1000)], daemon=True).start()
watched.wait_for_call(); watched.wait_for_call()
""",
}


@pytest.mark.parametrize("name", EXITS)
def test_the_interpreter_ends_and_everything_is_freed(name: str, bundle: Bundle) -> None:
    script = EXIT.format(path=[str(Path(__file__).parents[1])], folder=str(bundle.folder), then=EXITS[name])
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == (["freed"] if name == "idle" else ["drawn", "freed"])
    if name != "with a daemon that waits":  # its own traceback: PipelineClosed
        assert done.stderr == ""

"""The queue by itself: order, batches, places, deadlines, refusal."""

from __future__ import annotations

import concurrent.futures
import time
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest

from nitro_rt.errors import DeadlineExceeded, PipelineClosed, QueueFull
from nitro_rt.request import Errand, Request, Turn
from nitro_rt.request_queue import RequestQueue


def request(steps: int = 1, rows: int = 1, size_px: int = 32, deadline_s: float | None = None) -> Request:
    made = Request(
        prompts=("a dog",) * rows,
        seed=0,
        num_steps=steps,
        size_px=size_px,
        start_s=time.perf_counter(),
        deadline_s=deadline_s,
    )
    made.rows = (np.zeros((rows, 2), np.int64), np.zeros((rows, 2), np.int64), np.zeros((steps, rows, 1, 1, 1), np.float32))
    return made


def lined_up(*requests: Turn[Any], max_waiting: int = 64) -> RequestQueue:
    queue = RequestQueue(max_waiting)
    for each in requests:
        queue.enter(each, wait=False)
        queue.line_up(each)
    return queue


def closed() -> PipelineClosed:
    return PipelineClosed("closed")


def batches(queue: RequestQueue, max_rows: int) -> list[list[Request] | Errand]:
    """All that is in line, as it would be drawn."""
    queue.end()
    return list(iter(lambda: queue.take(max_rows), None))


def test_equal_steps_and_sizes_share_a_call_and_the_oldest_comes_first() -> None:
    one, two, other, three, large = request(), request(), request(steps=2), request(), request(size_px=64)
    found = batches(lined_up(one, other, large, two, three), 2)
    assert found == [[one, two], [other], [large], [three]]


def test_a_stream_of_equals_starves_nobody() -> None:
    first, other = request(), request(steps=2)
    queue = lined_up(first, other)
    for _ in range(3):
        late = request()
        queue.enter(late, wait=False)
        queue.line_up(late)
    assert [len(batch) for batch in batches(queue, 2) if isinstance(batch, list)] == [2, 1, 2]


def test_requests_are_not_split_nor_overtaken_by_equals() -> None:
    one, three, single = request(), request(rows=3), request()
    assert batches(lined_up(one, three, single), 3) == [[one], [three], [single]]
    two, one, last = request(rows=2), request(), request()
    assert batches(lined_up(two, one, last), 3) == [[two, one], [last]]


def test_nothing_overtakes_an_errand() -> None:
    def change(executor: object) -> None: ...

    one, other, errand, two = request(), request(steps=2), Errand(change), request()
    assert batches(lined_up(one, other, errand, two), 3) == [[one], [other], errand, [two]]
    gone = Errand(change)
    queue = lined_up(gone, one := request())
    assert gone.cancel() and gone.run is None and batches(queue, 1) == [[one]]


def test_what_is_taken_runs_and_cannot_be_cancelled() -> None:
    each = request()
    assert lined_up(each).take(1) == [each]
    assert each.running() and not each.cancel() and not each.cancelled()


def test_a_cancelled_request_is_not_taken_and_keeps_nothing() -> None:
    gone, kept = request(), request()
    queue = lined_up(gone, kept)
    assert gone.cancel() and gone.cancel() and gone.cancelled() and gone.rows is None
    assert concurrent.futures.wait([gone], timeout=0).done == {gone}
    assert batches(queue, 2) == [[kept]]


def test_a_full_queue_says_so_and_a_place_is_free_after_taking_or_cancelling() -> None:
    first, second = request(), request()
    queue = lined_up(first, second, max_waiting=2)
    with pytest.raises(QueueFull, match="2 requests wait already.*wait=True.*max_queue"):
        queue.enter(request(), wait=False)
    queue.take(1)
    queue.enter(request(), wait=False)
    with pytest.raises(QueueFull):
        queue.enter(request(), wait=False)
    second.cancel()
    queue.enter(request(), wait=False)


def admission(waiting: Request) -> Future[None]:
    assert waiting.admission is not None
    return waiting.admission


def test_those_who_wait_for_a_place_get_it_in_order() -> None:
    first = request()
    queue = lined_up(first, max_waiting=1)
    second, gone, third = request(), request(), request()
    for each in (second, gone, third):
        queue.enter(each, wait=True)
    assert not admission(second).done()
    assert admission(gone).cancel()  # as asyncio does it
    first.cancel()
    assert admission(second).done() and not admission(third).done()
    second.cancel()
    assert admission(third).done()


def test_who_stops_waiting_for_a_place_leaves_nothing() -> None:
    first = request()
    queue = lined_up(first, max_waiting=1)
    waiting = request()
    queue.enter(waiting, wait=True)
    assert waiting.cancel()
    queue.take(1)
    assert not admission(waiting).done()
    queue.enter(request(), wait=False)


def test_late_requests_fail_wherever_they_stand() -> None:
    first, late, last = request(), request(steps=2, deadline_s=-1), request(deadline_s=60)
    queue = lined_up(first, late, last)
    assert queue.take(2) == [first, last]
    error = late.exception(timeout=0)
    assert isinstance(error, DeadlineExceeded) and isinstance(error, TimeoutError)
    assert "deadline of -1 s" in str(error) and late.rows is None


def test_a_line_of_late_requests_is_the_end_of_the_line() -> None:
    late = request(deadline_s=-1)
    assert batches(lined_up(late), 1) == []
    assert isinstance(late.exception(timeout=0), DeadlineExceeded)


@pytest.mark.parametrize("waiting", [False, True])
def test_refusing(waiting: bool) -> None:
    inside, ready, outside = request(), request(), request()
    queue = lined_up(inside, max_waiting=2)
    queue.enter(ready, wait=False)
    queue.enter(outside, wait=True)
    queue.refuse(closed, waiting=waiting)
    assert isinstance(admission(outside).exception(timeout=0), PipelineClosed)
    for call in (lambda: queue.enter(request(), wait=True), lambda: queue.line_up(ready)):
        with pytest.raises(PipelineClosed):
            call()
    assert batches(queue, 1) == ([] if waiting else [[inside]])
    if waiting:
        assert isinstance(inside.exception(timeout=0), PipelineClosed)
        assert inside.exception() is not ready.exception(timeout=0)  # one each: raising changes an error's traceback


def test_errors_and_results_let_go_of_the_noise() -> None:
    failed, done = request(), request()
    assert lined_up(failed, done).take(2) == [failed, done] and failed.rows is not None
    failed.fail(ValueError("no"))
    result: Any = object()
    done.finish(result)
    assert failed.rows is None and done.rows is None and done.result() is result


def test_a_signal_handler_may_close_in_the_middle_of_any_call() -> None:
    """It runs between two instructions of the main thread, so it finds the lock taken by its own thread."""

    class Interrupted(set[Turn[Any]]):
        def add(self, each: Turn[Any]) -> None:
            queue.refuse(closed, waiting=True)
            queue.end()
            super().add(each)

    queue = RequestQueue(1)
    queue._places = Interrupted()
    late = request()
    queue.enter(late, wait=False)
    with pytest.raises(PipelineClosed):
        queue.line_up(late)
    assert queue.take(1) is None

"""The simulator earns its trust: a correct sequence passes whatever the order, and every planted fault is caught."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from cuda.core._utils.cuda_utils import CUDAError

from cudasim import Simulation, simulate
from cudasim.operations import MOODS
from cudasim.sequence import NUM_BYTES, Sequence

NUM_ORDERS = 200
Open = Callable[..., Sequence]
every_mood = pytest.mark.parametrize("seed", range(len(MOODS)), ids=MOODS)


@pytest.fixture
def sequence() -> Sequence:
    """In the lazy mood: nothing runs before somebody waits for it."""
    return Sequence(simulate(0))


def kinds(simulation: Simulation) -> set[str]:
    """The hazards, after everything ran."""
    try:
        simulation.check()
    except AssertionError:
        pass
    return {hazard.kind for hazard in simulation.hazards}


def in_thread(function: Callable[[], Any]) -> Any:
    """What a function gives or raises in another thread."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append(function())
        except Exception as exc:
            outcome.append(exc)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(timeout=60)
    return outcome[0]


@pytest.mark.parametrize("seeds", [range(first, first + 50) for first in range(0, NUM_ORDERS, 50)], ids=str)
def test_the_correct_sequence_passes_in_every_order(seeds: range) -> None:
    for seed in seeds:
        simulation = simulate(seed)
        sequence = Sequence(simulation)
        assert (sequence.draw(3) == 7).all()
        sequence.capture()
        for value in range(3):
            assert (sequence.replay(value) == 2 * value + 1).all()
        sequence.close()
        simulation.check()
        assert simulation.leaks() == []
        assert simulation.memory.used_bytes == 0


def test_the_adversary_uses_its_freedom() -> None:
    """Unordered streams run in one order for one seed and in the other for another."""
    orders = set()
    for seed in range(20):
        simulation = simulate(seed)
        sequence = Sequence(simulation)
        sequence.main.sync()
        for stream, buffer in ((sequence.main, sequence.x), (sequence.side, sequence.y)):
            buffer.fill(1, stream=stream)
        ends = [stream.record() for stream in (sequence.main, sequence.side)]
        simulation.cuda.Device(0).sync()
        orders.add(ends[0]._operation.finished_ms < ends[1]._operation.finished_ms)
    assert orders == {True, False}


def test_two_replays_of_one_graph_follow_each_other_whatever_their_streams(sequence: Sequence) -> None:
    sequence.draw(3)
    sequence.capture()
    sequence.graph.launch(sequence.main)
    sequence.graph.launch(sequence.side)
    sequence.simulation.check()


@pytest.mark.parametrize("nonblocking", [False, True])
def test_the_default_stream_waits_for_blocking_streams_only(sequence: Sequence, nonblocking: bool) -> None:
    cuda = sequence.simulation.cuda
    stream = cuda.Device(0).create_stream(options=cuda.StreamOptions(nonblocking=nonblocking))
    stream.wait(sequence.main)
    for queue in (stream, cuda.LEGACY_DEFAULT_STREAM, stream):
        sequence.x.fill(0, stream=queue)
    assert kinds(sequence.simulation) == ({"race"} if nonblocking else set())


def test_an_eager_device_is_done_before_anybody_waits() -> None:
    sequence = Sequence(simulate(MOODS.index("eager")))
    sequence.enqueue()
    assert sequence.events[1].is_done


# --- missing order ----------------------------------------------------------------------------------------------------


@every_mood
@pytest.mark.parametrize("missing", [0, 1])
def test_a_missing_event_is_a_race(seed: int, missing: int) -> None:
    sequence = Sequence(simulate(seed))
    hand_over = sequence.hand_over
    sequence.hand_over = lambda event, *streams: None if event is sequence.events[missing] else hand_over(event, *streams)
    sequence.draw(3)
    sequence.draw(4)
    assert "race" in kinds(sequence.simulation)


def test_a_missing_event_gives_a_wrong_result_in_some_order() -> None:
    results = set()
    for seed in range(20):
        sequence = Sequence(simulate(seed))
        sequence.draw(3)  # so that the next one reads old values, not poison
        sequence.hand_over = lambda event, *streams: None  # type: ignore[method-assign]
        sequence.draw(5)
        sequence.side.sync()
        results.add(float(sequence.result[0]))
    assert 11.0 in results and len(results) > 1


def test_a_missing_event_leaves_half_of_the_graph_out(sequence: Sequence) -> None:
    sequence.draw(3)
    sequence.hand_over = lambda event, *streams: None  # type: ignore[method-assign]
    sequence.capture()
    sequence.side.sync()
    assert not (sequence.replay(5) == 11).all()
    assert kinds(sequence.simulation) == {"escaped"}


def test_a_fork_that_is_not_joined_does_not_end(sequence: Sequence) -> None:
    sequence.draw(3)
    hand_over = sequence.hand_over
    sequence.hand_over = lambda event, *streams: None if event is sequence.events[1] else hand_over(event, *streams)
    with sequence.building() as builder:
        sequence.enqueue()
        with pytest.raises(CUDAError, match="CUDA_ERROR_STREAM_CAPTURE_UNJOINED"):
            builder.end_building()
        with pytest.raises(RuntimeError, match="has not finished building"):
            builder.complete()


def test_a_missing_final_sync_reads_poison(sequence: Sequence) -> None:
    sequence.draw(3)
    sequence.wait = lambda: None  # type: ignore[method-assign]
    assert np.isnan(sequence.draw(4)).all()


@pytest.mark.parametrize("seed", range(8))
def test_a_missing_final_sync_never_gives_the_result_before(seed: int) -> None:
    """The old picture is the likeliest thing to see on a real GPU, and the least likely to be noticed."""
    sequence = Sequence(simulate(seed))
    sequence.draw(3)
    sequence.wait = lambda: None  # type: ignore[method-assign]
    assert not (sequence.draw(4) == 7).any()


def test_an_input_overwritten_too_early_is_noticed(sequence: Sequence) -> None:
    sequence.draw(3)
    sequence.values[:] = 4
    sequence.enqueue()
    sequence.values[:] = 5
    sequence.wait()
    assert (sequence.result == 11).all()
    assert kinds(sequence.simulation) == {"host write"}


def test_memory_is_only_usable_in_the_order_of_its_allocation(sequence: Sequence) -> None:
    sequence.pool.allocate(64, stream=sequence.main).fill(0, stream=sequence.side)
    assert kinds(sequence.simulation) == {"race"}


# --- stale addresses --------------------------------------------------------------------------------------------------


@every_mood
def test_a_buffer_reallocated_after_the_capture_is_noticed(seed: int) -> None:
    sequence = Sequence(simulate(seed))
    sequence.draw(3)
    sequence.capture()
    sequence.y.close(sequence.main)
    sequence.y = sequence.allocate(NUM_BYTES)
    sequence.bind()
    assert np.isnan(sequence.replay(4)).all(), "the replay writes and reads the old address"
    assert kinds(sequence.simulation) == {"use after free"}
    assert (sequence.draw(4) == 9).all(), "which is right again once the addresses are of now"


def test_a_stale_address_in_a_replay_is_noticed_although_nothing_was_freed(sequence: Sequence) -> None:
    sequence.draw(3)
    sequence.capture()
    old, sequence.z = sequence.z, sequence.allocate(NUM_BYTES)
    sequence.bind()  # the graph still writes into the old one
    sequence.z.fill(0, stream=sequence.main)
    sequence.wait()
    sequence.values[:] = 4
    sequence.graph.launch(sequence.main)
    sequence.z.copy_to(sequence.pinned_out, stream=sequence.main)
    sequence.wait()
    assert not (sequence.result == 9).any()
    assert not old.is_closed


def test_use_after_free(sequence: Sequence) -> None:
    sequence.draw(3)
    sequence.x.close(sequence.main)
    assert sequence.double.execute_async_v3(int(sequence.main.handle))
    assert kinds(sequence.simulation) == {"use after free"}


def test_memory_freed_under_pending_work_of_another_stream_is_noticed(sequence: Sequence) -> None:
    sequence.draw(3)
    sequence.enqueue()
    sequence.hand_over = lambda event, *streams: None  # type: ignore[method-assign]
    sequence.execute(sequence.increment, sequence.side)
    sequence.y.close(sequence.main)
    assert "race" in kinds(sequence.simulation)


@every_mood
def test_pinned_memory_freed_under_a_pending_copy_is_noticed(seed: int) -> None:
    sequence = Sequence(simulate(seed))
    sequence.draw(3)
    sequence.enqueue()
    sequence.pinned_out.close()  # waits for the default stream, as cuda.core does: not for ours
    assert "use after free" in kinds(sequence.simulation)


@every_mood
def test_a_context_destroyed_under_its_work_is_noticed(seed: int) -> None:
    sequence = Sequence(simulate(seed))
    sequence.draw(3)
    sequence.enqueue()
    sequence.double = None
    assert "destroyed" in kinds(sequence.simulation)


def test_a_replay_of_a_destroyed_context_is_noticed(sequence: Sequence) -> None:
    sequence.draw(3)
    sequence.capture()
    sequence.double = None
    sequence.replay(4)
    assert kinds(sequence.simulation) == {"destroyed", "unwritten"}


# --- memory -----------------------------------------------------------------------------------------------------------


@every_mood
def test_two_stages_sharing_memory_while_both_live_race(seed: int) -> None:
    """One scratch memory is right for engines that follow each other, and wrong for these."""
    sequence = Sequence(simulate(seed))
    sequence.draw(3)
    sequence.execute(sequence.double, sequence.main)
    sequence.execute(sequence.increment, sequence.side)
    sequence.side.sync()
    kinds(sequence.simulation)
    assert any("scratch memory" in hazard.message for hazard in sequence.simulation.hazards if hazard.kind == "race")


def test_one_context_on_two_streams_at_once_is_noticed(sequence: Sequence) -> None:
    """Even with tensors of its own each time: a context has state."""
    sequence.draw(3)
    context = sequence.double.engine.create_execution_context()
    for stream in (sequence.main, sequence.side):
        tensors = {name: sequence.pool.allocate(NUM_BYTES, stream=stream) for name in ("x", "y")}
        tensors["x"].fill(0, stream=stream)
        assert all(context.set_tensor_address(name, buffer.handle) for name, buffer in tensors.items())
        sequence.execute(context, stream)
    kinds(sequence.simulation)
    assert any("the context's state" in hazard.message for hazard in sequence.simulation.hazards if hazard.kind == "race")


def test_a_tensor_in_another_stages_scratch_is_lost(sequence: Sequence) -> None:
    """All is ordered: y is only overwritten between its two uses."""
    sequence.draw(3)
    sequence.increment.set_device_memory(sequence.allocate(1024).handle, 1024)
    third = sequence.increment.engine.create_execution_context(sequence.simulation.trt.ExecutionContextAllocationStrategy(2))
    big = sequence.allocate(1024)
    sequence.y = big
    for context, name in ((sequence.double, "y"), (sequence.increment, "y"), (third, "y")):
        assert context.set_tensor_address(name, big.handle)
    assert third.set_tensor_address("z", sequence.z.handle) and third.set_tensor_address("y", sequence.x.handle)
    third.set_device_memory(big.handle, 1024)
    execute = sequence.execute

    def execute_a_third_between(context: Any, stream: Any) -> None:
        execute(context, stream)
        if context is sequence.double:
            execute(third, stream)

    sequence.execute = execute_a_third_between  # type: ignore[method-assign]
    assert np.isnan(sequence.draw(4)).all()
    assert kinds(sequence.simulation) == {"unwritten"}


def test_an_output_in_its_own_input_or_scratch_is_noticed(sequence: Sequence) -> None:
    assert sequence.double.set_tensor_address("y", sequence.x.handle)
    sequence.upload()
    sequence.execute(sequence.double, sequence.main)
    sequence.double.set_device_memory(sequence.y.handle, 1024)
    assert "overlap" in kinds(sequence.simulation)


def test_fresh_memory_holds_nothing(sequence: Sequence) -> None:
    sequence.upload = lambda: None  # type: ignore[method-assign]
    assert np.isnan(sequence.draw(3)).all()
    assert kinds(sequence.simulation) == {"unwritten"}


def test_an_access_past_the_end_is_noticed(sequence: Sequence) -> None:
    small = sequence.allocate(NUM_BYTES // 2)
    sequence.draw(3)
    assert sequence.increment.set_tensor_address("z", small.handle)
    sequence.execute(sequence.increment, sequence.side)
    assert kinds(sequence.simulation) == {"out of bounds"}


@pytest.mark.parametrize("offset", [4, 128])
def test_an_unaligned_address_is_refused_and_noticed(sequence: Sequence, offset: int) -> None:
    assert not sequence.double.set_tensor_address("x", sequence.x.handle + offset)
    assert kinds(sequence.simulation) == {"unaligned"}


# --- results and leaks ------------------------------------------------------------------------------------------------


@every_mood
def test_a_view_of_the_result_does_not_survive_the_next_replay(seed: int) -> None:
    sequence = Sequence(simulate(seed))
    sequence.draw(3)
    sequence.capture()
    kept = sequence.replay(4)
    assert (kept == 9).all()
    sequence.values[:] = 5
    sequence.graph.launch(sequence.main)
    assert not (kept == 9).any(), "not even before anybody waits"


@pytest.mark.parametrize("forgotten", ["side", "events", "pool", "graph", "z", "pinned_out"])
def test_a_leak_is_found_with_its_place(sequence: Sequence, forgotten: str) -> None:
    sequence.draw(3)
    sequence.capture()
    kept = getattr(sequence, forgotten)
    kept = kept[0] if isinstance(kept, list) else kept
    kept.close = lambda *_: None  # type: ignore[method-assign]
    sequence.close()
    (leak,) = sequence.simulation.leaks()
    assert leak.kind == type(kept).__name__
    assert leak.site.startswith("sequence.py:")


def test_what_is_dropped_without_close_is_a_leak() -> None:
    simulation = simulate()
    device = simulation.cuda.Device(0)
    device.set_current()
    device.create_stream()
    assert [leak.kind for leak in simulation.leaks()] == ["Stream"]


def test_a_context_that_is_still_referred_to_is_a_leak(sequence: Sequence) -> None:
    kept = sequence.double
    sequence.close()
    assert {leak.kind for leak in sequence.simulation.leaks()} >= {"IExecutionContext", "ICudaEngine", "Runtime"}
    del kept
    assert sequence.simulation.leaks() == []


# --- capture ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def capturing(sequence: Sequence) -> Iterator[Sequence]:
    """In the middle of a thread-local capture, which a forbidden call must end."""
    sequence.draw(3)
    builder = sequence.main.create_graph_builder()
    builder.begin_building("thread_local")
    sequence.upload()
    yield sequence
    with pytest.raises(RuntimeError, match="has been invalidated"):
        builder.end_building()
    with pytest.raises(CUDAError, match="CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"):
        builder.close()
    assert (sequence.draw(3) == 7).all(), "the stream works again"


def test_allocation_in_a_capture_is_refused(capturing: Sequence) -> None:
    with pytest.raises(RuntimeError, match="capturing stream"):
        capturing.pool.allocate(64, stream=capturing.main)
    with pytest.raises(CUDAError, match="CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"):
        capturing.simulation.cuda.LegacyPinnedMemoryResource().allocate(64)


def test_freeing_in_a_capture_is_refused(capturing: Sequence) -> None:
    spare = capturing.z
    with pytest.raises(CUDAError, match="CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"):
        spare.close(capturing.main)


@pytest.mark.parametrize("what", ["capturing stream", "other stream", "event", "query", "device"])
def test_waiting_in_a_capture_is_refused(capturing: Sequence, what: str) -> None:
    calls: dict[str, Callable[[], Any]] = {
        "capturing stream": capturing.main.sync,
        "other stream": capturing.side.sync,
        "event": capturing.events[0].sync,
        "query": lambda: capturing.events[0].is_done,
        "device": capturing.simulation.cuda.Device(0).sync,
    }
    with pytest.raises(CUDAError, match="CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"):
        calls[what]()


def test_a_captured_event_cannot_be_waited_for(capturing: Sequence) -> None:
    capturing.main.record(capturing.events[0])
    with pytest.raises(CUDAError, match="CUDA_ERROR_CAPTURED_EVENT"):
        capturing.events[0].sync()


def test_a_captured_event_cannot_be_waited_for_afterwards_and_the_graph_stays_whole(sequence: Sequence) -> None:
    sequence.draw(3)
    with sequence.building() as builder:
        sequence.enqueue()
        builder.end_building()
        with pytest.raises(CUDAError, match="CUDA_ERROR_CAPTURED_EVENT"):
            sequence.events[0].sync()
        sequence.graph = builder.complete()
    assert (sequence.replay(4) == 9).all()


def test_an_event_from_outside_cannot_be_waited_for_in_a_capture(capturing: Sequence) -> None:
    event = capturing.side.record()
    with pytest.raises(CUDAError, match="CUDA_ERROR_STREAM_CAPTURE_ISOLATION"):
        capturing.main.wait(event)


def test_two_captures_do_not_merge(capturing: Sequence) -> None:
    builder = capturing.side.create_graph_builder()
    builder.begin_building("thread_local")
    with pytest.raises(CUDAError, match="CUDA_ERROR_STREAM_CAPTURE_MERGE"):
        capturing.side.wait(capturing.main.record())
    with pytest.raises(CUDAError, match="CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"):
        builder.close()


def test_the_default_stream_is_refused_while_a_blocking_stream_captures(sequence: Sequence) -> None:
    cuda = sequence.simulation.cuda
    blocking = cuda.Device(0).create_stream(options=cuda.StreamOptions(nonblocking=False))
    builder = blocking.create_graph_builder()
    builder.begin_building("relaxed")
    with pytest.raises(CUDAError, match="CUDA_ERROR_STREAM_CAPTURE_IMPLICIT"):
        sequence.x.fill(0, stream=cuda.LEGACY_DEFAULT_STREAM)
    with pytest.raises(CUDAError, match="CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"):
        builder.close()


def test_the_default_stream_in_a_capture_is_noticed(sequence: Sequence) -> None:
    """CUDA allows it while only non-blocking streams capture, and the work is then missing in the graph."""
    sequence.draw(3)
    sequence.simulation.cuda.Device(0).sync()
    with sequence.building() as builder:
        sequence.x.fill(0, stream=sequence.simulation.cuda.LEGACY_DEFAULT_STREAM)
        builder.end_building()
    assert kinds(sequence.simulation) == {"escaped"}


def test_the_default_stream_cannot_be_captured(sequence: Sequence) -> None:
    builder = sequence.simulation.cuda.LEGACY_DEFAULT_STREAM.create_graph_builder()
    with pytest.raises(CUDAError, match="CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"):
        builder.begin_building()
    builder.close()


def test_a_capture_without_a_warm_up_run_fails(sequence: Sequence) -> None:
    with pytest.raises(CUDAError, match="CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"), sequence.building():
        assert not sequence.double.execute_async_v3(int(sequence.main.handle))
    assert "CUDA_ERROR_STREAM_CAPTURE" in sequence.messages[-1]


def test_capture_from_two_threads_is_noticed(sequence: Sequence) -> None:
    """CUDA takes both threads' work into the graph, in whatever order they happen to come."""
    sequence.draw(3)
    device = sequence.simulation.cuda.Device

    def foreign() -> None:
        device(0).set_current()
        sequence.execute(sequence.double, sequence.main)

    with sequence.building() as builder:
        sequence.upload()
        assert in_thread(foreign) is None
        builder.end_building()
    assert kinds(sequence.simulation) == {"foreign thread"}


def test_a_stream_is_captured_once_at_a_time(sequence: Sequence) -> None:
    sequence.draw(3)

    def begin() -> None:
        sequence.simulation.cuda.Device(0).set_current()
        builder = sequence.main.create_graph_builder()
        try:
            builder.begin_building("thread_local")
        finally:
            builder.close()

    with sequence.building() as builder:
        refused = in_thread(begin)
        builder.end_building()
    assert "CUDA_ERROR_ILLEGAL_STATE" in str(refused)


@pytest.mark.parametrize("mode, ends", [("thread_local", False), ("global", False), ("relaxed", True)])
def test_another_thread_ends_only_a_relaxed_capture(sequence: Sequence, mode: str, ends: bool) -> None:
    def end() -> str:
        sequence.simulation.cuda.Device(0).set_current()
        builder.end_building()
        return "ended"

    with sequence.building(mode) as builder:
        outcome = in_thread(end)
    assert ("ended" in str(outcome)) == ends
    assert ends or "CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD" in str(outcome)


@pytest.mark.parametrize("mode, allowed", [("thread_local", True), ("global", False), ("relaxed", True)])
def test_other_threads_allocate_during_a_capture_that_is_not_global(sequence: Sequence, mode: str, allowed: bool) -> None:
    def allocate() -> str:
        sequence.simulation.cuda.Device(0).set_current()
        sequence.simulation.cuda.LegacyPinnedMemoryResource().allocate(64)
        return "allocated"

    builder = sequence.main.create_graph_builder()
    builder.begin_building(mode)
    outcome = in_thread(allocate)
    if allowed:
        assert outcome == "allocated" and builder.is_building
        builder.end_building()
    else:
        assert "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED" in str(outcome)
        with pytest.raises(RuntimeError, match="has been invalidated"):
            builder.end_building()


# --- threads and closed objects ---------------------------------------------------------------------------------------


def test_a_thread_without_a_current_device_is_refused(sequence: Sequence) -> None:
    assert "CUDA_ERROR_INVALID_CONTEXT" in str(in_thread(sequence.main.sync))
    assert in_thread(sequence.simulation.driver.cuMemGetInfo)[0].name == "CUDA_ERROR_INVALID_CONTEXT"


@pytest.mark.parametrize("what", ["stream", "event", "buffer", "pool", "graph", "builder"])
def test_use_after_close_raises(sequence: Sequence, what: str) -> None:
    sequence.draw(3)
    sequence.capture()
    builder = sequence.main.create_graph_builder()
    spare = sequence.allocate(64)
    calls: dict[str, tuple[Any, Callable[[], Any]]] = {
        "stream": (sequence.side, sequence.side.sync),
        "event": (sequence.events[0], sequence.events[0].sync),
        "buffer": (spare, lambda: spare.fill(0, stream=sequence.main)),
        "pool": (sequence.pool, lambda: sequence.allocate(64)),
        "graph": (sequence.graph, lambda: sequence.graph.launch(sequence.main)),
        "builder": (builder, builder.begin_building),
    }
    owned, call = calls[what]
    owned.close()
    assert owned.is_closed
    with pytest.raises(RuntimeError, match="closed"):
        call()

"""Streams and events, as `cuda.core` has them."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from cuda.bindings.driver import CUresult, CUstream
from cuda.core import EventOptions, StreamOptions

from cudasim.driver import cuda_error
from cudasim.operations import Operation, Work
from cudasim.simulation import call_site, driver_call

if TYPE_CHECKING:
    from cudasim.graphs import Capture, GraphBuilder, Node
    from cudasim.simulation import Simulation

LEGACY_HANDLE, PER_THREAD_HANDLE = 1, 2


class Stream:
    """A queue of device work."""

    _simulation: Simulation

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError(
            "Stream objects cannot be instantiated directly. "
            "Please use Device APIs (create_stream) or other Stream APIs (from_handle)."
        )

    def _open(self, handle: int, options: StreamOptions) -> Stream:
        self._handle, self._options = handle, options
        self._is_closed = False
        self._last: Operation | None = None
        self._capture: Capture | None = None
        self._capture_tail: tuple[Node, ...] = ()
        self._simulation.streams[handle] = self
        return self

    # --- cuda.core ----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        if not self._is_closed:
            self._simulation.calls.append("Stream.close")
            self._simulation.closed(self)
        self._is_closed = True

    @property
    def is_closed(self) -> bool:
        return self._is_closed

    @property
    def handle(self) -> CUstream:
        return CUstream(0 if self._is_closed else self._handle)

    @property
    def is_nonblocking(self) -> bool:
        return bool(self._options.nonblocking)

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, int(self.handle)

    def __eq__(self, other: object) -> bool:
        return self._handle == other._handle if isinstance(other, Stream) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._handle)

    @driver_call
    def sync(self) -> None:
        self._check_open()
        self._sync()

    @driver_call
    def record(self, event: Event | None = None, options: EventOptions | None = None) -> Event:
        self._check_open()
        if event is None:
            event = self._simulation.cuda.Event._create(options)
        event._check_open()
        if self._capture is not None:
            self._capture.check_valid()
            event._operation, event._captured = None, (self._capture, self._capture_tail)
        else:
            event._captured = None
            event._operation = self._take(Work("record event", call_site()))
        return event

    @driver_call
    def wait(self, event_or_stream: Event | Stream) -> None:
        self._check_open()
        if isinstance(event_or_stream, Event):
            event_or_stream._check_open()
            self._wait(event_or_stream._operation, event_or_stream._captured)
        elif isinstance(event_or_stream, Stream):
            other = event_or_stream
            other._check_open()
            self._wait(other._last, None if other._capture is None else (other._capture, other._capture_tail))
        else:
            raise ValueError(
                f"only an Event, Stream, or object supporting __cuda_stream__ can be waited, got {type(event_or_stream)}"
            )

    @driver_call
    def create_graph_builder(self) -> GraphBuilder:
        self._check_open()
        return self._simulation.cuda.graph.GraphBuilder._create(self)

    # --- the simulation -----------------------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._is_closed:
            raise RuntimeError("Stream has been closed")

    def _sync(self) -> None:
        """Wait for all work so far."""
        simulation = self._simulation
        if self._capture is not None:
            self._capture.invalidate()
            raise cuda_error(CUresult.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED)
        simulation.refuse_in_capture()
        simulation.count("sync")
        simulation.schedule.finish(self._before())

    def _take(self, work: Work) -> Operation | None:
        """Queue work, or make it a node of the graph that is being captured."""
        self._check_open()
        return self._queue(work)

    def _queue(self, work: Work) -> Operation | None:
        if self._capture is not None:
            self._capture_tail = (self._capture.add(self, work, self._capture_tail),)
            return None
        self._check_captures()
        schedule = self._simulation.schedule
        self._last = schedule.add(work, self._lane(), self._before())
        schedule.pass_time()
        return self._last

    def _lane(self) -> object:
        return "stream", self._handle

    def _before(self) -> list[Operation]:
        """What new work must wait for: the stream's own, and what the legacy default stream orders implicitly."""
        others: list[Stream] = []
        if self._handle == LEGACY_HANDLE:
            others = [stream for stream in list(self._simulation.streams.values()) if not stream.is_nonblocking]
        elif not self.is_nonblocking:
            others = [self._simulation.streams[LEGACY_HANDLE]]
        return [stream._last for stream in (self, *others) if stream._last is not None]

    def _check_captures(self) -> None:
        """For work that is not captured, while something is.

        The legacy default stream waits for all blocking streams, so it cannot be used while one of them captures. Other work
        CUDA takes; from the capturing thread it is most likely meant for the graph, where it is missing.
        """
        for capture in self._simulation.captures:
            if self._handle == LEGACY_HANDLE and not capture.origin.is_nonblocking:
                capture.invalidate()
                raise cuda_error(CUresult.CUDA_ERROR_STREAM_CAPTURE_IMPLICIT)
            if capture.thread == threading.get_ident():
                self._simulation.report("escaped", f"work on a stream that takes no part in the capture ({call_site()})")

    def _wait(self, operation: Operation | None, captured: tuple[Capture, tuple[Node, ...]] | None) -> None:
        if captured is not None:
            captured[0].join(self, captured[1])
        elif operation is not None and self._capture is not None:
            self._capture.invalidate()
            raise cuda_error(CUresult.CUDA_ERROR_STREAM_CAPTURE_ISOLATION)
        elif operation is not None:
            schedule = self._simulation.schedule
            self._last = schedule.add(Work("wait", call_site()), self._lane(), [*self._before(), operation])


class Event:
    """A point in a stream's work."""

    _simulation: Simulation

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("Event objects cannot be instantiated directly. Please use Stream APIs (record).")

    @classmethod
    def _create(cls, options: EventOptions | None) -> Event:
        event = cls.__new__(cls)
        event._options = options or EventOptions()
        event._handle = cls._simulation.new_handle()
        event._operation: Operation | None = None
        event._captured: tuple[Capture, tuple[Node, ...]] | None = None
        event._is_closed = False
        cls._simulation.opened(event)
        return event

    def close(self) -> None:
        self._is_closed = True
        self._simulation.closed(self)

    @property
    def is_closed(self) -> bool:
        return self._is_closed

    @property
    def is_timing_enabled(self) -> bool:
        return bool(self._options.timing_enabled)

    @driver_call
    def sync(self) -> None:
        self._check_readable()
        self._simulation.count("sync")
        if self._operation is not None:
            self._simulation.schedule.finish([self._operation])

    @property
    def is_done(self) -> bool:
        with self._simulation.calling("Event.is_done"):
            self._check_readable()
            self._simulation.schedule.pass_time()
            return self._operation is None or self._operation.is_done

    @driver_call
    def __sub__(self, other: Event) -> float:
        for event in (self, other):
            event._check_open()
            if event._captured is not None:
                raise cuda_error(CUresult.CUDA_ERROR_CAPTURED_EVENT)
        if not (self.is_timing_enabled and other.is_timing_enabled):
            raise RuntimeError(
                "Both Events must be created with timing enabled in order to subtract them; "
                "use EventOptions(timing_enabled=True) when creating both events."
            )
        if self._operation is None or other._operation is None:
            raise RuntimeError(
                "Both Events must be recorded before they can be subtracted; "
                "use Stream.record() to record both events to a stream."
            )
        if not (self._operation.is_done and other._operation.is_done):
            raise RuntimeError(
                "One or both events have not completed; use Event.sync(), Stream.sync(), or Device.sync() to wait for the "
                "events to complete before subtracting them."
            )
        return self._operation.finished_ms - other._operation.finished_ms

    def _check_open(self) -> None:
        if self._is_closed:
            raise RuntimeError("Event has been closed")

    def _check_readable(self) -> None:
        self._check_open()
        if self._captured is not None:
            self._captured[0].invalidate()
            raise cuda_error(CUresult.CUDA_ERROR_CAPTURED_EVENT)
        self._simulation.refuse_in_capture()


def stream_of(thing: object) -> Stream:
    """The stream where a stream or a graph builder is accepted."""
    if isinstance(thing, Stream):
        return thing
    stream = getattr(thing, "stream", None)
    if isinstance(stream, Stream) and hasattr(thing, "__cuda_stream__"):
        return stream
    raise TypeError(f"stream must either be a Stream object or support __cuda_stream__, got {type(thing).__name__}")

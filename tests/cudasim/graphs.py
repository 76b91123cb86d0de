"""Stream capture, graph builders and executable graphs, as `cuda.core.graph` has them."""

from __future__ import annotations

import threading
from collections.abc import Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cuda.bindings.driver import CUresult
from cuda.core.graph import GraphCompleteOptions

from cudasim.driver import cuda_error
from cudasim.operations import Operation, Work
from cudasim.simulation import call_site, driver_call
from cudasim.streams import LEGACY_HANDLE, Stream

if TYPE_CHECKING:
    from cudasim.simulation import Simulation

MODES = ("global", "thread_local", "relaxed")


@dataclass(eq=False)
class Node:
    """Captured work, with the addresses it had then."""

    work: Work
    after: tuple[Node, ...]
    lane: int
    """Which of the captured streams it was on; 0 is the one where the capture began."""


class Capture:
    """What the streams that take part record, until it ends or something forbidden makes it invalid."""

    def __init__(self, simulation: Simulation, origin: Stream, mode: str) -> None:
        self._simulation, self.origin, self.mode = simulation, origin, mode
        self.thread = threading.get_ident()
        self.nodes: list[Node] = []
        self._streams = [origin]
        self.is_valid, self.is_over = True, False
        origin._capture, origin._capture_tail = self, ()
        simulation.captures.append(self)

    def forbids_unsafe_calls(self) -> bool:
        """Whether this thread may not allocate, synchronise or query now."""
        return self.mode == "global" or (self.mode == "thread_local" and self.thread == threading.get_ident())

    def invalidate(self) -> None:
        if not self.is_over:
            self.is_valid = False

    def check_valid(self) -> None:
        if not self.is_valid:
            raise cuda_error(CUresult.CUDA_ERROR_STREAM_CAPTURE_INVALIDATED)

    def add(self, stream: Stream, work: Work, after: tuple[Node, ...]) -> Node:
        self.check_valid()
        if self.thread != threading.get_ident():
            # CUDA takes it into the graph, wherever it falls.
            self._simulation.report("foreign thread", f"{work.name} ({work.site}) is captured from another thread's capture")
        node = Node(work, after, self._streams.index(stream))
        self.nodes.append(node)
        return node

    def join(self, stream: Stream, after: tuple[Node, ...]) -> None:
        """`stream` waits for an event of this capture, and so takes part in it."""
        self.check_valid()
        if self.is_over:
            raise cuda_error(CUresult.CUDA_ERROR_CAPTURED_EVENT)
        if stream._capture is None:
            if stream._handle == LEGACY_HANDLE:
                self.invalidate()
                raise cuda_error(CUresult.CUDA_ERROR_STREAM_CAPTURE_IMPLICIT)
            stream._capture, stream._capture_tail = self, ()
            if stream not in self._streams:
                self._streams.append(stream)
        elif stream._capture is not self:
            self.invalidate()
            stream._capture.invalidate()
            raise cuda_error(CUresult.CUDA_ERROR_STREAM_CAPTURE_MERGE)
        stream._capture_tail = tuple(dict.fromkeys((*stream._capture_tail, *after)))

    def end(self) -> None:
        """Raises: CUDAError if it was invalidated or a stream was not joined again; it is over in both cases."""
        joined = _reach(self.origin._capture_tail)
        is_joined = all(node in joined for stream in self._streams for node in stream._capture_tail)
        for stream in self._streams:
            stream._capture, stream._capture_tail = None, ()
        self._simulation.captures.remove(self)
        self.is_over = True
        self.check_valid()
        if not is_joined:
            self.is_valid = False
            raise cuda_error(CUresult.CUDA_ERROR_STREAM_CAPTURE_UNJOINED)


class GraphBuilder:
    """A graph under construction by stream capture."""

    _simulation: Simulation

    def __init__(self) -> None:
        raise NotImplementedError(
            "directly creating a Graph object can be ambiguous. Please either "
            "call Device.create_graph_builder() or stream.create_graph_builder()"
        )

    @classmethod
    def _create(cls, stream: Stream) -> GraphBuilder:
        builder = cls.__new__(cls)
        builder._stream, builder._capture, builder._is_closed = stream, None, False
        cls._simulation.opened(builder)
        return builder

    def close(self) -> None:
        """Raises: CUDAError if it ends a capture that is invalid; it is closed all the same."""
        with self._simulation.lock:
            if self._is_closed:
                return
            self._is_closed = True
            self._simulation.closed(self)
            if self._capture is not None and not self._capture.is_over:
                self._capture.end()

    @property
    def is_closed(self) -> bool:
        return self._is_closed

    @property
    def stream(self) -> Stream:
        return self._stream

    def __cuda_stream__(self) -> tuple[int, int]:
        return self._stream.__cuda_stream__()

    @driver_call
    def begin_building(self, mode: str | None = "relaxed") -> GraphBuilder:
        self._check_open()
        if self._capture is not None:
            if self._capture.is_over:
                raise RuntimeError("Cannot resume building after building has ended.")
            raise RuntimeError("Graph builder is already building.")
        if mode not in MODES:
            raise ValueError(f"Unsupported build mode: {mode}")
        if self._stream._handle == LEGACY_HANDLE:
            raise cuda_error(CUresult.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED)
        self._stream._check_open()
        if self._stream._capture is not None:
            raise cuda_error(CUresult.CUDA_ERROR_ILLEGAL_STATE)
        self._simulation.count("capture")
        self._capture = Capture(self._simulation, self._stream, mode)
        return self

    @property
    def is_building(self) -> bool:
        self._check_open()
        if self._capture is None or self._capture.is_over:
            return False
        if not self._capture.is_valid:
            raise RuntimeError("Build process encountered an error and has been invalidated. Build process must now be ended.")
        return True

    @driver_call
    def end_building(self) -> GraphBuilder:
        if not self.is_building:
            raise RuntimeError("Graph builder is not building.")
        capture = self._capture
        if capture.mode != "relaxed" and capture.thread != threading.get_ident():
            raise cuda_error(CUresult.CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD)
        capture.end()
        return self

    @driver_call
    def complete(self, options: GraphCompleteOptions | None = None) -> Graph:
        self._check_open()
        if self._capture is None or not self._capture.is_over or not self._capture.is_valid:
            raise RuntimeError("Graph has not finished building.")
        self._simulation.refuse_in_capture()
        return self._simulation.cuda.graph.Graph._create(tuple(self._capture.nodes))

    def _check_open(self) -> None:
        if self._is_closed:
            raise RuntimeError("GraphBuilder has been closed")


class Graph:
    """An executable graph. Every launch queues its nodes anew, with the addresses of the capture."""

    _simulation: Simulation

    def __init__(self) -> None:
        raise RuntimeError("directly constructing a Graph instance is not supported")

    @classmethod
    def _create(cls, nodes: tuple[Node, ...]) -> Graph:
        graph = cls.__new__(cls)
        graph._nodes, graph._is_closed = nodes, False
        graph._last: Operation | None = None
        graph._number = cls._simulation.new_handle()
        cls._simulation.opened(graph)
        return graph

    def close(self) -> None:
        self._is_closed = True
        self._simulation.closed(self)

    @property
    def is_closed(self) -> bool:
        return self._is_closed

    @driver_call
    def upload(self, stream: Stream) -> None:
        self._check_open()
        self._simulation.submit(stream, Work("upload graph", call_site()))

    @driver_call
    def launch(self, stream: Stream) -> None:
        self._check_open()
        stream._check_open()
        if stream._capture is not None:
            raise NotImplementedError("the simulator does not capture a graph's launch")
        stream._check_captures()
        self._simulation.count("replay")
        schedule = self._simulation.schedule
        site = call_site()
        # Two launches of one executable graph never overlap.
        before = [*stream._before(), *([self._last] if self._last is not None else [])]
        begin = schedule.add(Work("begin replay", site), stream._lane(), before)
        queued: dict[Node, Operation] = {}
        for node in self._nodes:
            lane: Hashable = stream._lane() if node.lane == 0 else ("graph", self._number, node.lane)
            after = [queued[earlier] for earlier in node.after] or [begin]
            self._simulation.count(node.work.name.partition(" ")[0])
            queued[node] = schedule.add(node.work, lane, after)
        self._last = stream._last = schedule.add(Work("end replay", site), stream._lane(), [begin, *queued.values()])
        schedule.pass_time()

    def _check_open(self) -> None:
        if self._is_closed:
            raise RuntimeError("Graph has been closed")


def _reach(nodes: tuple[Node, ...]) -> set[Node]:
    """The nodes and all that comes before them."""
    found: set[Node] = set()
    todo = list(nodes)
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo += node.after
    return found

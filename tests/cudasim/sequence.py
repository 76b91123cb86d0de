"""A correct use of the simulated modules, as small as one can be: two engines on two streams, eagerly and as a graph.

    pinned -> x --double--> y --[event]--> increment --> z -> pinned

Tests plant a fault by overriding one method.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from cudasim import Simulation, write_plan

NUM_VALUES = 96
NUM_BYTES = NUM_VALUES * 4
SCRATCH_BYTES = 1024


def engine_graph(operator: str, operand: float, source: str, target: str) -> bytes:
    """An ONNX graph of one operator, with `operand` as its weight `w`."""
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [NUM_VALUES]) for name in (source, target)]
    weight = numpy_helper.from_array(np.full(NUM_VALUES, operand, np.float32), "w")
    node = helper.make_node(operator, [source, "w"], [target])
    graph = helper.make_graph([node], "graph", infos[:1], infos[1:], [weight])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9).SerializeToString()


def plan(operator: str, operand: float, source: str, target: str, **options: Any) -> bytes:
    return write_plan(engine_graph(operator, operand, source, target), scratch_bytes=SCRATCH_BYTES, **options)


def logger(simulation: Simulation) -> tuple[Any, list[str]]:
    """A logger, and the messages that it was given."""
    messages: list[str] = []

    class Logger(simulation.trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            simulation.trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            messages.append(message)

    return Logger(), messages


class Sequence:
    """Opens everything; `draw` runs eagerly, `capture` and `replay` through a graph, `close` frees everything."""

    def __init__(self, simulation: Simulation) -> None:
        self.simulation = simulation
        cuda, trt = simulation.cuda, simulation.trt
        device = cuda.Device(0)
        device.set_current()
        self.main, self.side = (device.create_stream(options=cuda.StreamOptions(nonblocking=True)) for _ in range(2))
        self.events = [device.create_event() for _ in range(2)]
        self.pool = cuda.DeviceMemoryResource(device, cuda.DeviceMemoryResourceOptions())
        self.x, self.y, self.z = (self.allocate(NUM_BYTES) for _ in range(3))
        pinned = cuda.LegacyPinnedMemoryResource()
        self.pinned_in, self.pinned_out = pinned.allocate(NUM_BYTES), pinned.allocate(NUM_BYTES)
        self.values, self.result = (view(buffer) for buffer in (self.pinned_in, self.pinned_out))
        self.logger, self.messages = logger(simulation)
        runtime = trt.Runtime(self.logger)
        engines = [runtime.deserialize_cuda_engine(plan(*what)) for what in (("Mul", 2, "x", "y"), ("Add", 1, "y", "z"))]
        managed = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        self.double, self.increment = (engine.create_execution_context(managed) for engine in engines)
        self.scratch = self.allocate(SCRATCH_BYTES)
        self.graph: Any = None
        self.bind()

    def allocate(self, num_bytes: int) -> Any:
        return self.pool.allocate(num_bytes, stream=self.main)

    def bind(self) -> None:
        for context, tensors in ((self.double, {"x": self.x, "y": self.y}), (self.increment, {"y": self.y, "z": self.z})):
            for name, buffer in tensors.items():
                assert context.set_tensor_address(name, buffer.handle)
            context.set_device_memory(self.scratch.handle, SCRATCH_BYTES)

    # --- one picture --------------------------------------------------------------------------------------------------

    def enqueue(self) -> None:
        self.upload()
        self.execute(self.double, self.main)
        self.hand_over(self.events[0], self.main, self.side)
        self.execute(self.increment, self.side)
        self.pinned_out.copy_from(self.z, stream=self.side)
        self.hand_over(self.events[1], self.side, self.main)

    def upload(self) -> None:
        self.pinned_in.copy_to(self.x, stream=self.main)

    def execute(self, context: Any, stream: Any) -> None:
        if not context.execute_async_v3(int(stream.handle)):
            raise RuntimeError(self.messages[-1])

    def hand_over(self, event: Any, first: Any, second: Any) -> None:
        first.record(event)
        second.wait(event)

    def wait(self) -> None:
        self.main.sync()

    # --- what a user calls --------------------------------------------------------------------------------------------

    def draw(self, value: float) -> NDArray[np.float32]:
        self.values[:] = value
        self.enqueue()
        self.wait()
        return self.result.copy()

    def capture(self) -> None:
        with self.building() as builder:
            self.enqueue()
            self.graph = builder.end_building().complete()

    @contextmanager
    def building(self, mode: str = "thread_local") -> Iterator[Any]:
        """A builder that captures the main stream."""
        builder = self.main.create_graph_builder()
        builder.begin_building(mode)
        try:
            yield builder
        finally:
            builder.close()

    def replay(self, value: float) -> NDArray[np.float32]:
        """A view, which the next replay overwrites."""
        self.values[:] = value
        self.graph.launch(self.main)
        self.wait()
        return self.result

    def close(self) -> None:
        self.main.sync()
        self.double = self.increment = None
        if self.graph is not None:
            self.graph.close()
        for buffer in (self.x, self.y, self.z, self.scratch, self.pinned_in, self.pinned_out):
            buffer.close(self.main)
        self.main.sync()
        for owned in (*self.events, self.pool, self.side, self.main):
            owned.close()


def view(buffer: Any) -> NDArray[np.float32]:
    """The values in pinned memory."""
    return np.ctypeslib.as_array((ctypes.c_float * NUM_VALUES).from_address(int(buffer.handle)))

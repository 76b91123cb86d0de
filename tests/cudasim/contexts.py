"""Execution contexts: they queue an engine's work on streams."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import numpy as np
import tensorrt_rtx as real
from cuda.core._utils.cuda_utils import CUDAError

from cudasim.memory import ALIGNMENT, Access, Allocation
from cudasim.operations import Operation, Work
from cudasim.simulation import call_site
from cudasim.streams import LEGACY_HANDLE, Stream

if TYPE_CHECKING:
    from cudasim.engines import ICudaEngine
    from cudasim.runtime_cache import IRuntimeConfig
    from cudasim.simulation import Simulation

LAZY_BYTES = 4096
"""What a context allocates for itself in its first execution."""


class IExecutionContext:
    """One way to run an engine, with its own tensor addresses and scratch memory."""

    _simulation: Simulation

    def __init__(self) -> None:
        raise TypeError("IExecutionContext: No constructor defined!")

    @classmethod
    def _create(cls, engine: ICudaEngine, config: IRuntimeConfig) -> IExecutionContext:
        simulation = cls._simulation
        simulation.refuse_in_capture()
        context = cls.__new__(cls)
        context._engine, context._config = engine, config
        context._addresses: dict[str, int] = {}
        context._own_memory: list[Allocation] = []
        context._scratch: tuple[int, int] | None = None
        if config.get_execution_context_allocation_strategy() != real.ExecutionContextAllocationStrategy.USER_MANAGED:
            if engine.device_memory_size_v2:
                scratch = simulation.allocate_device(engine.device_memory_size_v2, call_site())
                context._own_memory.append(scratch)
                context._scratch = (scratch.address, scratch.num_bytes)
        context._is_warm = False
        context._state = simulation.memory.allocate_internal("a context's own state").address
        config._compile(engine._digest())
        simulation.born(context)
        return context

    def __del__(self) -> None:
        if "_state" in self.__dict__:
            self._simulation.let_go(self._state, "a context is destroyed")
        for allocation in self.__dict__.get("_own_memory", ()):
            self._simulation.memory.free(allocation)

    @property
    def engine(self) -> ICudaEngine:
        return self._engine

    def get_runtime_config(self) -> IRuntimeConfig:
        return self._config

    def get_tensor_shape(self, name: str) -> real.Dims:
        return self._engine.get_tensor_shape(name)

    def get_tensor_address(self, name: str) -> int:
        return self._addresses.get(name, 0)

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if name not in self._engine._tensors:
            self._fail(f"the engine has no tensor {name!r}")
            return False
        if memory % ALIGNMENT:
            self._simulation.report("unaligned", f"tensor {name} at {memory:#x} ({call_site()}) is not on {ALIGNMENT} bytes")
            self._fail(f"the address of {name} is not aligned to {ALIGNMENT} bytes")
            return False
        self._addresses[name] = int(memory)
        return True

    def set_device_memory(self, memory: int, size: int) -> None:
        if memory % ALIGNMENT:
            self._simulation.report("unaligned", f"scratch memory at {memory:#x} ({call_site()}) is not on {ALIGNMENT} bytes")
        self._scratch = (int(memory), int(size))

    def execute_async_v3(self, stream_handle: int) -> bool:
        """Queue an execution, or add it to the graph that the stream captures. False, with the reason in the log, if not."""
        simulation = self._simulation
        with simulation.lock:
            simulation.calls.append("IExecutionContext.execute_async_v3")
            stream = simulation.streams.get(int(stream_handle) or LEGACY_HANDLE)
            problem = self._problem(stream)
            if problem is None:
                try:
                    self._warm_up(stream)
                    simulation.submit(stream, self._work(call_site()))
                except CUDAError as exc:
                    problem = str(exc)
            if problem is not None:
                self._fail(f"execution failed: {problem}")
            return problem is None

    def _problem(self, stream: Stream | None) -> str | None:
        simulation, engine = self._simulation, self._engine
        code = simulation.refusal()
        if code is not simulation.driver.CUresult.CUDA_SUCCESS:
            return code.name
        if stream is None:
            return "there is no such stream"
        if simulation.fails("execute"):
            return "asked to"
        missing = [name for name in engine._tensors if not self._addresses.get(name)]
        if missing:
            return f"no address is set for {', '.join(missing)}"
        needed = engine.device_memory_size_v2
        if needed and (self._scratch is None or self._scratch[1] < needed):
            return f"the context needs {needed} bytes of device memory and has {self._scratch[1] if self._scratch else 0}"
        return None

    def _warm_up(self, stream: Stream) -> None:
        """The first execution allocates, which a capture does not survive."""
        if self._is_warm:
            return
        if stream._capture is not None:
            stream._capture.invalidate()
        self._simulation.refuse_in_capture()
        if stream._capture is not None:
            stream._capture.check_valid()
        self._own_memory.append(self._simulation.allocate_device(LAZY_BYTES, call_site()))
        self._is_warm = True

    def _work(self, site: str) -> Work:
        """The execution with the addresses of now."""
        simulation, engine = self._simulation, self._engine
        tensors = {
            name: Access(self._addresses[name], _num_bytes(dtype, shape), mode == real.TensorIOMode.OUTPUT, f"tensor {name}")
            for name, (mode, _, dtype, shape) in engine._tensors.items()
        }
        accesses = [
            *tensors.values(),
            Access(self._state, 1, True, "the context's state"),
            Access(engine._state, 1, False, "the engine's weights"),
        ]
        scratch = None
        if engine.device_memory_size_v2:
            scratch = Access(self._scratch[0], engine.device_memory_size_v2, True, "scratch memory")
            accesses.append(scratch)
        self._check_overlaps(accesses, site)
        # A graph holds the work but not the context, as a real one does.
        context_of = weakref.ref(self)
        name = f"execute {' '.join(n for n, access in tensors.items() if access.writes)}"

        def prepare(operation: Operation) -> None:
            if context_of() is None:
                simulation.report("destroyed", f"{operation} runs a context that is no more")

        def run(operation: Operation) -> None:
            context = context_of()
            for access in (*(access for access in tensors.values() if access.writes), *([scratch] if scratch else [])):
                simulation.memory.poison(access)
            if context is not None:
                _compute(context._engine, operation, tensors)

        return Work(name, site, run, tuple(accesses), engine._header.duration_ms, prepare)

    def _check_overlaps(self, accesses: list[Access], site: str) -> None:
        for place, access in enumerate(accesses):
            for other in accesses[:place]:
                if access.overlaps(other) and (access.writes or other.writes):
                    self._simulation.report("overlap", f"{access.what} and {other.what} of one execution ({site}) share memory")

    def _fail(self, message: str) -> None:
        self._engine._runtime._fail(message)


class RtxExecutionContext(IExecutionContext):
    """TensorRT-RTX's, which knows whether it can be captured."""

    def is_stream_capturable(self, stream: int) -> bool:
        return self._is_warm and self._config.cuda_graph_strategy == real.CudaGraphStrategy.DISABLED


def _compute(engine: ICudaEngine, operation: Operation, tensors: dict[str, Access]) -> None:
    """Read the inputs, compute, write the outputs."""
    memory = engine._simulation.memory
    feeds = {
        name: memory.read(access, operation).view(engine._tensors[name][2]).reshape(engine._tensors[name][3])
        for name, access in tensors.items()
        if not access.writes
    }
    names = [name for name, access in tensors.items() if access.writes]
    try:
        results = engine._run(names, feeds)
    except Exception as exc:  # ONNX Runtime raises a class of its own for each status code
        engine._simulation.report("failed", f"{operation} cannot compute: {str(exc).strip().partition(chr(10))[0]}")
        return
    for name, result in zip(names, results, strict=True):
        memory.write(tensors[name], np.ascontiguousarray(result).reshape(-1).view(np.uint8))


def _num_bytes(dtype: np.dtype, shape: tuple[int, ...]) -> int:
    return dtype.itemsize * int(np.prod(shape))

"""The TensorRT runtime: plans, engines and execution contexts. Enumerations and loggers, which need no driver, are real."""

from __future__ import annotations

import hashlib
import weakref
from functools import reduce
from operator import or_
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime
import tensorrt_rtx as real
from cuda.core._utils.cuda_utils import CUDAError

from cudasim import refit, runtime_cache
from cudasim.memory import ALIGNMENT, Access
from cudasim.operations import Operation, Work
from cudasim.plans import HEADER_BYTES, VERSIONS, BadPlan, PlanHeader, read_graph, read_header
from cudasim.sessions import Arrays, session_of, with_weights
from cudasim.simulation import bound, call_site

if TYPE_CHECKING:
    from cudasim.simulation import Simulation

LAZY_BYTES = 4096
"""What a context allocates for itself in its first execution."""
DTYPES = {
    onnx.TensorProto.FLOAT: (real.float32, np.dtype(np.float32)),
    onnx.TensorProto.FLOAT16: (real.float16, np.dtype(np.float16)),
    onnx.TensorProto.INT64: (real.int64, np.dtype(np.int64)),
    onnx.TensorProto.INT32: (real.int32, np.dtype(np.int32)),
    onnx.TensorProto.UINT8: (real.uint8, np.dtype(np.uint8)),
}
REAL_NAMES = (
    "DataType",
    "Dims",
    "EngineStat",
    "ExecutionContextAllocationStrategy",
    "ILogger",
    "Logger",
    "SeekPosition",
    "TensorIOMode",
    "TensorLocation",
    "Weights",
    "float16",
    "float32",
    "int32",
    "int64",
    "int8",
    "nptype",
    "uint8",
    "volume",
)
REAL_RTX_NAMES = ("CudaGraphStrategy", "EngineInvalidityDiagnostics", "EngineValidity")


class IStreamReaderV2:
    """The base of what a plan can be read from instead of a buffer."""

    def __init__(self) -> None:
        pass

    def read(self, num_bytes: int, stream: int) -> bytes:
        raise NotImplementedError

    def seek(self, offset: int, where: real.SeekPosition) -> bool:
        raise NotImplementedError


class Runtime:
    """Deserialises plans."""

    _simulation: Simulation
    _backend = "tensorrt"

    def __init__(self, logger: real.ILogger) -> None:
        if not isinstance(logger, real.ILogger):
            raise TypeError(f"Runtime needs an ILogger, got {type(logger).__name__}")
        self._logger = logger
        self._simulation.born(self)

    @property
    def logger(self) -> real.ILogger:
        return self._logger

    @property
    def engine_header_size(self) -> int:
        return HEADER_BYTES

    def deserialize_cuda_engine(self, serialized_engine: Any) -> ICudaEngine | None:
        """The engine; None where the plan is not for this machine, with the reason in the log."""
        simulation = self._simulation
        with simulation.lock:
            simulation.calls.append("Runtime.deserialize_cuda_engine")
            content = _content(serialized_engine)
            reasons = self._reasons_against(content)
            if reasons:
                return self._fail(f"deserialization failed: {', '.join(reason.name for reason in reasons)}")
            if simulation.fails("deserialize"):
                return self._fail("deserialization failed: asked to")
            try:
                header = read_header(content)
                graph = read_graph(header, content)
                simulation.refuse_in_capture()
                weights = simulation.allocate_device(max(1, len(graph)), call_site())
            except (BadPlan, CUDAError) as exc:
                return self._fail(f"deserialization failed: {exc}")
            return simulation.trt.ICudaEngine._create(self, header, graph, weights)

    def _fail(self, message: str) -> None:
        self._logger.log(real.ILogger.ERROR, message)

    def _reasons_against(self, content: bytes) -> list[real.EngineInvalidityDiagnostics]:
        simulation, reason = self._simulation, real.EngineInvalidityDiagnostics
        if simulation.refusal() is not simulation.driver.CUresult.CUDA_SUCCESS:
            return [reason.CUDA_ERROR]
        try:
            header = read_header(content)
        except BadPlan:
            return [reason.MALFORMED_ENGINE]
        if header.backend != self._backend:
            return [reason.MALFORMED_ENGINE]
        here = "{}.{}".format(*simulation.compute_capability)
        needed = header.graph_bytes + header.scratch_bytes
        checks = {
            reason.VERSION_MISMATCH: header.version != VERSIONS[self._backend],
            reason.UNSUPPORTED_CC: here not in header.compute_capabilities,
            reason.OLD_CUDA_DRIVER: simulation.driver_version < header.min_driver_version,
            reason.INSUFFICIENT_GPU_MEMORY: needed > simulation.memory.total_bytes - simulation.memory.used_bytes,
        }
        return [found for found, applies in checks.items() if applies]


class RtxRuntime(Runtime):
    """TensorRT-RTX's, which also says why a plan is not for this machine."""

    _backend = "tensorrt-rtx"

    def get_engine_validity(self, buffer: Any) -> tuple[real.EngineValidity, int]:
        """(validity, `EngineInvalidityDiagnostics` or-ed), from the first `engine_header_size` bytes of a plan."""
        with self._simulation.lock:
            reasons = self._reasons_against(bytes(buffer))
            validity = real.EngineValidity.INVALID if reasons else real.EngineValidity.VALID
            return validity, reduce(or_, (int(reason) for reason in reasons), 0)


class ICudaEngine:
    """A plan in device memory."""

    _simulation: Simulation

    def __init__(self) -> None:
        raise TypeError("ICudaEngine: No constructor defined!")

    @classmethod
    def _create(cls, runtime: Runtime, header: PlanHeader, graph: bytes, weights: Any) -> ICudaEngine:
        engine = cls.__new__(cls)
        model = onnx.load_from_string(graph).graph
        weight_names = {tensor.name for tensor in model.initializer}
        engine._runtime, engine._header, engine._graph, engine._weights_memory = runtime, header, graph, weights
        engine._tensors = {
            info.name: (mode, *DTYPES[info.type.tensor_type.elem_type], _shape(info))
            for mode, infos in ((real.TensorIOMode.INPUT, model.input), (real.TensorIOMode.OUTPUT, model.output))
            for info in infos
            if info.name not in weight_names
        }
        engine._session: onnxruntime.InferenceSession | None = None
        engine._is_whole = not header.stripped
        engine._state = cls._simulation.memory.allocate_internal("an engine's weights").address
        cls._simulation.born(engine)
        return engine

    def __del__(self) -> None:
        simulation = self._simulation
        weights = self.__dict__.get("_weights_memory")
        if weights is not None:
            simulation.memory.free(weights)

    @property
    def num_io_tensors(self) -> int:
        return len(self._tensors)

    @property
    def device_memory_size_v2(self) -> int:
        return self._header.scratch_bytes

    @property
    def streamable_weights_size(self) -> int:
        return 0

    @property
    def refittable(self) -> bool:
        return self._header.refittable

    @property
    def name(self) -> str:
        return "Unnamed Network 0"

    def get_engine_stat(self, stat: real.EngineStat = real.EngineStat.TOTAL_WEIGHTS_SIZE) -> int:
        if stat == real.EngineStat.STRIPPED_WEIGHTS_SIZE and not self._header.stripped:
            return -1
        return len(self._graph)

    def get_tensor_name(self, index: int) -> str:
        return list(self._tensors)[index]

    def get_tensor_mode(self, name: str) -> real.TensorIOMode:
        return self._tensors[name][0] if name in self._tensors else real.TensorIOMode.NONE

    def get_tensor_dtype(self, name: str) -> real.DataType:
        return self._tensors[name][1]

    def get_tensor_shape(self, name: str) -> real.Dims:
        return real.Dims(self._tensors[name][3])

    def get_tensor_location(self, name: str) -> real.TensorLocation:
        return real.TensorLocation.DEVICE

    def create_runtime_config(self) -> runtime_cache.IRuntimeConfig:
        return self._simulation.trt.IRuntimeConfig._create()

    def create_execution_context(self, strategy: Any = None, *, runtime_config: Any = None) -> IExecutionContext | None:
        """Takes an allocation strategy or a runtime config; None, with the reason in the log, where memory is short."""
        simulation = self._simulation
        if isinstance(strategy, runtime_cache.IRuntimeConfig):
            strategy, runtime_config = None, strategy
        if runtime_config is None:
            runtime_config = self.create_runtime_config()
            if strategy is not None:
                runtime_config.set_execution_context_allocation_strategy(strategy)
        with simulation.lock:
            simulation.calls.append("ICudaEngine.create_execution_context")
            try:
                return simulation.trt.IExecutionContext._create(self, runtime_config)
            except CUDAError as exc:
                return self._runtime._fail(f"a context could not be created: {exc}")

    def _digest(self) -> str:
        return hashlib.sha256(self._graph).hexdigest()

    def _refit(self, weights: Arrays) -> None:
        self._graph, self._session = with_weights(self._graph, weights), None

    def _run(self, outputs: list[str], inputs: Arrays) -> list[Any]:
        if self._session is None:
            self._session = session_of(self._graph)
        return self._session.run(outputs, inputs)


class IExecutionContext:
    """One way to run an engine, with its own tensor addresses and scratch memory."""

    _simulation: Simulation

    def __init__(self) -> None:
        raise TypeError("IExecutionContext: No constructor defined!")

    @classmethod
    def _create(cls, engine: ICudaEngine, config: runtime_cache.IRuntimeConfig) -> IExecutionContext:
        simulation = cls._simulation
        simulation.refuse_in_capture()
        context = cls.__new__(cls)
        context._engine, context._config = engine, config
        context._addresses: dict[str, int] = {}
        context._own_memory: list[Any] = []
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
        for allocation in self.__dict__.get("_own_memory", ()):
            self._simulation.memory.free(allocation)

    @property
    def engine(self) -> ICudaEngine:
        return self._engine

    def get_runtime_config(self) -> runtime_cache.IRuntimeConfig:
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
            stream = simulation.streams.get(int(stream_handle) or 1)
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

    def _problem(self, stream: Any) -> str | None:
        simulation, engine = self._simulation, self._engine
        code = simulation.refusal()
        if code is not simulation.driver.CUresult.CUDA_SUCCESS:
            return code.name
        if stream is None:
            return "there is no such stream"
        if simulation.fails("execute"):
            return "asked to"
        if not engine._is_whole:
            return "the engine's weights are stripped and not refitted"
        missing = [name for name in engine._tensors if not self._addresses.get(name)]
        if missing:
            return f"no address is set for {', '.join(missing)}"
        needed = engine.device_memory_size_v2
        if needed and (self._scratch is None or self._scratch[1] < needed):
            return f"the context needs {needed} bytes of device memory and has {self._scratch[1] if self._scratch else 0}"
        return None

    def _warm_up(self, stream: Any) -> None:
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
        # Only the work itself is held by a graph: real ones do not keep a context alive either.
        alive = _Alive(self)
        name = f"execute {' '.join(n for n, access in tensors.items() if access.writes)}"

        def prepare(operation: Operation) -> None:
            if alive.is_gone():
                simulation.report("destroyed", f"{operation} runs a context that is no more")

        def run(operation: Operation) -> None:
            _execute(simulation, operation, engine_of=alive.engine, tensors=tensors, scratch=scratch)

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


class _Alive:
    """What a queued execution knows of its context once nobody else holds it."""

    def __init__(self, context: IExecutionContext) -> None:
        self._context = weakref.ref(context)

    def is_gone(self) -> bool:
        return self._context() is None

    def engine(self) -> ICudaEngine | None:
        context = self._context()
        return None if context is None else context._engine


def _execute(simulation: Simulation, operation: Operation, *, engine_of: Any, tensors: dict[str, Access], scratch: Any) -> None:
    """Read the inputs, leave nothing in scratch and outputs, compute, write the outputs."""
    memory, engine = simulation.memory, engine_of()
    for access in (*(access for access in tensors.values() if access.writes), *([scratch] if scratch else [])):
        memory.poison(access)
    if engine is None:
        simulation.report("destroyed", f"the context of {operation} was destroyed before it ran")
        return
    feeds = {
        name: memory.read(access, operation).view(engine._tensors[name][2]).reshape(engine._tensors[name][3])
        for name, access in tensors.items()
        if not access.writes
    }
    names = [name for name, access in tensors.items() if access.writes]
    try:
        results = engine._run(names, feeds)
    except Exception as exc:  # ONNX Runtime raises a class of its own for each status code
        simulation.report("failed", f"{operation} cannot compute: {str(exc).strip().partition(chr(10))[0]}")
        return
    for name, result in zip(names, results, strict=True):
        memory.write(tensors[name], np.ascontiguousarray(result).reshape(-1).view(np.uint8))


def _num_bytes(dtype: np.dtype, shape: tuple[int, ...]) -> int:
    return dtype.itemsize * int(np.prod(shape))


def _shape(info: onnx.ValueInfoProto) -> tuple[int, ...]:
    return tuple(dimension.dim_value for dimension in info.type.tensor_type.shape.dim)


def _content(source: Any) -> bytes:
    """All bytes of a buffer or a stream reader."""
    if not isinstance(source, IStreamReaderV2):
        return bytes(memoryview(source))
    pieces = []
    while piece := source.read(1 << 20, 0):
        pieces.append(bytes(piece))
    return b"".join(pieces)


def tensorrt_module(simulation: Simulation, backend: str) -> SimpleNamespace:
    """Stands for `tensorrt_rtx` (backend `tensorrt-rtx`) or `tensorrt` (backend `tensorrt`)."""
    is_rtx = backend == "tensorrt-rtx"
    kinds: dict[str, type] = {
        "Runtime": RtxRuntime if is_rtx else Runtime,
        "ICudaEngine": ICudaEngine,
        "IExecutionContext": RtxExecutionContext if is_rtx else IExecutionContext,
        "IRuntimeConfig": runtime_cache.RtxRuntimeConfig if is_rtx else runtime_cache.IRuntimeConfig,
        "Refitter": refit.Refitter,
        "OnnxParserRefitter": refit.OnnxParserRefitter,
    }
    if is_rtx:
        kinds["IRuntimeCache"] = runtime_cache.IRuntimeCache
    return SimpleNamespace(
        __version__=VERSIONS[backend],
        IStreamReaderV2=IStreamReaderV2,
        **{name: getattr(real, name) for name in (*REAL_NAMES, *(REAL_RTX_NAMES if is_rtx else ()))},
        **{name: bound(kind, simulation, name) for name, kind in kinds.items()},
    )

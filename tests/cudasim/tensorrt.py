"""The TensorRT runtime, and the module that it stands in. Enumerations and loggers, which need no driver, are real."""

from __future__ import annotations

from functools import reduce
from operator import or_
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import tensorrt_rtx as real
from cuda.core._utils.cuda_utils import CUDAError

from cudasim import contexts, refit, runtime_cache
from cudasim.engines import ICudaEngine
from cudasim.plans import HEADER_BYTES, VERSIONS, BadPlan, read_graph, read_header
from cudasim.simulation import bound, call_site

if TYPE_CHECKING:
    from cudasim.simulation import Simulation

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

    @property
    def engine_header_size(self) -> int:
        return HEADER_BYTES

    def get_engine_validity(self, buffer: Any) -> tuple[real.EngineValidity, int]:
        """(validity, `EngineInvalidityDiagnostics` or-ed), from the first `engine_header_size` bytes of a plan."""
        with self._simulation.lock:
            reasons = self._reasons_against(bytes(buffer))
            validity = real.EngineValidity.INVALID if reasons else real.EngineValidity.VALID
            return validity, reduce(or_, (int(reason) for reason in reasons), 0)


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
        "IExecutionContext": contexts.RtxExecutionContext if is_rtx else contexts.IExecutionContext,
        "IRuntimeConfig": runtime_cache.RtxRuntimeConfig if is_rtx else runtime_cache.IRuntimeConfig,
        "Refitter": refit.Refitter,
    }
    if is_rtx:
        kinds["IRuntimeCache"] = runtime_cache.IRuntimeCache
    return SimpleNamespace(
        __version__=VERSIONS[backend],
        IStreamReaderV2=IStreamReaderV2,
        **{name: getattr(real, name) for name in (*REAL_NAMES, *(REAL_RTX_NAMES if is_rtx else ()))},
        **{name: bound(kind, simulation, name) for name, kind in kinds.items()},
    )

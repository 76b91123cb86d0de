"""Engines: a plan in device memory."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime
import tensorrt_rtx as real
from cuda.core._utils.cuda_utils import CUDAError

from cudasim.plans import PlanHeader
from cudasim.runtime_cache import IRuntimeConfig
from cudasim.sessions import Arrays, session_of, with_weights

if TYPE_CHECKING:
    from cudasim.contexts import IExecutionContext
    from cudasim.memory import Allocation
    from cudasim.simulation import Simulation
    from cudasim.tensorrt import Runtime

DTYPES = {
    onnx.TensorProto.FLOAT: (real.float32, np.dtype(np.float32)),
    onnx.TensorProto.FLOAT16: (real.float16, np.dtype(np.float16)),
    onnx.TensorProto.INT64: (real.int64, np.dtype(np.int64)),
    onnx.TensorProto.INT32: (real.int32, np.dtype(np.int32)),
    onnx.TensorProto.UINT8: (real.uint8, np.dtype(np.uint8)),
}


class ICudaEngine:
    """A plan in device memory."""

    _simulation: Simulation

    def __init__(self) -> None:
        raise TypeError("ICudaEngine: No constructor defined!")

    @classmethod
    def _create(cls, runtime: Runtime, header: PlanHeader, graph: bytes, weights: Allocation) -> ICudaEngine:
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
        return -1 if stat == real.EngineStat.STRIPPED_WEIGHTS_SIZE else len(self._graph)

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

    def create_runtime_config(self) -> IRuntimeConfig:
        return self._simulation.trt.IRuntimeConfig._create()

    def create_execution_context(self, strategy: Any = None, *, runtime_config: Any = None) -> IExecutionContext | None:
        """Takes an allocation strategy or a runtime config; None, with the reason in the log, where memory is short."""
        simulation = self._simulation
        if isinstance(strategy, IRuntimeConfig):
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


def _shape(info: onnx.ValueInfoProto) -> tuple[int, ...]:
    return tuple(dimension.dim_value for dimension in info.type.tensor_type.shape.dim)

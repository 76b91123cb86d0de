"""New weights for an engine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import tensorrt_rtx as real
from cuda.core._utils.cuda_utils import CUDAError
from onnx import numpy_helper

from cudasim.memory import Access
from cudasim.operations import Operation, Work
from cudasim.plans import whole_graph
from cudasim.sessions import Arrays, float_weights
from cudasim.simulation import call_site

if TYPE_CHECKING:
    from cudasim.simulation import Simulation
    from cudasim.tensorrt import ICudaEngine


class Refitter:
    """Updates an engine's weights; all of them at once where the plan was stripped."""

    _simulation: Simulation

    def __init__(self, engine: ICudaEngine, logger: real.ILogger) -> None:
        if not engine.refittable:
            logger.log(real.ILogger.ERROR, "the engine was not built to be refitted")
            raise RuntimeError("Refitter: the engine is not refittable")
        self._engine, self._logger = engine, logger
        self._prototypes = float_weights(engine._graph)
        self._given: Arrays = {}
        self._simulation.born(self)

    def get_all_weights(self) -> list[str]:
        return list(self._prototypes)

    def get_missing_weights(self) -> list[str]:
        return [] if self._engine._is_whole else [name for name in self._prototypes if name not in self._given]

    def set_named_weights(self, name: str, weights: Any) -> bool:
        """False, with the reason in the log, for an unknown name or another type or size."""
        values = weights.numpy() if isinstance(weights, real.Weights) else np.asarray(weights)
        if name not in self._prototypes:
            return self._fail(f"there are no refittable weights {name!r}")
        dtype, shape = self._prototypes[name]
        if values.dtype != dtype or values.size != int(np.prod(shape)):
            return self._fail(f"{name} is {dtype} {shape}, not {values.dtype} {values.shape}")
        self._given[name] = values
        return True

    def refit_cuda_engine(self) -> bool:
        return self._check() and self._take_over()

    def refit_cuda_engine_async(self, stream_handle: int) -> bool:
        """The weights may be released when it returns; executions that come later in the stream use the new ones."""
        simulation = self._simulation
        with simulation.lock:
            simulation.calls.append("Refitter.refit_cuda_engine_async")
            stream = simulation.streams.get(int(stream_handle) or 1)
            if stream is None or not self._check():
                return False
            engine, given = self._engine, {name: np.array(values) for name, values in self._given.items()}

            def run(operation: Operation) -> None:
                engine._refit(given)

            try:
                weights = Access(engine._state, 1, True, "the engine's weights")
                simulation.submit(stream, Work("refit", call_site(), run, (weights,)))
            except CUDAError as exc:
                return self._fail(f"refit failed: {exc}")
            engine._is_whole = True
            return True

    def _check(self) -> bool:
        missing = self.get_missing_weights()
        return not missing or self._fail(f"weights are missing: {', '.join(missing[:3])} ({len(missing)})")

    def _take_over(self) -> bool:
        self._simulation.let_go(self._engine._state, "an engine is refitted", "race")
        self._engine._refit(self._given)
        self._engine._is_whole = True
        return True

    def _fail(self, message: str) -> bool:
        self._logger.log(real.ILogger.ERROR, message)
        return False


class OnnxParserRefitter:
    """Gives a refitter the weights of an ONNX file; `refit_cuda_engine` must follow."""

    _simulation: Simulation

    def __init__(self, refitter: Refitter, logger: real.ILogger) -> None:
        self._refitter, self._logger = refitter, logger

    def refit_from_file(self, model: str) -> bool:
        path = Path(model)
        if not path.is_file():
            self._logger.log(real.ILogger.ERROR, f"{path} is not there")
            return False
        return self._refit(whole_graph(path))

    def refit_from_bytes(self, model: Any, path: str | None = None) -> bool:
        return self._refit(onnx.load_from_string(bytes(model)))

    def _refit(self, model: onnx.ModelProto) -> bool:
        known = set(self._refitter.get_all_weights())
        tensors = [tensor for tensor in model.graph.initializer if tensor.name in known]
        return all([self._refitter.set_named_weights(tensor.name, numpy_helper.to_array(tensor)) for tensor in tensors])

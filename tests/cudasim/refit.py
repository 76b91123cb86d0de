"""New weights for an engine."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorrt_rtx as real
from cuda.core._utils.cuda_utils import CUDAError

from cudasim.memory import Access
from cudasim.operations import Operation, Work
from cudasim.sessions import Arrays, float_weights
from cudasim.simulation import call_site

if TYPE_CHECKING:
    from cudasim.simulation import Simulation
    from cudasim.tensorrt import ICudaEngine


class Refitter:
    """Updates an engine's weights."""

    _simulation: Simulation

    def __init__(self, engine: ICudaEngine, logger: real.ILogger) -> None:
        if not engine.refittable:
            logger.log(real.ILogger.ERROR, "the engine was not built to be refitted")
            raise RuntimeError("Refitter: the engine is not refittable")
        self._engine, self._logger = engine, logger
        self._prototypes = float_weights(engine._graph)
        self._given: dict[str, Callable[[], Any]] = {}
        """What returns the values: TensorRT is given an address, and keeps nothing alive."""
        self._simulation.born(self)

    def get_all_weights(self) -> list[str]:
        return list(self._prototypes)

    def set_named_weights(self, name: str, weights: Any) -> bool:
        """False, with the reason in the log, for an unknown name or another type or size."""
        values = weights.numpy() if isinstance(weights, real.Weights) else np.asarray(weights)
        if name not in self._prototypes:
            return self._fail(f"there are no refittable weights {name!r}")
        dtype, shape = self._prototypes[name]
        if values.dtype != dtype or values.size != int(np.prod(shape)):
            return self._fail(f"{name} is {dtype} {shape}, not {values.dtype} {values.shape}")
        self._given[name] = weakref.ref(values) if values is weights else lambda: values
        return True

    def refit_cuda_engine(self) -> bool:
        self._simulation.let_go(self._engine._state, "an engine is refitted", "race")
        self._engine._refit(self._taken())
        return True

    def refit_cuda_engine_async(self, stream_handle: int) -> bool:
        """The weights may be released when it returns; executions that come later in the stream use the new ones."""
        simulation = self._simulation
        with simulation.lock:
            simulation.calls.append("Refitter.refit_cuda_engine_async")
            stream = simulation.streams.get(int(stream_handle) or 1)
            if stream is None:
                return False
            engine, given = self._engine, self._taken()

            def run(operation: Operation) -> None:
                engine._refit(given)

            try:
                weights = Access(engine._state, 1, True, "the engine's weights")
                simulation.submit(stream, Work("refit", call_site(), run, (weights,)))
            except CUDAError as exc:
                return self._fail(f"refit failed: {exc}")
            return True

    def _taken(self) -> Arrays:
        """Copies of the values; NaN where the caller let go of them, which is a hazard."""
        found: Arrays = {}
        for name, values_of in self._given.items():
            dtype, shape = self._prototypes[name]
            values = values_of()
            if values is None:
                self._simulation.report(
                    "freed", f"the new weights {name} were freed before the engine was refitted ({call_site()})"
                )
            found[name] = np.full(shape, np.nan, dtype) if values is None else np.array(values)
        return found

    def _fail(self, message: str) -> bool:
        self._logger.log(real.ILogger.ERROR, message)
        return False

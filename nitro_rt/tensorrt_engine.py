"""Plans of TensorRT and TensorRT-RTX, one code path: a runtime that loads them, and an engine that is enqueued on a stream."""

from __future__ import annotations

import mmap
import re
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nitro_rt.device_modules import DeviceModules
from nitro_rt.errors import ConfigError, EngineMismatch
from nitro_rt.manifest import Engine, TensorSpec
from nitro_rt.runtime_cache import RuntimeCache
from nitro_rt.session import Array, check_specs

DTYPES = {"FLOAT": "float32", "HALF": "float16", "INT64": "int64", "UINT8": "uint8"}
"""TensorRT's names of what a bundle's tensors are made of."""

_OUT_OF_MEMORY = re.compile(r"out.?of.?memory", re.IGNORECASE)


class TensorRtRuntime:
    """Deserialises plans on the current device. One per executor."""

    def __init__(self, modules: DeviceModules, *, own_graphs: bool = False, cache_file: Path | None = None) -> None:
        """
        Args:
            own_graphs: let TensorRT-RTX capture CUDA graphs itself, one per engine.
            cache_file: where TensorRT-RTX's compiled kernels are kept; None keeps none. Plans of TensorRT need none.
        Raises: ConfigError if `own_graphs` is asked of a TensorRT that has no such strategy.
        """
        trt = modules.trt
        self._trt, self._own_graphs = trt, own_graphs
        self.is_rtx = hasattr(trt, "CudaGraphStrategy")
        if own_graphs and not self.is_rtx:
            raise ConfigError("cuda_graphs='runtime' is TensorRT-RTX's own strategy; with TensorRT say 'capture' or 'off'")
        self.logger, self.messages = _logger(trt)
        self._runtime: Any = trt.Runtime(self.logger)
        self.cache = RuntimeCache(cache_file) if cache_file and self.is_rtx else None

    def load(self, stage: str, engine: Engine, paths: tuple[Path, ...]) -> TensorRtEngine:
        """Deserialise a plan, compare its tensors with the manifest's, and make its context.

        Raises: EngineMismatch with TensorRT's own words; ShapeError if it is another engine.
        """
        self.messages.clear()
        with paths[0].open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan:
            loaded = self._runtime.deserialize_cuda_engine(plan)
        if loaded is None:
            raise EngineMismatch(f"{self._name} cannot load {stage} from {paths[0]}: {self.said()}; {self._remedy()}")
        check_specs(stage, _specs(loaded), (*engine.inputs, *engine.outputs))
        return TensorRtEngine(stage, loaded, self._context(stage, loaded), self)

    def refitter(self, engine: Any) -> Any:
        return self._trt.Refitter(engine, self.logger)

    def said(self) -> str:
        """What TensorRT logged last, in one line."""
        return "; ".join(dict.fromkeys(self.messages)) or "it gave no reason"

    def close(self) -> list[str]:
        """Keep the compiled kernels and let go of the runtime. Returns: what could not be kept."""
        notes = self.cache.save() if self.cache else []
        self.cache, self._runtime = None, None
        return notes

    @property
    def _name(self) -> str:
        return f"{'TensorRT-RTX' if self.is_rtx else 'TensorRT'} {self._trt.__version__}"

    def _remedy(self) -> str:
        if _OUT_OF_MEMORY.search(self.said()):
            return "close other programs or pipelines, or build with a smaller --size, --batch or --precision"
        return "build it again here"

    def _context(self, stage: str, loaded: Any) -> Any:
        user_managed = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if not self.is_rtx:
            context = loaded.create_execution_context(user_managed)
        else:
            config = loaded.create_runtime_config()
            config.set_execution_context_allocation_strategy(user_managed)
            strategy = self._trt.CudaGraphStrategy
            config.cuda_graph_strategy = strategy.WHOLE_GRAPH_CAPTURE if self._own_graphs else strategy.DISABLED
            if self.cache:
                self.cache.attach(config)
            context = loaded.create_execution_context(config)
        if context is None:
            raise EngineMismatch(f"{self._name} cannot make a context for {stage}: {self.said()}; {self._remedy()}")
        return context


class TensorRtEngine:
    """A plan in device memory with one execution context. Not thread-safe."""

    def __init__(self, stage: str, engine: Any, context: Any, runtime: TensorRtRuntime) -> None:
        self.stage = stage
        self._engine, self._context, self._runtime = engine, context, runtime
        self._given: list[Array] = []
        """New weights between `set_weights` and `take_weights`: TensorRT reads them only at the exchange."""
        self.scratch_bytes = int(engine.device_memory_size_v2)
        """Activations and workspace: device memory that is in use only while the engine runs."""

    def use_scratch(self, address: int, num_bytes: int) -> None:
        """Give it scratch memory, which it may share with engines that never run at the same time."""
        self._context.set_device_memory(address, num_bytes)

    def is_capturable(self, stream_handle: int) -> bool:
        """Whether a CUDA graph can hold it. TensorRT has no such question, since all of its engines can be captured
        that need no synchronisation inside; a capture that fails says so itself."""
        return not self._runtime.is_rtx or bool(self._context.is_stream_capturable(stream_handle))

    def enqueue(self, addresses: Mapping[str, int], stream_handle: int) -> None:
        """Queue one run. The first ever may allocate and synchronise, so it must not be captured.

        Args:
            addresses: device address of every input and output, aligned, valid until the run ends.
        Raises: EngineMismatch with TensorRT's own words.
        """
        context = self._context
        for name, address in addresses.items():
            if not context.set_tensor_address(name, address):
                raise EngineMismatch(f"{self.stage} does not take {name} at its address: {self._runtime.said()}")
        if not context.execute_async_v3(stream_handle):
            raise EngineMismatch(f"{self.stage} did not start: {self._runtime.said()}")

    def set_weights(self, weights: Mapping[str, Array]) -> Any:
        """Hand new weights over, by the names of the ONNX graph's initializers; nothing changes yet.

        Returns: what `take_weights` wants.
        Raises: EngineMismatch if the plan was not built to be refitted, or one of them does not fit it.
        """
        runtime = self._runtime
        try:
            refitter = runtime.refitter(self._engine)
        except Exception as exc:  # TensorRT's bindings raise a bare RuntimeError or TypeError for a null refitter
            raise EngineMismatch(f"{self.stage} takes no new weights: {runtime.said()}; build with --refit") from exc
        self._given = [np.ascontiguousarray(values) for values in weights.values()]
        for name, array in zip(weights, self._given, strict=True):
            if not refitter.set_named_weights(name, array):
                raise EngineMismatch(f"{self.stage} does not take {name} {array.dtype} {list(array.shape)}: {runtime.said()}")
        return refitter

    def take_weights(self, refitter: Any) -> None:
        """Exchange the weights that were set; the stream must be idle. Raises: EngineMismatch with TensorRT's own words."""
        if not refitter.refit_cuda_engine():
            raise EngineMismatch(f"{self.stage} did not take its new weights: {self._runtime.said()}; load the bundle again")
        self._given = []

    def close(self) -> None:
        """Free the context and the weights. A second call does nothing."""
        self._context = None
        self._engine = None


def _logger(trt: Any) -> tuple[Any, deque[str]]:
    """A logger that keeps the last errors for our messages and prints nothing."""
    messages: deque[str] = deque(maxlen=8)
    errors = (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR)

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in errors:
                messages.append(" ".join(message.split()))

    return Logger(), messages


def _specs(engine: Any) -> list[TensorSpec]:
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    return [
        TensorSpec(
            name=name,
            dtype=DTYPES.get(engine.get_tensor_dtype(name).name, engine.get_tensor_dtype(name).name),
            shape=tuple(engine.get_tensor_shape(name)),
        )
        for name in names
    ]

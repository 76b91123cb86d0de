"""How a context runs, and TensorRT-RTX's cache of the kernels that it compiles on the device's machine."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import tensorrt_rtx as real

from cudasim.plans import VERSIONS

if TYPE_CHECKING:
    from cudasim.simulation import Simulation

MAGIC = b"NITRO-RT SIMULATED RUNTIME CACHE\n"


class IRuntimeConfig:
    """Options of a context."""

    _simulation: Simulation
    _is_rtx = False

    def __init__(self) -> None:
        raise TypeError("IRuntimeConfig: No constructor defined!")

    @classmethod
    def _create(cls) -> IRuntimeConfig:
        config = cls.__new__(cls)
        config._strategy = real.ExecutionContextAllocationStrategy.STATIC
        config._cache: IRuntimeCache | None = None
        config._graph_strategy = real.CudaGraphStrategy.DISABLED
        cls._simulation.born(config)
        return config

    def set_execution_context_allocation_strategy(
        self,
        strategy: real.ExecutionContextAllocationStrategy = real.ExecutionContextAllocationStrategy.STATIC,
    ) -> None:
        self._strategy = strategy

    def get_execution_context_allocation_strategy(self) -> real.ExecutionContextAllocationStrategy:
        return self._strategy

    def _compile(self, digest: str) -> None:
        """TensorRT-RTX compiles an engine's kernels when a context is made, unless its cache has them."""


class RtxRuntimeConfig(IRuntimeConfig):
    """TensorRT-RTX's, with its cache and its own CUDA graphs."""

    @property
    def cuda_graph_strategy(self) -> real.CudaGraphStrategy:
        return self._graph_strategy

    @cuda_graph_strategy.setter
    def cuda_graph_strategy(self, strategy: real.CudaGraphStrategy) -> None:
        self._graph_strategy = strategy

    def create_runtime_cache(self) -> IRuntimeCache:
        return self._simulation.trt.IRuntimeCache._create()

    def get_runtime_cache(self) -> IRuntimeCache | None:
        return self._cache

    def set_runtime_cache(self, cache: IRuntimeCache | None = None) -> bool:
        self._cache = cache
        return True

    def _compile(self, digest: str) -> None:
        if self._cache is not None and digest in self._cache._entries:
            self._simulation.count("cache hit")
            return
        self._simulation.count("compilation")
        if self._cache is not None:
            self._cache._entries.add(digest)


class IHostMemory(bytes):
    """A serialised object: a buffer."""

    @property
    def nbytes(self) -> int:
        return len(self)


class IRuntimeCache:
    """Compiled kernels, by engine."""

    _simulation: Simulation

    def __init__(self) -> None:
        raise TypeError("IRuntimeCache: No constructor defined!")

    @classmethod
    def _create(cls) -> IRuntimeCache:
        cache = cls.__new__(cls)
        cache._entries: set[str] = set()
        cls._simulation.born(cache)
        return cache

    def serialize(self) -> IHostMemory:
        content = json.dumps([self._environment(), sorted(self._entries)]).encode()
        return IHostMemory(MAGIC + hashlib.sha256(content).hexdigest().encode() + b"\n" + content)

    def deserialize(self, blob: Any) -> bool:
        """False where the blob is damaged or of another GPU, driver or version; nothing is taken over then."""
        content = bytes(memoryview(blob))
        digest, _, body = content[len(MAGIC) :].partition(b"\n")
        if not content.startswith(MAGIC) or hashlib.sha256(body).hexdigest().encode() != digest:
            return False
        environment, entries = json.loads(body)
        if environment != self._environment():
            return False
        self._entries |= set(entries)
        return True

    def reset(self) -> bool:
        self._entries.clear()
        return True

    def _environment(self) -> list[str]:
        simulation = self._simulation
        return [
            VERSIONS["tensorrt-rtx"],
            simulation.device_name,
            str(simulation.compute_capability),
            str(simulation.driver_version),
        ]

"""A GPU that does nothing, in no time: what is left of an image then is our own host code.

The modules stand where the device executor calls `cuda.core`, `cuda.bindings.driver` and TensorRT. Pinned memory is real,
device memory is numbers. Nothing is computed, so pictures are whatever the pinned memory holds.
"""

from __future__ import annotations

import ctypes
import enum
import hashlib
from types import SimpleNamespace
from typing import Any

from nitro_rt.bundle import Bundle
from nitro_rt.device import built_targets
from nitro_rt.device_modules import DeviceModules
from nitro_rt.manifest import Engine

FREE_BYTES = 1 << 40


def null_modules(bundle: Bundle) -> DeviceModules:
    """Modules whose one GPU is the bundle's target and whose engines are the bundle's, all of them empty."""
    target = (*built_targets(bundle), "sm89")[0].removeprefix("sm")
    capability = SimpleNamespace(major=int(target[:-1]), minor=int(target[-1]))
    device = type("Device", (_Device,), {"compute_capability": capability})
    cuda = SimpleNamespace(
        Device=device,
        DeviceMemoryResource=_Pool,
        DeviceMemoryResourceOptions=_Options,
        EventOptions=_Options,
        LegacyPinnedMemoryResource=_PinnedMemory,
        StreamOptions=_Options,
    )
    driver = SimpleNamespace(cuDriverGetVersion=lambda: (0, 13000), cuMemGetInfo=lambda: (0, FREE_BYTES, FREE_BYTES))
    return DeviceModules(cuda=cuda, driver=driver, trt=_tensorrt(bundle))


class _Options:
    def __init__(self, **options: Any) -> None: ...


class _Event:
    def __sub__(self, other: _Event) -> float:
        return 0.0

    def close(self) -> None: ...


class _Graph:
    def upload(self, stream: Any) -> None: ...

    def launch(self, stream: Any) -> None: ...

    def close(self) -> None: ...


class _Builder:
    def begin_building(self, mode: str) -> _Builder:
        return self

    def end_building(self) -> _Builder:
        return self

    def complete(self) -> _Graph:
        return _Graph()

    def close(self) -> None: ...


class _Stream:
    handle = 1

    def record(self, event: _Event) -> _Event:
        return event

    def sync(self) -> None: ...

    def create_graph_builder(self) -> _Builder:
        return _Builder()

    def close(self) -> None: ...


class _Device:
    name, device_id = "null", 0
    compute_capability: Any

    def __init__(self, device_id: int = 0) -> None: ...

    @classmethod
    def get_all_devices(cls) -> tuple[_Device, ...]:
        return (cls(),)

    def set_current(self) -> None: ...

    def create_stream(self, *, options: Any) -> _Stream:
        return _Stream()

    def create_event(self, *, options: Any) -> _Event:
        return _Event()


class _Buffer:
    def __init__(self, size: int, memory: Any = None) -> None:
        self.size, self._memory = size, memory
        self.handle = ctypes.addressof(memory) if memory is not None else 1 << 40

    def copy_to(self, target: _Buffer, *, stream: Any) -> None: ...

    def close(self, stream: Any = None) -> None: ...


class _Pool(_Options):
    def __init__(self, device: Any, options: Any) -> None: ...

    def allocate(self, size: int, *, stream: Any) -> _Buffer:
        return _Buffer(size)

    def close(self) -> None: ...


class _PinnedMemory:
    def allocate(self, size: int) -> _Buffer:
        return _Buffer(size, (ctypes.c_uint8 * size)())


class _DataType(enum.Enum):
    FLOAT, HALF, INT64, UINT8 = range(4)


_TYPES = {"float32": _DataType.FLOAT, "float16": _DataType.HALF, "int64": _DataType.INT64, "uint8": _DataType.UINT8}


def _tensorrt(bundle: Bundle) -> SimpleNamespace:
    """TensorRT whose plans are known by their digests, and whose engines are empty."""
    by_digest = {engine.files[0].sha256: engine for _, engine in bundle.engines()}

    class Runtime:
        engine_header_size = 1

        def __init__(self, logger: Any) -> None: ...

        def get_engine_validity(self, header: bytes) -> tuple[str, int]:
            return "VALID", 0

        def deserialize_cuda_engine(self, plan: Any) -> _Engine:
            return _Engine(by_digest[hashlib.sha256(plan).hexdigest()])

    logger = type("ILogger", (), {"INTERNAL_ERROR": 0, "ERROR": 1, "__init__": lambda self, severity=0: None})
    return SimpleNamespace(
        __version__=bundle.manifest.toolchain.get(bundle.backend, "0"),
        ILogger=logger,
        Logger=logger,
        Runtime=Runtime,
        EngineValidity=SimpleNamespace(INVALID="INVALID", SUBOPTIMAL="SUBOPTIMAL"),
        ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED=0),
    )


class _Engine:
    device_memory_size_v2 = 1 << 20

    def __init__(self, engine: Engine) -> None:
        self._specs = {spec.name: spec for spec in (*engine.inputs, *engine.outputs)}
        self.num_io_tensors = len(self._specs)

    def get_tensor_name(self, index: int) -> str:
        return list(self._specs)[index]

    def get_tensor_dtype(self, name: str) -> _DataType:
        return _TYPES[self._specs[name].dtype]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self._specs[name].shape

    def create_execution_context(self, strategy: int) -> _Context:
        return _Context()


class _Context:
    def set_device_memory(self, address: int, size: int) -> None: ...

    def set_tensor_address(self, name: str, address: int) -> bool:
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        return True

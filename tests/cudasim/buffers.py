"""Buffers and the memory resources that give them, as `cuda.core` has them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from cuda.core import DeviceMemoryResourceOptions

from cudasim.memory import PINNED, Access, Allocation
from cudasim.operations import Operation, Work
from cudasim.simulation import call_site, driver_call
from cudasim.streams import Stream, stream_of

if TYPE_CHECKING:
    from cudasim.devices import Device
    from cudasim.graphs import GraphBuilder
    from cudasim.simulation import Simulation

BYTES_PER_MS = 20e6
"""Speed of simulated copies and fills."""
DLPACK_CUDA_HOST, DLPACK_CUDA = 3, 2


class MemoryResource:
    """The base of all memory resources."""

    _simulation: Simulation

    @property
    def is_device_accessible(self) -> bool:
        return True

    @property
    def is_host_accessible(self) -> bool:
        return False


class DeviceMemoryResource(MemoryResource):
    """A pool of device memory. Its buffers are allocated and freed in a stream's order."""

    def __init__(self, device_id: Device | int, options: DeviceMemoryResourceOptions | None = None) -> None:
        with self._simulation.calling("DeviceMemoryResource", needs_context=False):
            self._device_id = self._simulation.cuda.Device(device_id).device_id
            self._is_closed = False
            self._is_owned = options is not None
            if self._is_owned:
                self._simulation.opened(self)

    @property
    def device_id(self) -> int:
        return self._device_id

    @property
    def is_handle_owned(self) -> bool:
        return self._is_owned

    @property
    def is_closed(self) -> bool:
        return self._is_closed

    def close(self) -> None:
        self._is_closed = True
        self._simulation.closed(self)

    @driver_call
    def allocate(self, size: int, *, stream: Stream | GraphBuilder) -> Buffer:
        if self._is_closed:
            raise RuntimeError("DeviceMemoryResource has been closed")
        queue = stream_of(stream)
        queue._check_open()
        if queue._capture is not None:
            raise RuntimeError(
                "_MemPool cannot perform memory operations on a capturing stream (consider using GraphMemoryResource)."
            )
        # CUDA itself would let a capturing thread allocate from a pool on another stream; the pool may have to grow for it.
        self._simulation.refuse_in_capture()
        site = call_site()
        allocation = self._simulation.allocate_device(size, site)
        whole = Access(allocation.address, size, True, "the allocation")
        self._simulation.submit(queue, Work("allocate", site, accesses=(whole,)))
        return self._simulation.cuda.Buffer._create(allocation, self, queue)

    def _release(self, buffer: Buffer, queue: Stream) -> None:
        simulation, allocation = self._simulation, buffer._allocation
        if simulation.lost is not None:
            simulation.memory.free(allocation)
            return
        if queue._capture is not None:
            queue._capture.invalidate()
        simulation.refuse_in_capture()

        def free(operation: Operation) -> None:
            simulation.memory.free(allocation)

        def note(operation: Operation) -> None:
            simulation.memory.note_free(operation, allocation)

        queue._queue(Work("free", call_site(), free, prepare=note))  # also where the stream's handle is closed


class LegacyPinnedMemoryResource(MemoryResource):
    """Pinned host memory, allocated and freed at once."""

    @property
    def is_host_accessible(self) -> bool:
        return True

    @driver_call
    def allocate(self, size: int, *, stream: Stream | GraphBuilder | None = None) -> Buffer:
        simulation = self._simulation
        queue = simulation.cuda.LEGACY_DEFAULT_STREAM if stream is None else stream_of(stream)
        simulation.refuse_in_capture()
        return simulation.cuda.Buffer._create(simulation.allocate_pinned(size, call_site()), self, queue)

    @property
    def device_id(self) -> int:
        raise RuntimeError("a pinned memory resource is not bound to any GPU")

    def _release(self, buffer: Buffer, queue: Stream) -> None:
        simulation, allocation = self._simulation, buffer._allocation
        if simulation.lost is None:
            queue._sync()
        simulation.let_go(allocation.address, f"pinned memory from {allocation.site} is freed", "use after free")
        simulation.memory.free(allocation)
        allocation.freed_by = f"Buffer.close ({call_site()})"


class Buffer:
    """A handle to memory."""

    _simulation: Simulation

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("Buffer objects cannot be instantiated directly. Please use MemoryResource APIs.")

    @classmethod
    def _create(cls, allocation: Allocation, resource: Any, stream: Stream) -> Buffer:
        buffer = cls.__new__(cls)
        buffer._allocation, buffer._resource, buffer._stream = allocation, resource, stream
        buffer._is_closed = False
        cls._simulation.opened(buffer, allocation.site)
        return buffer

    def close(self, stream: Stream | GraphBuilder | None = None) -> None:
        with self._simulation.lock:
            self._simulation.calls.append("Buffer.close")
            if self._is_closed:
                return
            self._resource._release(self, self._stream if stream is None else stream_of(stream))
            self._is_closed = True
            self._simulation.closed(self)

    def __enter__(self) -> Buffer:
        return self

    def __exit__(self, exc_type: Any, exc_val: Any, exc_tb: Any) -> None:
        self.close()

    @property
    def is_closed(self) -> bool:
        return self._is_closed

    @property
    def handle(self) -> int:
        return 0 if self._is_closed else self._allocation.address

    @property
    def size(self) -> int:
        return 0 if self._is_closed else self._allocation.num_bytes

    @property
    def memory_resource(self) -> MemoryResource:
        return self._resource

    @property
    def device_id(self) -> int:
        self._check_open()
        return self._resource.device_id

    @property
    def is_device_accessible(self) -> bool:
        return True

    @property
    def is_host_accessible(self) -> bool:
        return self._allocation.kind == PINNED

    @driver_call
    def copy_to(self, dst: Buffer | None = None, *, stream: Stream | GraphBuilder, options: Any = None) -> Buffer:
        self._check_open()
        if dst is None:
            dst = self._resource.allocate(self.size, stream=stream)
        dst.copy_from(self, stream=stream, options=options)
        return dst

    @driver_call
    def copy_from(self, src: Buffer, *, stream: Stream | GraphBuilder, options: Any = None) -> None:
        self._check_open()
        src._check_open()
        if src.size != self.size:
            raise ValueError(f"buffer sizes mismatch between src and dst (sizes are: src={src.size}, dst={self.size})")
        if options is not None:
            raise NotImplementedError("the simulator has no CopyOptions")
        source = Access(src.handle, src.size, False, "the source")
        target = Access(self.handle, self.size, True, "the destination")
        memory = self._simulation.memory

        def run(operation: Operation) -> None:
            memory.write(target, memory.read(source, operation, is_copy=True))

        kind = f"copy {src._allocation.kind} to {self._allocation.kind}"
        work = Work(kind, call_site(), run, (source, target), duration_ms=self.size / BYTES_PER_MS)
        self._simulation.submit(stream_of(stream), work)

    @driver_call
    def fill(self, value: int | Any, *, stream: Stream | GraphBuilder) -> None:
        self._check_open()
        pattern = _fill_pattern(value)
        if self.size % len(pattern):
            raise ValueError(f"buffer size ({self.size}) must be divisible by {len(pattern)}")
        target = Access(self.handle, self.size, True, "the destination")
        content = np.frombuffer(pattern * (self.size // len(pattern)), np.uint8)
        memory = self._simulation.memory
        work = Work("fill", call_site(), lambda operation: memory.write(target, content), (target,), self.size / BYTES_PER_MS)
        self._simulation.submit(stream_of(stream), work)

    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> object:
        """A view of pinned memory as int8, for `numpy.from_dlpack`."""
        self._check_open()
        if dl_device is not None:
            raise BufferError("Sorry, not supported: dl_device other than None")
        if copy is True:
            raise BufferError("Sorry, not supported: copy=True")
        if not self.is_host_accessible:
            raise BufferError("the simulator gives no view of device memory")
        return self._allocation.content.view(np.int8).__dlpack__(max_version=max_version)

    def __dlpack_device__(self) -> tuple[int, int]:
        self._check_open()
        return (DLPACK_CUDA_HOST, 0) if self.is_host_accessible else (DLPACK_CUDA, self.device_id)

    def _check_open(self) -> None:
        if self._is_closed:
            raise RuntimeError("Buffer has been closed")


def _fill_pattern(value: Any) -> bytes:
    if isinstance(value, int):
        if not 0 <= value < 256:
            raise OverflowError(
                "value too large to convert to uint8_t" if value > 0 else "can't convert negative value to uint8_t"
            )
        return bytes([value])
    pattern = bytes(value)
    if len(pattern) not in (1, 2, 4):
        raise ValueError(f"value must be 1, 2, or 4 bytes, got {len(pattern)}")
    return pattern

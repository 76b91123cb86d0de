"""Static memory of a device executor: named tensors in blocks, a block at a time on the device and in pinned host memory.

A block packs tensors at offsets that TensorRT accepts, so that one copy moves all of them. Blocks are allocated when a
program is made and stay where they are until it is closed: a captured CUDA graph holds their addresses.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from nitro_rt.device_modules import DeviceModules
from nitro_rt.manifest import TensorSpec
from nitro_rt.session import Array

ALIGNMENT_BYTES = 256
"""Of tensor addresses and of a context's scratch memory. Source: TensorRT's documentation of setTensorAddress."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where each tensor of a block lies."""

    offsets: Mapping[str, int]
    """Bytes from the block's start."""
    num_bytes: int


def layout_of(specs: Mapping[str, TensorSpec]) -> Layout:
    """The tensors one after another, each aligned."""
    offsets, end = {}, 0
    for name, spec in specs.items():
        offsets[name] = end
        end += aligned(num_bytes_of(spec))
    return Layout(offsets=offsets, num_bytes=end)


class DeviceMemory:
    """The memory of one executor: a pool of its own, so that closing it gives everything back to the device."""

    def __init__(self, modules: DeviceModules, device: Any, stream: Any) -> None:
        cuda = modules.cuda
        self._stream = stream
        self._pool = cuda.DeviceMemoryResource(device, cuda.DeviceMemoryResourceOptions())
        # The stream-ordered pinned pool needs a newer driver; this one is allocated once per program and never in capture.
        self._pinned = cuda.LegacyPinnedMemoryResource()
        self._buffers: list[Any] = []

    def device_buffer(self, num_bytes: int) -> Any:
        """Device memory, owned here. Its content is undefined."""
        return self._own(self._pool.allocate(num_bytes, stream=self._stream))

    def pinned_buffer(self, num_bytes: int) -> Any:
        """Page-locked host memory, owned here."""
        return self._own(self._pinned.allocate(num_bytes))

    def release(self, buffer: Any) -> None:
        """Free one buffer before `close`, after the work that uses it."""
        self._buffers.remove(buffer)
        self._free(buffer)

    def close(self) -> None:
        """Free everything; the stream must be idle. A second call does nothing."""
        while self._buffers:
            self._free(self._buffers.pop())
        self._pool.close()

    def _own(self, buffer: Any) -> Any:
        self._buffers.append(buffer)
        return buffer

    def _free(self, buffer: Any) -> None:
        buffer.close(self._stream)


class DeviceBlock:
    """Named tensors in one piece of device memory."""

    def __init__(self, memory: DeviceMemory, specs: Mapping[str, TensorSpec]) -> None:
        self.specs, self._memory = dict(specs), memory
        self._layout = layout_of(specs)
        self.buffer = memory.device_buffer(self._layout.num_bytes)
        start = int(self.buffer.handle)
        self.addresses = {name: start + offset for name, offset in self._layout.offsets.items()}

    def close(self) -> None:
        self._memory.release(self.buffer)


class PinnedBlock(DeviceBlock):
    """A device block and its twin in pinned host memory, which NumPy reads and writes through `arrays`.

    The arrays are views: what `upload` reads must not be written, and what `download` writes must not be read, before the
    stream was synchronised. They end with the block.
    """

    def __init__(self, memory: DeviceMemory, specs: Mapping[str, TensorSpec]) -> None:
        super().__init__(memory, specs)
        self._host = memory.pinned_buffer(self._layout.num_bytes)
        # By address: CUDA's pinned memory is ordinary memory to the host, and DLPack's way gives a read-only array.
        raw = np.ctypeslib.as_array((ctypes.c_uint8 * self._layout.num_bytes).from_address(int(self._host.handle)))
        self.arrays: dict[str, Array] = {
            name: raw[start : start + num_bytes_of(spec)].view(spec.dtype).reshape(spec.shape)
            for (name, spec), start in zip(specs.items(), self._layout.offsets.values(), strict=True)
        }

    def upload(self, stream: Any) -> None:
        """Queue the copy to the device on a stream or graph builder."""
        self._host.copy_to(self.buffer, stream=stream)

    def download(self, stream: Any) -> None:
        """Queue the copy to the host on a stream or graph builder."""
        self.buffer.copy_to(self._host, stream=stream)

    def close(self) -> None:
        self.arrays = {}
        self._memory.release(self._host)
        super().close()


def num_bytes_of(spec: TensorSpec) -> int:
    return math.prod(spec.shape) * np.dtype(spec.dtype).itemsize


def aligned(num_bytes: int) -> int:
    """`num_bytes` rounded up to the alignment."""
    return -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES

"""Devices, as `cuda.core` has them, and the module that they stand in."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import cuda.core
from cuda.core._utils.cuda_utils import ComputeCapability, CUDAError

from cudasim import buffers, graphs, streams
from cudasim.simulation import bound, driver_call

if TYPE_CHECKING:
    from cudasim.buffers import Buffer
    from cudasim.graphs import GraphBuilder
    from cudasim.simulation import Simulation
    from cudasim.streams import Event, Stream


class Device:
    """A GPU. One object per thread and ordinal, and current per thread, as in `cuda.core`."""

    _simulation: Simulation
    _objects: threading.local

    def __new__(cls, device_id: Device | int | None = None) -> Device:
        simulation = cls._simulation
        if device_id is None:
            device_id = simulation.current_device() or 0
        ordinal = int(device_id)
        if not 0 <= ordinal < simulation.num_devices:
            raise ValueError(f"device_id must be within [0, {simulation.num_devices}), got {ordinal}")
        known: dict[int, Device] = cls._objects.__dict__.setdefault("by_ordinal", {})
        if ordinal not in known:
            device = super().__new__(cls)
            device._device_id, device._is_initialised = ordinal, False
            known[ordinal] = device
        return known[ordinal]

    @classmethod
    def get_all_devices(cls) -> tuple[Device, ...]:
        return tuple(cls(ordinal) for ordinal in range(cls._simulation.num_devices))

    @property
    def device_id(self) -> int:
        return self._device_id

    def __int__(self) -> int:
        return self._device_id

    @property
    def name(self) -> str:
        return self._simulation.device_name

    @property
    def compute_capability(self) -> ComputeCapability:
        return ComputeCapability(*self._simulation.compute_capability)

    @property
    def arch(self) -> str:
        major, minor = self._simulation.compute_capability
        return f"{major}{minor}"

    @property
    def default_stream(self) -> Stream:
        return self._simulation.cuda.LEGACY_DEFAULT_STREAM

    def set_current(self, ctx: Any = None) -> None:
        with self._simulation.calling("Device.set_current", needs_context=False):
            self._simulation.set_current_device(self._device_id)
            self._is_initialised = True

    @driver_call
    def create_stream(self, obj: Any = None, options: cuda.core.StreamOptions | None = None) -> Stream:
        self._check_initialised()
        if obj is not None:
            raise NotImplementedError("the simulator wraps no foreign streams")
        stream_type = self._simulation.cuda.Stream
        stream = stream_type.__new__(stream_type)._open(self._simulation.new_handle(), options or cuda.core.StreamOptions())
        self._simulation.opened(stream)
        return stream

    @driver_call
    def create_event(self, options: cuda.core.EventOptions | None = None) -> Event:
        self._check_initialised()
        return self._simulation.cuda.Event._create(options)

    @driver_call
    def allocate(self, size: int, *, stream: Stream | GraphBuilder) -> Buffer:
        self._check_initialised()
        return self._simulation.cuda.DeviceMemoryResource(self).allocate(size, stream=stream)

    @driver_call
    def sync(self) -> None:
        self._check_initialised()
        self._simulation.refuse_in_capture(everywhere=True)
        self._simulation.count("sync")
        self._simulation.schedule.finish_all()

    def _check_initialised(self) -> None:
        if not self._is_initialised:
            raise CUDAError(
                f"Device {self._device_id} is not yet initialized, perhaps you forgot to call .set_current() first?"
            )


def cuda_module(simulation: Simulation) -> SimpleNamespace:
    """Stands for `cuda.core`. Options are the real package's own."""
    stream_type = bound(streams.Stream, simulation)
    default_options = cuda.core.StreamOptions(nonblocking=False)
    module = SimpleNamespace(
        Device=bound(Device, simulation),
        Stream=stream_type,
        StreamOptions=cuda.core.StreamOptions,
        Event=bound(streams.Event, simulation),
        EventOptions=cuda.core.EventOptions,
        Buffer=bound(buffers.Buffer, simulation),
        DeviceMemoryResource=bound(buffers.DeviceMemoryResource, simulation),
        DeviceMemoryResourceOptions=cuda.core.DeviceMemoryResourceOptions,
        LegacyPinnedMemoryResource=bound(buffers.LegacyPinnedMemoryResource, simulation),
        LEGACY_DEFAULT_STREAM=stream_type.__new__(stream_type)._open(streams.LEGACY_HANDLE, default_options),
        PER_THREAD_DEFAULT_STREAM=stream_type.__new__(stream_type)._open(streams.PER_THREAD_HANDLE, default_options),
        graph=SimpleNamespace(
            GraphBuilder=bound(graphs.GraphBuilder, simulation),
            Graph=bound(graphs.Graph, simulation),
            GraphCompleteOptions=cuda.core.graph.GraphCompleteOptions,
        ),
    )
    module.Device._objects = threading.local()
    return module

"""One simulated machine: its devices, what has gone wrong on it, what is open, and which failures were asked for."""

from __future__ import annotations

import functools
import gc
import sys
import threading
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

from cuda.bindings.driver import CUresult

from cudasim.driver import cuda_error, driver_module
from cudasim.memory import Allocation, Memory
from cudasim.operations import Operation, Schedule, Work

FAILURES = ("allocate", "operation", "execute", "deserialize")
_HERE = Path(__file__).parent

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Hazard:
    """Something that CUDA does not promise to catch and that a right program never does."""

    kind: str
    """See README.md."""
    message: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.message}"


@dataclass(frozen=True)
class Leak:
    """Something that was opened and is not closed."""

    kind: str
    site: str

    def __str__(self) -> str:
        return f"{self.kind} from {self.site}"


class Simulation:
    """Use `cudasim.simulate`. `cuda`, `driver` and `trt` stand for the modules that an executor is given."""

    cuda: SimpleNamespace
    driver: SimpleNamespace
    trt: SimpleNamespace

    def __init__(
        self,
        *,
        seed: int,
        compute_capability: tuple[int, int],
        num_devices: int,
        device_name: str,
        memory_bytes: int,
        driver_version: int,
    ) -> None:
        self.seed = seed
        self.compute_capability, self.num_devices, self.device_name = compute_capability, num_devices, device_name
        self.driver_version = driver_version
        self.lock = threading.RLock()
        self.hazards: list[Hazard] = []
        self.counts: Counter[str] = Counter()
        """sync, copy, fill, execute, capture, replay, allocation, operation, compilation, ..."""
        self.calls: deque[str] = deque(maxlen=10_000)
        """Names of the calls, oldest first: `Stream.sync`, `Buffer.copy_to`, ..."""
        self.lost: CUresult | None = None
        """The sticky error of a lost device."""
        self.memory = Memory(self, memory_bytes)
        self.schedule = Schedule(self, seed)
        self.captures: list[Any] = []
        """Captures under way."""
        self.streams: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
        self._current = threading.local()
        self._failures: dict[str, tuple[int, CUresult | None]] = {}
        self._open: dict[int, Leak] = {}
        self._alive: dict[int, tuple[weakref.ref[Any], Leak]] = {}
        self._next_handle = 0x5000
        self.driver = driver_module(self)

    # --- what a test asks ---------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Let all queued work run. Raises: AssertionError naming every hazard seen so far."""
        with self.lock:
            if self.lost is None:
                self.schedule.finish_all()
            assert not self.hazards, f"seed {self.seed}:\n" + "\n".join(map(str, self.hazards))

    def leaks(self) -> list[Leak]:
        """All that is open: streams, events, buffers, pools, builders and graphs without `close()`, TensorRT's objects
        while anything refers to them."""
        with self.lock:
            if self._leaks():
                gc.collect()  # TensorRT's objects may be in cycles
            return self._leaks()

    def _leaks(self) -> list[Leak]:
        self._alive = {key: known for key, known in self._alive.items() if known[0]() is not None}
        return sorted((*self._open.values(), *(leak for _, leak in self._alive.values())), key=str)

    @property
    def mood(self) -> str:
        """How this seed's adversary behaves."""
        return self.schedule.mood

    # --- what a test arranges -----------------------------------------------------------------------------------------

    def fail(self, what: str, at: int = 1, code: CUresult = CUresult.CUDA_ERROR_LAUNCH_FAILED) -> None:
        """Let the `at`-th next one fail, once.

        Args:
            what: allocate (out of memory), operation (the device is lost with `code` for good), execute
                (`execute_async_v3` gives False), deserialize (`deserialize_cuda_engine` gives None).
        """
        assert what in FAILURES, f"{what!r} is none of {FAILURES}"
        self._failures[what] = (at, code)

    def recover(self) -> None:
        """A lost device works again, as after a reset of its context; everything that was queued is gone."""
        self.lost = None

    # --- what the simulated modules use -------------------------------------------------------------------------------

    def report(self, kind: str, message: str) -> None:
        hazard = Hazard(kind, message)
        if hazard not in self.hazards:
            self.hazards.append(hazard)

    def count(self, what: str, num: int = 1) -> None:
        self.counts[what] += num

    def fails(self, what: str) -> bool:
        """Whether this one was asked to fail."""
        left, code = self._failures.get(what, (0, None))
        if left == 0:
            return False
        if left > 1:
            self._failures[what] = (left - 1, code)
            return False
        del self._failures[what]
        return True

    def step(self) -> None:
        """One operation runs. Raises: CUDAError if the device was to be lost here."""
        code = self._failures.get("operation", (0, None))[1]
        if self.fails("operation") and code is not None:
            self.lost = code
            raise cuda_error(code)

    @contextmanager
    def calling(self, name: str, *, needs_context: bool = True) -> Iterator[None]:
        """One call into CUDA: one at a time, refused where the device is lost or the thread has none."""
        with self.lock:
            self.calls.append(name)
            code = self.refusal() if needs_context else CUresult.CUDA_SUCCESS
            if code is not CUresult.CUDA_SUCCESS:
                raise cuda_error(code)
            yield

    def refusal(self) -> CUresult:
        """Why a call of this thread is refused now; CUDA_SUCCESS where it is not."""
        if self.lost is not None:
            return self.lost
        if self.current_device() is None:
            return CUresult.CUDA_ERROR_INVALID_CONTEXT
        return CUresult.CUDA_SUCCESS

    def current_device(self) -> int | None:
        return getattr(self._current, "device_id", None)

    def set_current_device(self, device_id: int) -> None:
        self._current.device_id = device_id

    def refuse_in_capture(self, *, everywhere: bool = False) -> None:
        """For a call that CUDA calls potentially unsafe. Raises: CUDAError where a capture forbids it; the capture is then
        invalid.

        Args: everywhere: the call concerns the whole device, so that any capture forbids it.
        """
        for capture in self.captures:
            if everywhere or capture.forbids_unsafe_calls():
                capture.invalidate()
                raise cuda_error(CUresult.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED)

    def allocate_device(self, num_bytes: int, site: str) -> Allocation:
        """Raises: CUDAError (out of memory)."""
        return self._allocate(self.memory.allocate_device, num_bytes, site)

    def allocate_pinned(self, num_bytes: int, site: str) -> Allocation:
        """Raises: CUDAError (out of memory)."""
        return self._allocate(self.memory.allocate_pinned, num_bytes, site)

    def _allocate(self, allocate: Callable[[int, str], Allocation | None], num_bytes: int, site: str) -> Allocation:
        self.count("allocation")
        allocation = None if self.fails("allocate") else allocate(num_bytes, site)
        if allocation is None:
            raise cuda_error(CUresult.CUDA_ERROR_OUT_OF_MEMORY)
        return allocation

    def let_go(self, address: int, what: str, kind: str = "destroyed") -> None:
        """The host changes or frees memory on its own: all work on it must be done, and the host must know."""
        unseen = None if self.lost is not None else self.schedule.unseen(address)
        if unseen is not None:
            self.report(kind, f"{what} at {call_site()} before the host has waited for {unseen}")

    def new_handle(self) -> int:
        self._next_handle += 0x10
        return self._next_handle

    def opened(self, thing: object, site: str | None = None) -> None:
        """`thing` must be closed."""
        self._open[id(thing)] = Leak(type(thing).__name__, site or call_site())
        # An id is given out again once its owner is gone, so what is dropped without close() moves to a key of its own.
        weakref.finalize(thing, self._dropped, id(thing)).atexit = False

    def closed(self, thing: object) -> None:
        self._open.pop(id(thing), None)

    def _dropped(self, key: int) -> None:
        leak = self._open.pop(key, None)
        if leak is not None:
            self._open[-self.new_handle()] = leak

    def born(self, thing: object) -> None:
        """`thing` lives as long as it is referred to."""
        self._alive[id(thing)] = (weakref.ref(thing), Leak(type(thing).__name__, call_site()))

    def submit(self, stream: Any, work: Work) -> Operation | None:
        """Queue work on a stream; None where the stream is capturing and the work became a node of its graph."""
        self.count(work.name.partition(" ")[0])
        return stream._take(work)


def driver_call(method: F) -> F:
    """A method that calls the driver."""

    @functools.wraps(method)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self._simulation.calling(method.__qualname__):
            return method(self, *args, **kwargs)

    return wrapper  # type: ignore[return-value]


@functools.cache
def _is_ours(file: str) -> bool:
    """Whether a source file is the simulator's own, and not one of its tests."""
    return Path(file).parent == _HERE and not Path(file).name.startswith(("test_", "sequence"))


def call_site() -> str:
    """File and line of the innermost caller outside the simulator."""
    frame = sys._getframe(1)
    while frame.f_back is not None and _is_ours(frame.f_code.co_filename):
        frame = frame.f_back
    return f"{frame.f_code.co_filename.rpartition('/')[2]}:{frame.f_lineno}"


def bound(kind: type, simulation: Simulation, name: str | None = None) -> type:
    """The class for one simulation: it looks like the original, and its objects know where they belong."""
    name = name or kind.__name__
    return type(name, (kind,), {"_simulation": simulation, "__doc__": kind.__doc__, "__qualname__": name})

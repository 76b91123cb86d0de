"""Device work that is queued, in what order it may run, and the adversary that picks the order.

An operation runs late: at the earliest when it is queued, at the latest when the host waits for it. What must come before it
is a set of edges (the stream's last operation, events waited for, a graph's edges); everything else is the adversary's choice.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cuda.core._utils.cuda_utils import CUDAError

from cudasim.memory import PINNED, Access, Bytes

if TYPE_CHECKING:
    from cudasim.simulation import Simulation

MOODS = ("lazy", "random", "newest first", "eager")
"""How the adversary behaves, by seed modulo 4. lazy: only what the host waits for; eager: all that may run, at once;
newest first: what was queued last goes first; random: now and then some, in any order."""


@dataclass(eq=False)
class Work:
    """What one operation does, before it has a place in the order: a graph holds it, every replay queues it anew."""

    name: str
    """`copy`, `execute text`, ..."""
    site: str
    """File and line that asked for it."""
    run: Callable[[Operation], None] = lambda operation: None
    accesses: tuple[Access, ...] = ()
    duration_ms: float = 0.0
    prepare: Callable[[Operation], None] = lambda operation: None
    """Called when it is queued: checks that are not accesses."""


@dataclass(eq=False)
class Operation:
    """Queued work. Operations of one lane follow each other; `clock` holds what happened before it, by lane."""

    work: Work
    lane: Hashable
    clock: dict[Hashable, int]
    successors: list[Operation] = field(default_factory=list)
    num_waiting_for: int = 0
    waits_for: tuple[Operation, ...] = ()
    sources: list[tuple[Access, Bytes]] = field(default_factory=list)
    """Pinned memory that it will read, and what was in it when it was queued."""
    number: int = 0
    is_done: bool = False
    finished_ms: float = 0.0

    def happens_before(self, other: Operation) -> bool:
        return self.clock[self.lane] <= other.clock.get(self.lane, 0)

    def __str__(self) -> str:
        return f"{self.work.name} ({self.work.site})"


class Schedule:
    """All that is queued and not yet done."""

    def __init__(self, simulation: Simulation, seed: int) -> None:
        self._simulation = simulation
        self._random = random.Random(seed)
        self.mood = MOODS[seed % len(MOODS)]
        self.time_ms = 0.0
        self._ready: list[Operation] = []
        self._pinned: dict[int, list[tuple[Operation, Access]]] = {}
        """Unfinished accesses to pinned memory, by allocation."""
        self._ticks: dict[Hashable, int] = {}
        self._host_clock: dict[Hashable, int] = {}
        self._num_queued = 0
        self.num_pending = 0

    # --- queueing -----------------------------------------------------------------------------------------------------

    def add(self, work: Work, lane: Hashable, after: Iterable[Operation]) -> Operation:
        """Queue work behind other operations, and behind all that the host has waited for."""
        clock = dict(self._host_clock)
        before = tuple(dict.fromkeys(after))
        for earlier in before:
            _merge(clock, earlier.clock)
        self._ticks[lane] = clock[lane] = max(self._ticks.get(lane, 0), clock.get(lane, 0)) + 1
        operation = Operation(work, lane, clock, waits_for=tuple(o for o in before if not o.is_done))
        operation.num_waiting_for = len(operation.waits_for)
        operation.number = self._num_queued = self._num_queued + 1
        for earlier in operation.waits_for:
            earlier.successors.append(operation)
        self.num_pending += 1
        work.prepare(operation)
        for access in work.accesses:
            self._simulation.memory.note(operation, access)
        self._look_at_pinned(operation)
        if not operation.num_waiting_for:
            self._ready.append(operation)
        return operation

    def _look_at_pinned(self, operation: Operation) -> None:
        """The host may look at pinned memory at any time: what will be written is poison from now on, and what will be read
        must still be the same then."""
        memory = self._simulation.memory
        for access in operation.work.accesses:
            allocation = memory.find(access.address)
            if allocation is None or allocation.kind != PINNED or allocation.freed_by is not None:
                continue
            unfinished = [(other, a) for other, a in self._pinned.get(allocation.address, ()) if not other.is_done]
            rivals = [earlier for _, earlier in unfinished if earlier.overlaps(access)]
            if access.writes and not rivals:
                memory.poison(access)
            elif not access.writes and not any(earlier.writes for earlier in rivals):
                operation.sources.append((access, memory.read(access, operation)))
            unfinished.append((operation, access))
            self._pinned[allocation.address] = unfinished

    def unseen(self, address: int) -> Operation | None:
        """Work on the allocation at `address` that the host has not waited for, done or not."""
        allocation = self._simulation.memory.find(address)
        operations = [] if allocation is None else [operation for operation, _ in allocation.history]
        return next((o for o in operations if o.clock[o.lane] > self._host_clock.get(o.lane, 0)), None)

    # --- running ------------------------------------------------------------------------------------------------------

    def pass_time(self) -> None:
        """The device may run ahead of the host."""
        if self.mood == "eager":
            while self._ready:
                self._run(self._random.choice(self._ready))
        elif self.mood == "random":
            while self._ready and self._random.random() < 0.4:
                self._run(self._random.choice(self._ready))

    def finish(self, wanted: Iterable[Operation]) -> None:
        """Run until the wanted operations are done; the host has then seen them."""
        wanted = tuple(wanted)
        needed = _unfinished(wanted)
        while any(not operation.is_done for operation in wanted):
            self._run(self._pick(needed))
        for operation in wanted:
            _merge(self._host_clock, operation.clock)
        self.pass_time()

    def finish_all(self) -> None:
        while self._ready:
            self._run(self._random.choice(self._ready))
        _merge(self._host_clock, self._ticks)

    def drop_all(self) -> None:
        """The device is lost: nothing of what is queued will run."""
        while self._ready:
            operation = self._ready.pop()
            self._finish(operation)

    def _pick(self, needed: set[Operation]) -> Operation:
        if self.mood == "lazy":
            return self._random.choice([operation for operation in self._ready if operation in needed])
        if self.mood == "newest first":
            return max(self._ready, key=lambda operation: operation.number)
        return self._random.choice(self._ready)

    def _run(self, operation: Operation) -> None:
        simulation = self._simulation
        simulation.count("operation")
        self._ready.remove(operation)
        for access, content in operation.sources:
            if (simulation.memory.read(access, operation) != content).any():
                simulation.report(
                    "host write", f"{access.what} changed after {operation} was queued to read it and before it ran"
                )
        self.time_ms += operation.work.duration_ms
        try:
            simulation.step()
            operation.work.run(operation)
        except CUDAError:  # the device is lost
            self._finish(operation)
            self.drop_all()
            raise
        self._finish(operation)

    def _finish(self, operation: Operation) -> None:
        operation.is_done, operation.finished_ms = True, self.time_ms
        self.num_pending -= 1
        for later in operation.successors:
            later.num_waiting_for -= 1
            if not later.num_waiting_for:
                self._ready.append(later)
        operation.successors, operation.sources, operation.waits_for = [], [], ()


def _merge(clock: dict[Hashable, int], other: dict[Hashable, int]) -> None:
    for lane, tick in other.items():
        if tick > clock.get(lane, 0):
            clock[lane] = tick


def _unfinished(wanted: Iterable[Operation]) -> set[Operation]:
    """The operations that must run for the wanted ones to be done."""
    found: set[Operation] = set()
    todo = [operation for operation in wanted if not operation.is_done]
    while todo:
        operation = todo.pop()
        if operation not in found:
            found.add(operation)
            todo += [earlier for earlier in operation.waits_for if not earlier.is_done]
    return found

"""Device and pinned memory: what lies at which address, who touched it in which order, and what may be read.

Device memory has addresses that no process has; they are never given out twice, so a stale one is always noticed. Pinned
memory is real host memory. Fresh, freed and scratch memory holds `POISON`: NaN in half, bfloat16 and float, absurd as int64.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from cudasim.operations import Operation
    from cudasim.simulation import Simulation

Bytes = NDArray[np.uint8]

POISON = 0x7FFE
"""In every 16 bits."""
ALIGNMENT = 256
"""Of every device allocation, as CUDA promises; no more than that."""
FIRST_DEVICE_ADDRESS = 0xD00_0000_0000
DEVICE, PINNED, INTERNAL = "device", "pinned", "internal"


@dataclass(frozen=True)
class Access:
    """A range that an operation reads or writes."""

    address: int
    num_bytes: int
    writes: bool
    what: str
    """For messages: `tensor latents`, `scratch memory`, ..."""

    @property
    def end(self) -> int:
        return self.address + self.num_bytes

    def overlaps(self, other: Access) -> bool:
        return self.address < other.end and other.address < self.end


@dataclass(eq=False)
class Allocation:
    """A block of memory, alive or freed."""

    address: int
    num_bytes: int
    kind: str
    site: str
    """Where it was allocated: file and line."""
    content: Bytes
    is_written: NDArray[np.bool_] | None
    """By byte; None for pinned memory, since what the host writes cannot be seen."""
    history: list[tuple[Operation, Access]] = field(default_factory=list)
    """Accesses that later ones must be ordered after: the last writes, and the reads since."""
    freed_by: Operation | str | None = None
    is_gone: bool = False
    """The free was executed."""

    @property
    def end(self) -> int:
        return self.address + self.num_bytes


def fill_with_poison(content: Bytes) -> None:
    whole = content.size // 2 * 2
    content[:whole].view("<u2")[:] = POISON
    content[whole:] = POISON & 0xFF


class Memory:
    """All allocations of one device, and the pinned ones."""

    def __init__(self, simulation: Simulation, total_bytes: int) -> None:
        self._simulation = simulation
        self.total_bytes = total_bytes
        self.used_bytes = 0
        self.peak_bytes = 0
        self._next_address = FIRST_DEVICE_ADDRESS
        self._addresses: list[int] = []
        self._allocations: list[Allocation] = []

    # --- allocation ---------------------------------------------------------------------------------------------------

    def allocate_device(self, num_bytes: int, site: str) -> Allocation | None:
        """None where the device has not so much left."""
        if self.used_bytes + num_bytes > self.total_bytes:
            return None
        self.used_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self.used_bytes)
        allocation = Allocation(
            self._next_address,
            num_bytes,
            DEVICE,
            site,
            np.empty(num_bytes, np.uint8),
            np.zeros(num_bytes, np.bool_),
        )
        # A gap that belongs to nobody follows, and no allocation has a better alignment than what is promised.
        self._next_address += (num_bytes // (2 * ALIGNMENT) + 2) * 2 * ALIGNMENT + ALIGNMENT * (num_bytes // ALIGNMENT % 2)
        return self._add(allocation)

    def allocate_pinned(self, num_bytes: int, site: str) -> Allocation:
        block = np.empty(num_bytes + ALIGNMENT, np.uint8)
        start = -block.ctypes.data % ALIGNMENT
        content = block[start : start + num_bytes]
        return self._add(Allocation(content.ctypes.data, num_bytes, PINNED, site, content, None))

    def allocate_internal(self, what: str) -> Allocation:
        """One byte that stands for a library's own state, so that unordered uses of it are races like any other."""
        address = self._next_address
        self._next_address += ALIGNMENT
        return self._add(Allocation(address, 1, INTERNAL, what, np.zeros(1, np.uint8), np.ones(1, np.bool_)))

    def free(self, allocation: Allocation) -> None:
        if allocation.is_gone:
            return
        allocation.is_gone = True
        if allocation.kind == DEVICE:
            self.used_bytes -= allocation.num_bytes
            allocation.content = np.empty(0, np.uint8)  # its address stays taken
            allocation.is_written = None
        else:
            fill_with_poison(allocation.content)  # kept: a view of it must not crash the process
        allocation.history.clear()

    def _add(self, allocation: Allocation) -> Allocation:
        fill_with_poison(allocation.content)
        place = bisect_right(self._addresses, allocation.address)
        self._addresses.insert(place, allocation.address)
        self._allocations.insert(place, allocation)
        return allocation

    def find(self, address: int) -> Allocation | None:
        """The allocation, alive or freed, that holds an address."""
        place = bisect_right(self._addresses, address) - 1
        if place < 0 or address >= self._allocations[place].end:
            return None
        return self._allocations[place]

    # --- order --------------------------------------------------------------------------------------------------------

    def note(self, operation: Operation, access: Access) -> None:
        """Report an access that is wrong whatever the order of execution, and remember it."""
        report = self._simulation.report
        allocation = self.find(access.address)
        if allocation is None:
            report("out of bounds", f"{operation} touches {_range(access)}, which is no allocation")
            return
        if access.end > allocation.end:
            over = access.end - allocation.end
            report("out of bounds", f"{operation} touches {_range(access)}, {over} bytes past {_block(allocation)}")
            return
        if allocation.freed_by is not None:
            report(
                "use after free",
                f"{operation} touches {_range(access)} of {_block(allocation)}, freed by {allocation.freed_by}",
            )
            return
        kept = []
        for other, earlier in allocation.history:
            if not earlier.overlaps(access):
                kept.append((other, earlier))
                continue
            is_ordered = other.happens_before(operation)
            if (earlier.writes or access.writes) and not is_ordered:
                report(
                    "race",
                    f"{operation} {_verb(access)} and {other} {_verb(earlier)} of {_block(allocation)}: nothing orders them",
                )
            is_covered = access.address <= earlier.address and earlier.end <= access.end
            if not (is_covered and is_ordered and (access.writes or not earlier.writes)):
                kept.append((other, earlier))
        kept.append((operation, access))
        allocation.history = kept

    def note_free(self, operation: Operation, allocation: Allocation) -> None:
        """The memory goes when `operation` runs: all that touches it must be ordered before."""
        self.note(operation, Access(allocation.address, allocation.num_bytes, True, "freed memory"))
        allocation.freed_by = operation

    # --- content ------------------------------------------------------------------------------------------------------

    def read(self, access: Access, reader: object, *, is_copy: bool = False) -> Bytes:
        """A copy. Poison where there is nothing, which was reported when the access was noted.

        Args: is_copy: what lies between tensors may be empty: only an aligned chunk without a single written byte is reported.
        """
        allocation, place = self._resolve(access)
        if allocation is None:
            content = np.empty(access.num_bytes, np.uint8)
            fill_with_poison(content)
            return content
        missing = 0 if allocation.is_written is None else _num_unwritten(allocation.is_written[place], is_copy)
        if missing:
            self._simulation.report(
                "unwritten", f"{reader} reads {_range(access)} of {_block(allocation)}; {missing} bytes of it hold nothing"
            )
        return allocation.content[place].copy()

    def write(self, access: Access, content: Bytes) -> None:
        allocation, place = self._resolve(access)
        if allocation is None:
            return
        allocation.content[place] = content
        if allocation.is_written is not None:
            allocation.is_written[place] = True

    def poison(self, access: Access) -> None:
        allocation, place = self._resolve(access)
        if allocation is None:
            return
        fill_with_poison(allocation.content[place])
        if allocation.is_written is not None:
            allocation.is_written[place] = False

    def _resolve(self, access: Access) -> tuple[Allocation | None, slice]:
        allocation = self.find(access.address)
        if allocation is None or allocation.is_gone or access.end > allocation.end:
            return None, slice(0)
        start = access.address - allocation.address
        return allocation, slice(start, start + access.num_bytes)


def _num_unwritten(is_written: NDArray[np.bool_], is_copy: bool) -> int:
    if is_written.all():
        return 0
    if not is_copy:
        return int((~is_written).sum())
    chunks = np.split(is_written, range(ALIGNMENT, is_written.size, ALIGNMENT))
    return sum(chunk.size for chunk in chunks if not chunk.any())


def _range(access: Access) -> str:
    return f"{access.what} ({access.num_bytes} bytes at {access.address:#x})"


def _verb(access: Access) -> str:
    return f"{'writes' if access.writes else 'reads'} {access.what}"


def _block(allocation: Allocation) -> str:
    return f"the {allocation.num_bytes} bytes of {allocation.kind} memory from {allocation.site}"

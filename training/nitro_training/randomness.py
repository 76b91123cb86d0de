"""Seeds by name: every draw of a run follows from (seed, step, micro-batch, sample) and from nothing else.

So a resumed run continues exactly as the uninterrupted one, with no generator state and no data position to store, and
two processes that share a batch draw for each sample what one process draws for it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor


def seed_of(*parts: int | str) -> int:
    """A seed from a name; neighbouring names give unrelated ones. torch's CPU generator heeds 32 bits of it."""
    digest = hashlib.blake2b("/".join(str(part) for part in parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """A CPU generator seeded by a name."""
    return torch.Generator().manual_seed(seed_of(*parts))


class BatchRandom:
    """The randomness of one micro-batch, or of one process's share of it.

    `shared` is the same on every process (noise level, heads, number of simulated steps); the other methods draw for each
    sample from a generator of its own.
    """

    def __init__(self, *name: int | str, first: int, num: int) -> None:
        """
        Args:
            name: seed, step and micro-batch.
            first: global number of this process's first sample in the batch.
            num: samples of this process.
        """
        self.num = num
        self.shared = generator(*name, "shared")
        self.generators = [generator(*name, "sample", index) for index in range(first, first + num)]

    def randn(self, *shape: int) -> Tensor:
        """Standard normal [B, *shape] float32."""
        return self._each(lambda one: torch.randn(shape, generator=one))

    def randint(self, high: int) -> Tensor:
        """Whole numbers [B] from 0 to high - 1."""
        return self._each(lambda one: torch.randint(high, (), generator=one))

    def _each(self, draw: Callable[[torch.Generator], Tensor]) -> Tensor:
        return torch.stack([draw(one) for one in self.generators])

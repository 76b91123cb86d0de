"""Normal noise that equals torch's CPU generator, without torch: a seed gives the image that diffusers gives.

`torch.randn` on the CPU is MT19937, seeded with the low 32 bits of the seed, and Box-Muller:

- 16 values or more: float32 uniforms of 24 bits, one draw each, transformed in blocks of 16, where the first eight of a
  block are radii and the last eight are angles. When the count is no multiple of 16, the last 16 values are drawn anew.
- fewer than 16: float64 uniforms of 53 bits (two draws each), one pair per two values; a value left over is kept and
  comes first in the next such small draw.

Source: ATen/native/cpu/DistributionTemplates.h (normal_fill) and ATen/core/DistributionsHelper.h of PyTorch.
Torch computes the large case with its own SIMD log, sin and cos; the largest difference seen is 5e-7.
"""

from __future__ import annotations

import math
import operator
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nitro_rt.errors import ConfigError

MAX_SEED = 2**64 - 1
BLOCK = 16
HALF = BLOCK // 2

Float32 = NDArray[np.float32]


def checked_seed(seed: object) -> int:
    """`seed` as an int from 0 to 2**64 - 1. Raises: ConfigError for bools, floats and anything out of range."""
    try:
        number = _index(seed)
    except TypeError:
        raise ConfigError(f"a seed must be a whole number from 0 to 2**64 - 1, got {seed!r} ({type(seed).__name__})") from None
    if not 0 <= number <= MAX_SEED:
        raise ConfigError(f"seed {number} is out of range; seeds go from 0 to 2**64 - 1 ({MAX_SEED})")
    return number


def _index(number: Any) -> int:
    """`number` as an int. Raises: TypeError for bools and for what is no whole number."""
    if isinstance(number, (bool, np.bool_)):
        raise TypeError
    return operator.index(number)


class NoiseGenerator:
    """A stream of normal noise; each draw continues where the last one stopped, as a `torch.Generator` does."""

    def __init__(self, seed: int, twister: np.random.RandomState | None = None) -> None:
        """
        Args:
            twister: seeded and used in place of a new one; nobody else may draw from it as long as this one does.
        """
        self.seed = checked_seed(seed)
        # RandomState's seeding is MT19937's init_genrand, as torch's is, and its stream is frozen by NumPy's policy
        # (np.random.default_rng would hash the seed first).
        self._twister = np.random.RandomState(0) if twister is None else twister
        self._twister.seed(self.seed & 0xFFFFFFFF)
        self._left_over: float | None = None

    def normal(self, shape: Sequence[int]) -> Float32:
        """The values of `torch.randn(shape, generator=...)`: float32, a new C-contiguous array of `shape`."""
        count = math.prod(shape)
        values = self._large_draw(count) if count >= BLOCK else self._small_draw(count)
        return values.reshape(tuple(shape))

    def _large_draw(self, count: int) -> Float32:
        values = self._uniforms(count)
        whole = count - count % BLOCK
        values[:whole] = _box_muller(values[:whole])
        if whole != count:
            values[-BLOCK:] = _box_muller(self._uniforms(BLOCK))
        return values

    def _uniforms(self, count: int) -> Float32:
        """[count] float32 in [0, 1), of the low 24 bits of each draw."""
        bits = self._twister.randint(0, 2**32, size=count, dtype=np.uint32)
        return (bits & np.uint32(0xFFFFFF)).astype(np.float32) * np.float32(2.0**-24)

    def _small_draw(self, count: int) -> Float32:
        return np.array([self._next_scalar() for _ in range(count)], dtype=np.float32)

    def _next_scalar(self) -> float:
        if self._left_over is not None:
            value, self._left_over = self._left_over, None
            return value
        angle = 2.0 * math.pi * self._uniform53()
        radius = math.sqrt(-2.0 * math.log1p(-self._uniform53()))
        self._left_over = radius * math.sin(angle)
        return radius * math.cos(angle)

    def _uniform53(self) -> float:
        high, low = (int(word) for word in self._twister.randint(0, 2**32, size=2, dtype=np.uint32))
        return float((high << 32 | low) & (2**53 - 1)) * 2.0**-53


def _box_muller(uniforms: Float32) -> Float32:
    """[n * 16] uniforms to normals, block by block. The angle is rounded to float32 first, as torch does it."""
    blocks = uniforms.reshape(-1, 2, HALF)
    radius = np.sqrt(np.float32(-2) * np.log(np.float32(1) - blocks[:, 0]))
    angle = np.float32(2 * math.pi) * blocks[:, 1]
    return np.stack((radius * np.cos(angle), radius * np.sin(angle)), axis=1).reshape(-1)


_THREAD = threading.local()


def _own_twister() -> np.random.RandomState:
    """The calling thread's, made once: making one takes 0.2 ms, as long as all noise of a 256-pixel image."""
    if not hasattr(_THREAD, "twister"):
        _THREAD.twister = np.random.RandomState(0)
    twister: np.random.RandomState = _THREAD.twister
    return twister


def draw_noise(seeds: int | Sequence[int], num_steps: int, num_images: int, batch: int, sample_CHW: Sequence[int]) -> Float32:
    """All noise of one call, in the order in which diffusers draws it.

    Args:
        seeds: one seed (one generator draws for all images) or one per image (a generator each).
        num_images: images asked for, at most `batch`.
        batch: images of the engine. The rows past `num_images` are zeros and take nothing from the generators, so
            padding changes no image.
        sample_CHW: shape of one latent.
    Returns: float32 [num_steps, batch, C, H, W]. [0] is the first latents, [k] the fresh noise that step k - 1 mixes in;
        the last step mixes none.
    """
    noise_NBCHW = np.zeros((num_steps, batch, *sample_CHW), dtype=np.float32)
    twister = _own_twister()
    if isinstance(seeds, int):
        generator = NoiseGenerator(seeds, twister)
        for step in range(num_steps):
            noise_NBCHW[step, :num_images] = generator.normal((num_images, *sample_CHW))
        return noise_NBCHW
    for row, seed in enumerate(seeds):
        generator = NoiseGenerator(seed, twister)
        for step in range(num_steps):
            noise_NBCHW[step, row] = generator.normal((1, *sample_CHW))[0]
    return noise_NBCHW

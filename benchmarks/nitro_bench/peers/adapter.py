"""What an adapter of a peer must offer. Standard library only: this is loaded by the peer's own interpreter.

An adapter is one file that defines a class `Adapter` with these methods. `serve` makes one, calls `import_libraries`, `load`
and then `prepare` for each image, times what `prepare` returned, and speaks to the benchmark. An adapter may import
other files of this folder, as `nitro_bench.peers.x`; when it is loaded it imports nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol


class CannotRun(Exception):
    """This peer cannot run here, or not this request: "needs a CUDA device", "loads no checkpoint of 96 pixels".

    The benchmark lists the peer with this reason and goes on. Any other exception counts as a crash and is listed as one.
    """


class Adapter(Protocol):
    """One peer in one process. `request` and `drawing` are the JSON objects of `nitro_bench.peer`."""

    thread_safe: bool
    """Whether several threads may draw with what was loaded; False leaves the peer out of the throughput measurement."""

    def import_libraries(self) -> dict[str, str]:
        """Import everything heavy, so that imports are timed apart from loading.

        Returns: package -> version of what decides the peer's speed.
        Raises: CannotRun, ImportError.
        """

    def load(self, request: dict[str, Any]) -> dict[str, Any]:
        """Load the model, convert or compile it.

        Args:
            request: the fields of `nitro_bench.peer.LoadRequest`.
        Returns: `compute_dtype` (float32, float16, bfloat16, int8: what the networks compute in) and, where there is
            something to say, `notes` (a list of strings) and `capture_ms` (CUDA graph capture or compilation, timed apart;
            it is taken out of the load time), `differs` (why its pictures cannot be ours, although it does the same work: it
            is timed, and its pictures are not compared).
        Raises: CannotRun.
        """

    def prepare(self, drawing: dict[str, Any]) -> Callable[[], Any]:
        """Everything that a user does not do for each image: read the noise file, make the generator's class.

        Args:
            drawing: the fields of `nitro_bench.peer.DrawRequest`.
        Returns: a function that draws, called once for each image and timed whole: from the prompt as a string to pixels in
            host memory, so on a device it ends with a synchronisation. Each call draws the same picture. It returns the
            images: PIL images, or uint8 arrays, [B, H, W, 3].
        Raises: CannotRun, for what this peer cannot draw.
        """

    def timings_ms(self) -> dict[str, float]:
        """Stage -> milliseconds of the last image, named as nitro_rt names them (text, denoise, decode, ...); {} if unknown."""

    def device_peak_bytes(self) -> int | None:
        """The most device memory that was in use at once; None where there is no device, or it cannot be said."""

    def close(self) -> None:
        """Release everything."""

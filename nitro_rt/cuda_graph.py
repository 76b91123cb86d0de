"""A CUDA graph of one whole image: captured on the executor's own stream, replayed while what it was captured with holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, fields
from typing import Any

from nitro_rt.device_errors import device_errors


@dataclass(frozen=True, kw_only=True)
class BindingState:
    """Everything that a captured graph holds by address. A field that differs means capturing again."""

    buffers: tuple[int, ...]
    """Addresses of the tensors."""
    scratch: tuple[int, int]
    """Address and bytes of the engines' shared scratch memory."""
    weights: int
    """Counts how often weights were exchanged."""


class CudaGraph:
    """The graph of one (steps, batch, size)."""

    def __init__(self, stream: Any, record: Callable[[Any], None], captures: Counter[str]) -> None:
        """
        Args:
            record: queues one whole image on the stream or graph builder that it is given.
            captures: counts captures by reason.
        """
        self._stream, self._record, self._captures = stream, record, captures
        self._graph: Any = None
        self._state: BindingState | None = None

    def launch(self, state: BindingState) -> None:
        """Queue one image, capturing first where `state` is not the one of the last capture.

        Raises: CaptureError if CUDA or an engine refuses.
        """
        if state != self._state:
            self._capture(state)
        self._graph.launch(self._stream)

    def close(self) -> None:
        """Destroy the graph; the stream must be idle. A second call does nothing."""
        graph, self._graph, self._state = self._graph, None, None
        if graph is not None:
            graph.close()

    def _capture(self, state: BindingState) -> None:
        reason = _reason(self._state, state)
        self.close()
        builder = self._stream.create_graph_builder()
        try:
            with device_errors("capturing a CUDA graph"):
                # Thread-local: other threads of the process may go on allocating and synchronising.
                builder.begin_building("thread_local")
                self._record(builder)
                graph = builder.end_building().complete()
        except BaseException:
            for end in (builder.end_building, builder.close):
                with suppress(Exception):  # what went wrong in the capture is the error to report
                    end()
            raise
        builder.close()
        # Upload now, so that the first replay costs what the others do.
        graph.upload(self._stream)
        self._graph, self._state = graph, state
        self._captures[reason] += 1


def _reason(old: BindingState | None, new: BindingState) -> str:
    if old is None:
        return "first use"
    return next(f"{field.name} changed" for field in fields(new) if getattr(old, field.name) != getattr(new, field.name))

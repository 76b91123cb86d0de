"""Runs a bundle over NumPy arrays: one session per stage, all on one set of buffers that is allocated once."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import numpy as np
from numpy.typing import NDArray

from nitro_rt.bundle import Bundle
from nitro_rt.executor import Drawing
from nitro_rt.manifest import Engine
from nitro_rt.session import Array, Session, SessionFactory


class HostExecutor:
    """Text, denoiser and decoder on a host backend.

    It owns the buffers between the stages; what `draw` returns is a copy. Denoisers are loaded when their step count is
    first prepared, so a bundle of several step counts takes the memory of those that are used.
    """

    def __init__(self, bundle: Bundle, open_session: SessionFactory) -> None:
        self._bundle, self._open_session = bundle, open_session
        self._sessions = ExitStack()
        self._denoisers: dict[int, Session] = {}
        self._notes: list[str] = []
        self._compute_dtypes: dict[str, str] = {}
        manifest = bundle.manifest
        # The same name is the same tensor in every stage, but for the decoder, which reads where the denoiser wrote.
        self._buffers = _allocate(manifest.text, manifest.denoise[bundle.built_steps[0]], manifest.decode)
        try:
            self._text = self._open("text", manifest.text, self._buffers)
            images, latents = self._buffers["images"], self._buffers["next_latents"]
            self._decode = self._open("decode", manifest.decode, {"latents": latents, "images": images})
        except BaseException:
            self.close()
            raise

    @property
    def notes(self) -> tuple[str, ...]:
        return tuple(self._notes)

    @property
    def compute_dtypes(self) -> dict[str, str]:
        return dict(self._compute_dtypes)

    def prepare(self, num_steps: int) -> bool:
        if num_steps in self._denoisers:
            return False
        engine = self._bundle.manifest.denoise[num_steps]
        self._denoisers[num_steps] = self._open(f"denoise/{num_steps}", engine, self._buffers)
        return True

    def draw(
        self,
        num_steps: int,
        input_ids_BT: NDArray[np.int64],
        input_ids_2_BT: NDArray[np.int64],
        noise_NBCHW: NDArray[np.float32],
    ) -> Drawing:
        timings_ms: dict[str, float] = {}
        buffers = self._buffers
        buffers["input_ids"][:] = input_ids_BT
        buffers["input_ids_2"][:] = input_ids_2_BT
        with _timed(timings_ms, "text"):
            self._text.execute()
        with _timed(timings_ms, "denoise"):
            self._run_steps(num_steps, noise_NBCHW)
        with _timed(timings_ms, "decode"):
            self._decode.execute()
        finite = bool(np.isfinite(buffers["next_latents"]).all())
        return Drawing(images_BHWC=buffers["images"].copy(), timings_ms=timings_ms, finite=finite)

    def close(self) -> None:
        self._denoisers.clear()
        self._sessions.close()
        self._buffers = {}

    def _run_steps(self, num_steps: int, noise_NBCHW: NDArray[np.float32]) -> None:
        denoiser = self._denoisers[num_steps]
        buffers = self._buffers
        buffers["latents"][:] = noise_NBCHW[0]
        for step in range(num_steps):
            is_last = step == num_steps - 1
            buffers["step_index"][0] = step
            buffers["noise"][:] = 0 if is_last else noise_NBCHW[step + 1]
            denoiser.execute()
            if not is_last:
                buffers["latents"][:] = buffers["next_latents"]

    def _open(self, stage: str, engine: Engine, buffers: Mapping[str, Array]) -> Session:
        session = self._open_session(stage, engine, tuple(self._bundle.path(reference) for reference in engine.files))
        self._sessions.callback(session.close)
        session.bind({spec.name: buffers[spec.name] for spec in (*engine.inputs, *engine.outputs)})
        self._compute_dtypes[stage] = session.compute_dtype
        if session.compute_dtype != engine.compute_dtype:
            self._notes.append(
                f"{stage} was built to compute in {engine.compute_dtype}; {engine.backend} on this machine computes in "
                f"{session.compute_dtype}, so images differ slightly from the building machine's"
            )
        return session


def _allocate(*engines: Engine) -> dict[str, Array]:
    """One array per tensor name over all engines."""
    specs = {spec.name: spec for engine in engines for spec in (*engine.inputs, *engine.outputs)}
    return {name: np.zeros(spec.shape, dtype=spec.dtype) for name, spec in specs.items()}


@contextmanager
def _timed(timings_ms: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    timings_ms[name] = (time.perf_counter() - start) * 1e3

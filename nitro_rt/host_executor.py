"""Runs a bundle over NumPy arrays: one session per stage, all on one set of buffers per size that is allocated once."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import numpy as np
from numpy.typing import NDArray

from nitro_rt.bundle import Bundle
from nitro_rt.errors import EngineMismatch
from nitro_rt.executor import Drawing
from nitro_rt.manifest import Engine, FileRef
from nitro_rt.session import Array, Session, SessionFactory


class HostExecutor:
    """Text, denoisers and decoders on a host backend.

    It owns the buffers between the stages; what `draw` returns is a copy. Decoders and denoisers are loaded when their size
    and step count are first prepared, so a bundle of several takes the memory of those that are used.
    """

    def __init__(self, bundle: Bundle, open_session: SessionFactory, notes: list[str] | None = None) -> None:
        """`notes`: where `open_session` adds what a user should know."""
        self._bundle, self._open_session = bundle, open_session
        self._sessions = ExitStack()
        self._sized: dict[int, _Sized] = {}
        self._notes: list[str] = [] if notes is None else notes
        self._compute_dtypes: dict[str, str] = {}
        self._text_buffers = _allocate(bundle.manifest.text)
        try:
            self._text = self._open("text", bundle.manifest.text, self._text_buffers)
        except BaseException:
            self.close()
            raise

    @property
    def notes(self) -> tuple[str, ...]:
        return tuple(self._notes)

    @property
    def compute_dtypes(self) -> dict[str, str]:
        return dict(self._compute_dtypes)

    def prepare(self, num_steps: int, size_px: int) -> bool:
        engines, sized = self._bundle.engines_at(size_px), self._sized.get(size_px)
        if sized is not None and num_steps in sized.denoisers:
            return False
        if sized is None:
            # The same name is the same tensor in every stage, but for the decoder, which reads where the denoiser wrote.
            buffers = _allocate(engines.denoise[num_steps], engines.decode) | self._text_buffers
            images, latents = buffers["images"], buffers["next_latents"]
            stage = self._bundle.stage("decode", size_px)
            decode = self._open(stage, engines.decode, {"latents": latents, "images": images})
            sized = self._sized[size_px] = _Sized(buffers, decode)
        engine, stage = engines.denoise[num_steps], self._bundle.stage("denoise", size_px, num_steps)
        session = sized.loaded.get(engine.files) or self._open(stage, engine, sized.buffers)
        self._compute_dtypes[stage] = session.compute_dtype
        sized.loaded[engine.files] = session
        sized.denoisers[num_steps] = session, engine.first_row
        return True

    def draw(
        self,
        num_steps: int,
        size_px: int,
        input_ids_BT: NDArray[np.int64],
        input_ids_2_BT: NDArray[np.int64],
        noise_NBCHW: NDArray[np.float32],
    ) -> Drawing:
        timings_ms: dict[str, float] = {}
        sized = self._sized[size_px]
        self._text_buffers["input_ids"][:] = input_ids_BT
        self._text_buffers["input_ids_2"][:] = input_ids_2_BT
        with _timed(timings_ms, "text"):
            self._text.execute()
        with _timed(timings_ms, "denoise"):
            sized.run_steps(num_steps, noise_NBCHW)
        with _timed(timings_ms, "decode"):
            sized.decode.execute()
        finite = bool(np.isfinite(sized.buffers["next_latents"]).all())
        return Drawing(images_BHWC=sized.buffers["images"].copy(), timings_ms=timings_ms, finite=finite)

    def refit(self, weights: Mapping[str, Mapping[str, Array]]) -> None:
        raise EngineMismatch(
            f"{self._bundle.folder} runs on {self._bundle.backend}, whose engines take no new weights; fuse LoRAs when it is "
            "built: nitro-rt build --lora FILE"
        )

    def close(self) -> None:
        self._sessions.close()
        self._sized.clear()
        self._text_buffers = {}

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


class _Sized:
    """What one size has for itself: its buffers, its decoder and its denoisers."""

    def __init__(self, buffers: dict[str, Array], decode: Session) -> None:
        self.buffers, self.decode = buffers, decode
        self.loaded: dict[tuple[FileRef, ...], Session] = {}
        """Denoisers by their files, which step counts share."""
        self.denoisers: dict[int, tuple[Session, int]] = {}
        """Step count -> its denoiser, and the row of that one's tables where its steps begin."""

    def run_steps(self, num_steps: int, noise_NBCHW: NDArray[np.float32]) -> None:
        (denoiser, first_row), buffers = self.denoisers[num_steps], self.buffers
        buffers["latents"][:] = noise_NBCHW[0]
        for step in range(num_steps):
            is_last = step == num_steps - 1
            buffers["step_index"][0] = first_row + step
            buffers["noise"][:] = 0 if is_last else noise_NBCHW[step + 1]
            denoiser.execute()
            if not is_last:
                buffers["latents"][:] = buffers["next_latents"]


def _allocate(*engines: Engine) -> dict[str, Array]:
    """One array per tensor name over all engines."""
    specs = {spec.name: spec for engine in engines for spec in (*engine.inputs, *engine.outputs)}
    return {name: np.zeros(spec.shape, dtype=spec.dtype) for name, spec in specs.items()}


@contextmanager
def _timed(timings_ms: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    timings_ms[name] = (time.perf_counter() - start) * 1e3

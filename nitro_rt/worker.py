"""The thread that owns an executor: it opens it, draws what the queue gives, and closes it.

CUDA's current device belongs to a thread, and an engine's context and a stream may not be used by two at once.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np

from nitro_rt.bundle import Bundle
from nitro_rt.errors import DeviceLost, EngineMismatch, NitroError, PipelineClosed
from nitro_rt.executor import Executor
from nitro_rt.request import Errand, Float32, Request, Rows, Turn
from nitro_rt.request_queue import RequestQueue
from nitro_rt.result import Result

EXIT_WAIT_S = 10.0
"""How long the interpreter's exit waits for the images that are being drawn."""


class Worker:
    """Draws requests on a thread of its own until it is closed or its device is lost.

    It does not refer to the pipeline, so a pipeline that nobody closes can be collected.
    """

    def __init__(
        self,
        bundle: Bundle,
        open_executor: Callable[[], Executor],
        empty_ids_T: Sequence[Sequence[int]],
        max_waiting: int,
        first_size_px: int,
    ) -> None:
        """Open the executor and load the denoiser of the smallest step count at one size.

        Args:
            empty_ids_T: the token ids of the empty prompt, of both tokenizers; unused rows of a batch hold them.
            first_size_px: the size that is loaded now.
        Raises: what opening and loading raise.
        """
        self.queue = RequestQueue(max_waiting)
        self.notes: tuple[str, ...] = ()
        self.compute_dtypes: dict[str, str] = {}
        self.has_stopped = False
        """Whether it ended by itself: its device is lost."""
        self.process_id = os.getpid()
        self._bundle, self._first_size_px = bundle, first_size_px
        self._staging = _Staging(bundle.manifest.batch, empty_ids_T)
        self._close_error: Exception | None = None
        opened: Future[None] = Future()
        # A daemon: the interpreter waits for other threads before it calls the exit function that ends this one.
        self._thread = threading.Thread(
            target=self._run, args=(open_executor, opened), name=f"nitro-rt {bundle.folder.name}", daemon=True
        )
        self._thread.start()
        try:
            opened.result()
        except BaseException:  # KeyboardInterrupt too
            self.queue.end()
            raise
        finally:
            del opened  # its exception refers to this frame

    @property
    def is_current_thread(self) -> bool:
        """Whether the caller runs on the worker's thread, as the callbacks of futures do."""
        return threading.current_thread() is self._thread  # not by its number: the next thread may get that of a dead one

    def close(self, *, wait: bool) -> None:
        """Refuse new requests, draw those that wait (or refuse them too), free everything, and end the thread.

        Raises: what closing the executor raises.
        """
        if os.getpid() != self.process_id:
            return  # a fork of the process that has the thread
        self.queue.refuse(self.closed_error, waiting=not wait)
        self.queue.end()
        if not self.is_current_thread:
            self.join()
        error, self._close_error = self._close_error, None
        if error is not None:
            raise error

    def join(self) -> None:
        """Wait until the thread has ended and everything is free."""
        self._thread.join()

    def closed_error(self) -> PipelineClosed:
        return PipelineClosed(f"the pipeline of {self._bundle.folder} is closed; load it again: Pipeline.load(...)")

    def end(self) -> None:
        """End when all that waits is drawn. Takes no lock and does not wait, so a finaliser may call it."""
        if os.getpid() == self.process_id:
            self.queue.end()

    def _run(self, open_executor: Callable[[], Executor], opened: Future[None]) -> None:
        executor: Executor | None = None
        try:
            executor = open_executor()
            self._prepare(executor, self._bundle.built_steps[0], self._first_size_px)
        except BaseException as exc:
            try:
                if executor is not None:
                    executor.close()
            finally:
                opened.set_exception(exc)
                del opened  # the exception refers to this frame
            return
        # Now, with the backend imported, so that this comes before the backend's own exit functions.
        atexit.register(self._end_at_exit)
        opened.set_result(None)
        try:
            self._serve(executor)
        finally:
            if not self.has_stopped:
                self.queue.refuse(self.closed_error, waiting=True)  # who came in while it ended would wait for ever
            self._free(executor)
            atexit.unregister(self._end_at_exit)

    def _serve(self, executor: Executor) -> None:
        while (turn := self.queue.take(self._bundle.manifest.batch)) is not None:
            try:
                if isinstance(turn, Errand):
                    self._do(executor, turn)
                else:
                    self._draw(executor, turn)
            except BaseException as exc:
                self._stop(exc, [turn] if isinstance(turn, Errand) else turn)
                if isinstance(exc, DeviceLost):
                    return
                raise  # our own error keeps its traceback
            finally:
                del turn  # the images of a call are not kept until the next

    def _do(self, executor: Executor, errand: Errand) -> None:
        assert errand.run is not None
        try:
            errand.run(executor)
        except DeviceLost:
            raise
        except Exception as exc:  # whatever it is, it is of who asked; the worker goes on
            errand.fail(exc)
        else:
            errand.finish(None)

    def _draw(self, executor: Executor, batch: list[Request]) -> None:
        try:
            results = self._results(executor, batch)
        except DeviceLost:
            raise
        except Exception as exc:  # likewise; of several requests each is then tried alone
            if len(batch) == 1:
                batch[0].fail(exc)
                return
        else:
            for request, result in zip(batch, results, strict=True):
                request.finish(result)
            return
        # Perhaps one of them only is at fault, and each must get what it gets alone.
        for request in batch:
            self._draw(executor, [request])

    def _results(self, executor: Executor, batch: list[Request]) -> list[Result]:
        """One call of the executor. Raises: EngineMismatch where it gives no numbers."""
        first, manifest = batch[0], self._bundle.manifest
        begin_s = time.perf_counter()
        known = len(self.notes)
        load_ms: dict[str, float] = {}
        if self._prepare(executor, first.num_steps, first.size_px):
            load_ms["load"] = (time.perf_counter() - begin_s) * 1e3
            first.load_notes = self.notes[known:]
        drawing = executor.draw(first.num_steps, first.size_px, *self._staging.rows(batch))
        if not drawing.finite:
            raise EngineMismatch(
                f"{self._bundle.folder} gave latents that are not finite (NaN or infinity) at {first.num_steps} steps: "
                f"its {manifest.decode.precision} engines overflow here; build with --precision fp32"
            )
        results, num_images, row = [], sum(request.num_rows for request in batch), 0
        for request in batch:
            waited_ms = (begin_s - request.start_s) * 1e3 - sum(request.timings_ms.values())
            own_ms = request.timings_ms | {"queue": waited_ms} | load_ms | drawing.timings_ms
            results.append(
                Result(
                    array_BHWC=drawing.images_BHWC[row : row + request.num_rows],
                    prompts=request.prompts,
                    seed=request.seed,
                    steps=request.num_steps,
                    size_px=request.size_px,
                    bundle_digest=self._bundle.digest,
                    timings_ms=own_ms | {"total": (time.perf_counter() - request.start_s) * 1e3},
                    num_images_in_call=num_images,
                    warnings=(*self.notes, *request.cuts),
                )
            )
            row += request.num_rows
        return results

    def _prepare(self, executor: Executor, num_steps: int, size_px: int) -> bool:
        """Load what is not loaded yet, and publish what the executor then says of itself."""
        was_loaded = executor.prepare(num_steps, size_px)
        if was_loaded:
            self.notes, self.compute_dtypes = executor.notes, executor.compute_dtypes
        return was_loaded

    def _stop(self, exc: BaseException, begun: Sequence[Turn[Any]]) -> None:
        """Fail everything: what is being drawn, what waits, and what will be asked."""
        kind = DeviceLost if isinstance(exc, DeviceLost) else NitroError
        message = f"{self._bundle.folder} cannot draw any more: {str(exc) or repr(exc)}; pipe.reopen() loads it again"
        self.has_stopped = True  # before anybody is told, since the answer may be reopen()
        self.queue.refuse(lambda: kind(message), waiting=True)
        for turn in begun:
            if not turn.done():
                error = kind(message)
                error.__cause__ = exc
                turn.fail(error)

    def _free(self, executor: Executor) -> None:
        self.compute_dtypes = {}
        try:
            executor.close()
        except Exception as exc:  # raised by close()
            if not self.has_stopped:  # a lost device cannot free, and that it is lost has been said
                self._close_error = exc

    def _end_at_exit(self) -> None:
        if os.getpid() == self.process_id:
            self.queue.refuse(self.closed_error, waiting=True)
            self.queue.end()
            self._thread.join(EXIT_WAIT_S)


class _Staging:
    """Full batches of the rows of several requests, in arrays that are allocated once per step count and size."""

    def __init__(self, batch: int, empty_ids_T: Sequence[Sequence[int]]) -> None:
        self._batch = batch
        self._empty_ids_T = empty_ids_T
        self._ids_BT, self._ids_2_BT = (np.tile(np.array(ids, dtype=np.int64), (batch, 1)) for ids in empty_ids_T)
        self._noise: dict[tuple[int, int], tuple[Float32, int]] = {}
        """By steps and size: the array, and how many of its rows are not zero."""

    def rows(self, batch: list[Request]) -> Rows:
        """Their rows, then empty prompts with zero noise. Valid until the next call."""
        first = batch[0]
        assert first.rows is not None
        if first.num_rows == self._batch:
            return first.rows  # a full batch by itself
        shape = (first.num_steps, first.size_px)
        noise_NBCHW, num_used = self._noise.get(shape) or (self._zeros_like(first.rows[2]), 0)
        end = 0
        for request in batch:
            assert request.rows is not None
            begin, end = end, end + request.num_rows
            self._ids_BT[begin:end], self._ids_2_BT[begin:end], noise_NBCHW[:, begin:end] = request.rows
        self._ids_BT[end:], self._ids_2_BT[end:] = self._empty_ids_T
        noise_NBCHW[:, end:num_used] = 0
        self._noise[shape] = (noise_NBCHW, end)
        return self._ids_BT, self._ids_2_BT, noise_NBCHW

    def _zeros_like(self, noise_NBCHW: Float32) -> Float32:
        num_steps, _, *sample_CHW = noise_NBCHW.shape
        return np.zeros((num_steps, self._batch, *sample_CHW), dtype=np.float32)

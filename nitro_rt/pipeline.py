"""The public entry: load a bundle, draw from any number of threads, close."""

from __future__ import annotations

import asyncio
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nitro_rt import arguments, executor
from nitro_rt.bundle import Bundle, open_bundle
from nitro_rt.errors import ConfigError, NitroError, PipelineClosed
from nitro_rt.executor import DeviceOptions, Executor
from nitro_rt.noise import draw_noise
from nitro_rt.request import Errand, Float32, Ids, Request
from nitro_rt.result import Result
from nitro_rt.tokenizer import PromptTruncated, Tokenizer, truncation_message
from nitro_rt.worker import Worker

MAX_QUEUE = 64


class ComputeTypeDiffers(UserWarning):
    """The bundle runs otherwise here than it was built to: in another number type, with sums of bytes that saturate, or on a
    GPU without its CUDA graph."""


class Pipeline:
    """A loaded bundle, safe to call from any number of threads.

    The calling thread checks, tokenises and draws the noise; one thread of the pipeline's own runs the engines. Requests wait
    in a bounded queue, and those of the same steps and size share a call of the engines up to the bundle's batch, which
    changes no image.
    """

    _worker: Worker | None = None

    def __init__(self, bundle: Bundle, open_executor: Callable[[], Executor], max_queue: int, size: int | None) -> None:
        """Use `Pipeline.load`."""
        self.bundle, self._first_size_px = bundle, arguments.checked_size(size, bundle)
        self._open_executor, self._max_queue = open_executor, arguments.checked_max_queue(max_queue)
        self._tokenizers = tuple(Tokenizer(bundle.path(spec.file), spec) for spec in bundle.manifest.tokenizers)
        self._reopening = threading.Lock()
        self._is_closed = False
        self._worker = self._open_worker()

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike[str],
        *,
        size: int | None = None,
        max_queue: int = MAX_QUEUE,
        device: int = DeviceOptions.device,
        cuda_graphs: str = DeviceOptions.cuda_graphs,
        verify_capture: bool = DeviceOptions.verify_capture,
        runtime_cache: bool = DeviceOptions.runtime_cache,
    ) -> Pipeline:
        """Open a bundle, check every file's digest, and load its engines.

        The smallest step count at one size is loaded here, the others at their first use.

        Args:
            size: in pixels, of those the bundle has, the one that is loaded here; None takes its first. What is drawn is said
                in each call.
            max_queue: how many requests may wait beside those that are drawn, whatever their steps and size. A request is at
                most one batch of images, so it waits for at most so many calls of the engines.
            device, cuda_graphs, verify_capture: see `nitro_rt.executor.DeviceOptions`; for bundles of GPU engines only.
            runtime_cache: keep what the engine's library compiles for this machine beside the bundle, and begin there the next
                time; for bundles of TensorRT-RTX, TensorRT in ONNX Runtime, and OpenVINO.
        Warns: ComputeTypeDiffers where this machine computes in another type than the building one.
        Raises: ConfigError, ModelNotFound, BundleError, BackendUnavailable, EngineMismatch, ShapeError.
        """
        options = DeviceOptions(
            device=device, cuda_graphs=cuda_graphs, verify_capture=verify_capture, runtime_cache=runtime_cache
        )
        bundle = open_bundle(folder)
        bundle.check_files()
        return cls._opened(bundle, partial(executor.open_executor, bundle, options), max_queue, size)

    @classmethod
    def of(
        cls,
        bundle: Bundle,
        *,
        options: DeviceOptions | None = None,
        max_queue: int = MAX_QUEUE,
        open_executor: Callable[[], Executor] | None = None,
    ) -> Pipeline:
        """Load the engines of an opened bundle, whose files are taken as they are; for the rest as `load`.

        Args:
            open_executor: opens what draws in place of the bundle's own executor, on the thread that then uses it; it takes no
                options.
        """
        if open_executor is not None and options is not None:
            raise ConfigError("give options or open_executor, not both: an executor that is given takes no options")
        opener = open_executor or partial(executor.open_executor, bundle, options)
        return cls._opened(bundle, opener, max_queue, None)

    @classmethod
    def _opened(cls, bundle: Bundle, open_executor: Callable[[], Executor], max_queue: int, size: int | None) -> Pipeline:
        pipe = cls(bundle, open_executor, max_queue, size)
        try:
            _warn(pipe._running_worker().notes, ComputeTypeDiffers, stacklevel=4)
        except BaseException:  # a filter may turn a warning into an error
            pipe.close(wait=False)
            raise
        return pipe

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        seed: int | Sequence[int] | None = None,
        steps: int | None = None,
        size: int | None = None,
        deadline_s: float | None = None,
        negative_prompt: object = None,
        guidance_scale: object = None,
    ) -> Result:
        """Draw one image per prompt, and wait for them. Where the queue is full, wait for a place too.

        Args:
            prompt: one prompt or up to the bundle's batch of them.
            seed: 0 to 2**64 - 1; one for the whole call, as `torch.Generator().manual_seed(seed)` in diffusers, or one per
                prompt. None draws a fresh one, which stands in the result.
            steps: a step count of the bundle; None takes the smallest.
            size: edge in pixels; None takes the bundle's first.
            deadline_s: seconds from now within which drawing must begin; None waits as long as it takes. What has begun is
                finished.
            negative_prompt, guidance_scale: refused. The model is distilled to run without guidance.
        Warns: PromptTruncated where a prompt is longer than the text encoder reads; ComputeTypeDiffers as `load`, where an
            engine is loaded in this call.
        Raises: ConfigError for a wrong argument, EngineMismatch for what the bundle was not built for, DeadlineExceeded,
            PipelineClosed, DeviceLost. KeyboardInterrupt takes a waiting request back.
        """
        request = self._request(prompt, seed, steps, size, deadline_s, negative_prompt, guidance_scale)
        self._submit(request, wait=True, stacklevel=3)
        try:
            result = request.result()
        except BaseException:
            request.cancel()
            raise
        _warn(request.load_notes, ComputeTypeDiffers, stacklevel=3)
        return result

    def submit(
        self,
        prompt: str | Sequence[str],
        *,
        seed: int | Sequence[int] | None = None,
        steps: int | None = None,
        size: int | None = None,
        deadline_s: float | None = None,
        wait: bool = False,
        negative_prompt: object = None,
        guidance_scale: object = None,
    ) -> Future[Result]:
        """Queue a call and return at once; the images come with the future.

        `Future.cancel` takes a waiting request back. One that is being drawn cannot be interrupted, since CUDA has no way to:
        its result is dropped if nobody asks for it. Callbacks of the future run on the thread that draws, so they must be
        short, and must not wait for this pipeline.

        Args:
            wait: where the queue is full, wait for a place and not raise QueueFull.
            prompt, seed, steps, size, deadline_s, negative_prompt, guidance_scale: as for a call. A late request fails when
                its turn comes, or when the call before ends.
        Warns: PromptTruncated. What an engine that is loaded for the request has to say stands in `Result.warnings`.
        Raises: QueueFull, ConfigError, EngineMismatch, PipelineClosed, DeviceLost; from the future: DeadlineExceeded, and
            PipelineClosed or DeviceLost where that happens before the images are there.
        """
        request = self._request(prompt, seed, steps, size, deadline_s, negative_prompt, guidance_scale)
        self._submit(request, wait=wait, stacklevel=3)
        return request

    async def submit_async(
        self,
        prompt: str | Sequence[str],
        *,
        seed: int | Sequence[int] | None = None,
        steps: int | None = None,
        size: int | None = None,
        deadline_s: float | None = None,
        wait: bool = True,
        negative_prompt: object = None,
        guidance_scale: object = None,
    ) -> Result:
        """Draw one image per prompt without blocking the event loop.

        Cancelling the task takes a waiting request back. The noise is drawn in asyncio's own thread pool.

        Args:
            wait: where the queue is full, wait for a place; False raises QueueFull at once, as a server may want it.
            prompt, seed, steps, size, deadline_s, negative_prompt, guidance_scale: as for a call.
        Warns, raises: as a call; QueueFull.
        """
        request = self._request(prompt, seed, steps, size, deadline_s, negative_prompt, guidance_scale)
        worker = self._running_worker()
        try:
            worker.queue.enter(request, wait=wait)
            if request.admission is not None:
                await _admitted(request)
            ids = self._tokenize(request, stacklevel=3)
            request.rows = (*ids, await asyncio.to_thread(self._noise, request))
            worker.queue.line_up(request)
            result = await asyncio.wrap_future(request)
        except BaseException:  # CancelledError too
            request.cancel()
            raise
        _warn(request.load_notes, ComputeTypeDiffers, stacklevel=3)
        return result

    @property
    def compute_dtypes(self) -> dict[str, str]:
        """Loaded stage (`text`, `denoise/1`, `decode`) -> what it computes in on this machine; empty when closed."""
        return {} if self._worker is None else dict(self._worker.compute_dtypes)

    def refit(self, weights: Mapping[str, Mapping[str, NDArray[Any]]]) -> None:
        """Exchange weights of the loaded engines, all or none, after what is queued now and before what comes later.

        `nitro_engines.lora_refit.LoraRefit` makes them of LoRAs. `reopen` loads the bundle's own weights.

        Args:
            weights: `text`, `denoise` or `decode` -> the ONNX graph's initializer -> values, in its type and shape.
        Raises: EngineMismatch where the engines do not fit them or were not built to be refitted, ConfigError for an unknown
            stage, PipelineClosed, DeviceLost.
        """
        errand = Errand(lambda executor: executor.refit(weights))
        worker = self._running_worker()
        _require_another_thread(worker)
        try:
            worker.queue.enter(errand, wait=True)
            if errand.admission is not None:
                errand.admission.result()
            worker.queue.line_up(errand)
            errand.result()
        except BaseException:
            errand.cancel()
            raise

    def close(self, *, wait: bool = True) -> None:
        """Release engines and buffers, and end the pipeline's thread. A second call does nothing; any thread may call.

        Args:
            wait: draw what is queued first. Otherwise what is queued fails with PipelineClosed; what is being drawn is
                finished all the same. Who still waits for a place in the queue is refused either way.
        """
        self._is_closed = True  # before the worker is looked up: `reopen` does it the other way round, so one sees the other
        if self._worker is not None:
            self._worker.close(wait=wait)

    def reopen(self) -> None:
        """Load the engines anew after DeviceLost. Does nothing where the pipeline draws, so every thread that saw the loss may
        call it.

        Warns: ComputeTypeDiffers as `load`.
        Raises: PipelineClosed after `close`; what `load` raises where the device is not usable yet: call again later.
        """
        with self._reopening:
            worker = self._running_worker()
            if self._is_closed:
                raise worker.closed_error()
            if not worker.has_stopped:
                return
            _require_another_thread(worker)
            worker.join()  # the old engines are freed before the new ones are loaded
            self._worker = worker = self._open_worker()
            if self._is_closed:
                worker.close(wait=False)
                raise worker.closed_error()
        _warn(worker.notes, ComputeTypeDiffers, stacklevel=3)

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None) -> None:
        """Close; after an exception without drawing what still waits, so that Ctrl-C ends soon."""
        self.close(wait=exc is None)

    def __del__(self, _warn: Callable[..., None] = warnings.warn) -> None:
        # As files do: whoever listens (python -X dev) is told, and everything is released all the same.
        if self._worker is not None and not self._is_closed:
            self._worker.end()
            _warn(f"unclosed pipeline of {self.bundle.folder}", ResourceWarning, source=self, stacklevel=2)

    def _open_worker(self) -> Worker:
        empty_ids_T = [tokenizer.encode("").ids for tokenizer in self._tokenizers]
        return Worker(self.bundle, self._open_executor, empty_ids_T, self._max_queue, self._first_size_px)

    def _running_worker(self) -> Worker:
        worker = self._worker
        assert worker is not None
        if worker.process_id != os.getpid():
            raise PipelineClosed(
                f"the pipeline of {self.bundle.folder} was loaded in process {worker.process_id}, and this is a fork of it "
                "without its thread and its device; load it in each process: Pipeline.load(...)"
            )
        return worker

    def _request(
        self,
        prompt: object,
        seed: object,
        steps: object,
        size: object,
        deadline_s: object,
        negative_prompt: object,
        guidance_scale: object,
    ) -> Request:
        """The checked call. Raises: ConfigError, EngineMismatch."""
        start_s = time.perf_counter()
        arguments.refuse_guidance(negative_prompt, guidance_scale)
        prompts = arguments.checked_prompts(prompt, self.bundle)
        return Request(
            prompts=prompts,
            seed=arguments.checked_seeds(seed, len(prompts)),
            num_steps=arguments.checked_steps(steps, self.bundle),
            size_px=arguments.checked_size(size, self.bundle),
            start_s=start_s,
            deadline_s=arguments.checked_deadline(deadline_s),
        )

    def _submit(self, request: Request, *, wait: bool, stacklevel: int) -> None:
        """A place first, then the work: a full queue refuses at once, and who waits for a place holds no noise."""
        worker = self._running_worker()
        if wait:
            _require_another_thread(worker)
        try:
            worker.queue.enter(request, wait=wait)
            if request.admission is not None:
                try:
                    request.admission.result(request.remaining_s())
                except TimeoutError:
                    raise request.deadline_error() from None
            request.rows = (*self._tokenize(request, stacklevel + 1), self._noise(request))
            worker.queue.line_up(request)
        except BaseException:
            request.cancel()
            raise

    def _tokenize(self, request: Request, stacklevel: int) -> tuple[Ids, Ids]:
        begin_s = time.perf_counter()
        encoded = [[tokenizer.encode(prompt) for prompt in request.prompts] for tokenizer in self._tokenizers]
        cuts = [message for both in zip(*encoded, strict=True) if (message := truncation_message(both))]
        ids_BT, ids_2_BT = (np.array([prompt.ids for prompt in prompts], dtype=np.int64) for prompts in encoded)
        request.cuts = tuple(dict.fromkeys(cuts))
        request.timings_ms["tokenize"] = (time.perf_counter() - begin_s) * 1e3
        _warn(request.cuts, PromptTruncated, stacklevel + 1)
        return ids_BT, ids_2_BT

    def _noise(self, request: Request) -> Float32:
        begin_s, num_rows = time.perf_counter(), request.num_rows
        latent_CHW = self.bundle.latent_CHW_at(request.size_px)
        noise_NBCHW = draw_noise(request.seed, request.num_steps, num_rows, num_rows, latent_CHW)
        request.timings_ms["noise"] = (time.perf_counter() - begin_s) * 1e3
        return noise_NBCHW


def _require_another_thread(worker: Worker) -> None:
    """Raises: NitroError where the caller would wait for its own thread."""
    if worker.is_current_thread:
        raise NitroError(
            "this was called in the callback of a future, on the pipeline's own thread, and would wait for itself; call it on "
            "another thread, or use submit(...), which does not wait"
        )


async def _admitted(request: Request) -> None:
    """Wait for a place in the queue. Raises: DeadlineExceeded."""
    assert request.admission is not None
    try:
        await asyncio.wait_for(asyncio.wrap_future(request.admission), request.remaining_s())
    except TimeoutError:
        raise request.deadline_error() from None


def _warn(messages: Iterable[str], category: type[Warning], stacklevel: int) -> None:
    for message in messages:
        warnings.warn(message, category, stacklevel=stacklevel)

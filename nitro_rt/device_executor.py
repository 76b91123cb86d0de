"""Runs a bundle on an NVIDIA GPU, TensorRT and TensorRT-RTX alike: one CUDA graph from token ids and noise to uint8.

A *program* is what one (steps, size) needs: its static tensors and its graph. One image is one upload, the engines one
after another on one stream, one download, and one wait for the end; nothing else happens between the first byte up and the
last byte down.

    upload   [input_ids | input_ids_2 | noise of every step]       pinned -> device
    text     -> prompt_embeds, pooled_prompt_embeds
    denoise  x steps: latents of the step before, its noise -> next latents, the last into the download block
    decode   -> images
    download [next_latents | images]                               device -> pinned

All engines share one piece of scratch memory, as large as the largest needs: they never run at the same time.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nitro_rt.bundle import STAGE_INPUTS, Bundle
from nitro_rt.cuda_graph import BindingState, CudaGraph
from nitro_rt.device_errors import device_errors
from nitro_rt.device_memory import ALIGNMENT_BYTES, DeviceBlock, DeviceMemory, PinnedBlock, aligned
from nitro_rt.device_modules import DeviceModules, load_modules
from nitro_rt.diagnosis import diagnose, require_machine
from nitro_rt.errors import CaptureError, ConfigError
from nitro_rt.executor import DeviceOptions, Drawing
from nitro_rt.manifest import Engine, FileRef, TensorSpec
from nitro_rt.noise import draw_noise
from nitro_rt.runtime_cache import runtime_cache_file
from nitro_rt.session import Array
from nitro_rt.tensorrt_engine import TensorRtEngine, TensorRtRuntime


class DeviceExecutor:
    """Text, denoisers and decoders of a bundle on one GPU.

    It owns a non-blocking stream, a memory pool, the pinned buffers, the engines and the graphs; `close` frees them all.
    Opened, used and closed by one thread, whose current device it sets.
    """

    def __init__(self, bundle: Bundle, options: DeviceOptions | None = None, modules: DeviceModules | None = None) -> None:
        """
        Args:
            modules: what to call; None imports the bundle's backend.
        Raises: BackendUnavailable, EngineMismatch, BundleError before anything is loaded, with the reason and what to do.
        """
        self._bundle, self._options = bundle, options or DeviceOptions()
        if modules is None:
            require_machine(bundle)
            modules = load_modules(bundle.backend)
        self._modules = modules
        self._notes = list(diagnose(bundle, self._modules, self._options.device))
        self.captures: Counter[str] = Counter()
        """How often a graph was captured, by reason."""
        self.warm_up_ms = 0.0
        """What the first runs outside a graph, its capture and its check took at load."""
        self._programs: dict[tuple[int, int], _Program] = {}
        self._engines: dict[tuple[str, tuple[FileRef, ...]], TensorRtEngine] = {}
        """By kind of stage and files: step counts and sizes share what they have in common."""
        self._compute_dtypes: dict[str, str] = {}
        self._weights = 0
        self._refitted: dict[str, dict[str, Array]] = {}
        self._scratch: Any = None
        self._memory: DeviceMemory | None = None
        self._runtime: TensorRtRuntime | None = None
        self._stream: Any = None
        self._events: tuple[Any, ...] = ()
        try:
            with device_errors(f"opening {bundle.folder} on device {self._options.device}"):
                self._open()
        except BaseException:
            self.close()
            raise

    @property
    def notes(self) -> tuple[str, ...]:
        return tuple(self._notes)

    @property
    def compute_dtypes(self) -> dict[str, str]:
        return dict(self._compute_dtypes)

    @property
    def scratch_bytes(self) -> int:
        """Device memory that the engines share while they run."""
        return 0 if self._scratch is None else int(self._scratch.size)

    def prepare(self, num_steps: int, size_px: int) -> bool:
        if (num_steps, size_px) in self._programs:
            return False
        bundle = self._bundle
        engines = bundle.engines_at(size_px)
        denoise, decode = engines.denoise[num_steps], engines.decode
        assert self._memory is not None
        with device_errors(f"loading {bundle.folder} for {num_steps} steps at {size_px} pixels"):
            program = _Program(
                self._memory,
                self._stream,
                text=self._engine("text", bundle.manifest.text),
                denoise=self._engine(bundle.stage("denoise", size_px, num_steps), denoise),
                decode=self._engine(bundle.stage("decode", size_px), decode),
                specs={spec.name: spec for e in (bundle.manifest.text, denoise, decode) for spec in (*e.inputs, *e.outputs)},
                num_steps=num_steps,
                first_row=denoise.first_row,
                captures=self.captures,
            )
            self._programs[num_steps, size_px] = program
            try:
                self._fit_scratch()
                start_s = time.perf_counter()
                self._warm_up(program, num_steps, size_px)
                self.warm_up_ms += (time.perf_counter() - start_s) * 1e3
            except BaseException:
                self._programs.pop((num_steps, size_px)).close()
                raise
        return True

    def draw(
        self,
        num_steps: int,
        size_px: int,
        input_ids_BT: NDArray[np.int64],
        input_ids_2_BT: NDArray[np.int64],
        noise_NBCHW: NDArray[np.float32],
    ) -> Drawing:
        program = self._programs[num_steps, size_px]
        with device_errors(f"drawing with {self._bundle.folder}"):
            program.write(input_ids_BT, input_ids_2_BT, noise_NBCHW)
            timings_ms = self._run(program)
        views = program.download.arrays
        return Drawing(
            images_BHWC=views["images"].copy(),
            timings_ms=timings_ms,
            finite=bool(np.isfinite(views["next_latents"]).all()),
        )

    def refit(self, weights: Mapping[str, Mapping[str, Array]]) -> None:
        """Exchange weights of the engines, all or none; engines that are loaded later get them too.

        Args:
            weights: `text`, `denoise` or `decode` -> the ONNX graph's initializer -> its values, in the graph's type and
                shape. What is not named stays as it is.
        Raises: EngineMismatch if an engine was not built for it or a value does not fit: nothing has changed then. (Where
            TensorRT fails at the exchange itself, the message asks to load the bundle again.) ConfigError for another stage.
        """
        unknown = set(weights) - set(STAGE_INPUTS)
        if unknown:
            raise ConfigError(f"there is no stage {min(unknown)!r} to refit; available: {', '.join(STAGE_INPUTS)}")
        with device_errors(f"refitting {self._bundle.folder}"):
            refitted = [(engine, weights.get(kind, {})) for (kind, _), engine in self._engines.items()]
            set_ = [(engine, engine.set_weights(new)) for engine, new in refitted if new]
            for engine, refitter in set_:
                engine.take_weights(refitter)
        for kind, new in weights.items():
            self._refitted.setdefault(kind, {}).update(new)
        self._weights += 1

    def close(self) -> None:
        """Wait for the stream and free everything. Also after a lost device: what cannot be freed any more is let go of."""
        with suppress(Exception):  # a lost device fails here, and all that follows must be let go of nevertheless
            if self._stream is not None:
                self._stream.sync()
        for program in self._programs.values():
            with suppress(Exception):
                program.graph.close()
        self._programs.clear()
        for engine in self._engines.values():
            engine.close()
        self._engines.clear()
        runtime, self._runtime = self._runtime, None
        if runtime is not None:
            with suppress(Exception):
                self._notes += runtime.close()
        memory, self._memory, self._scratch = self._memory, None, None
        stream, self._stream = self._stream, None
        events, self._events = self._events, ()
        for owned in (memory, *events, stream):
            with suppress(Exception):
                if owned is not None:
                    owned.close()

    def _open(self) -> None:
        cuda, options = self._modules.cuda, self._options
        device = cuda.Device(options.device)
        device.set_current()
        self._stream = device.create_stream(options=cuda.StreamOptions(nonblocking=True))
        timed = cuda.EventOptions(timing_enabled=True)
        self._events = tuple(device.create_event(options=timed) for _ in range(4))
        self._memory = DeviceMemory(self._modules, device, self._stream)
        self._runtime = TensorRtRuntime(
            self._modules,
            own_graphs=options.cuda_graphs == "runtime",
            cache_file=runtime_cache_file(self._bundle.folder) if options.runtime_cache else None,
        )

    def _engine(self, stage: str, engine: Engine) -> TensorRtEngine:
        """The loaded engine of a stage."""
        kind, files = _kind(stage), engine.files
        if (kind, files) not in self._engines:
            assert self._runtime is not None
            paths = tuple(self._bundle.path(reference) for reference in engine.files)
            loaded = self._runtime.load(stage, engine, paths)
            if new := self._refitted.get(kind):
                loaded.take_weights(loaded.set_weights(new))
            self._engines[kind, files] = loaded  # only now: one that kept its old weights must not be found here
        self._compute_dtypes[stage] = engine.compute_dtype
        return self._engines[kind, files]

    def _fit_scratch(self) -> None:
        """Scratch memory for the largest engine; a larger one replaces it, and graphs notice by their binding state."""
        assert self._memory is not None
        needed = max(engine.scratch_bytes for engine in self._engines.values())
        if self._scratch is None or self._scratch.size < needed:
            self._stream.sync()  # nothing may run in what is freed
            if self._scratch is not None:
                self._memory.release(self._scratch)
            self._scratch = self._memory.device_buffer(aligned(max(needed, ALIGNMENT_BYTES)))
        for engine in self._engines.values():
            engine.use_scratch(int(self._scratch.handle), self._scratch.size)

    def _warm_up(self, program: _Program, num_steps: int, size_px: int) -> None:
        """One run outside any graph, since a context's first may allocate; then the graph, compared with a second run."""
        shape_NBCHW = program.noise_shape_NBCHW
        noise_NBCHW = draw_noise(0, num_steps, shape_NBCHW[1], shape_NBCHW[1], shape_NBCHW[2:])
        program.write(0, 0, noise_NBCHW)
        self._run_eagerly(program)
        program.is_captured = self._captures_here(program, num_steps, size_px)
        if not (program.is_captured and self._options.verify_capture):
            return
        self._run_eagerly(program)
        eager = {name: view.copy() for name, view in program.download.arrays.items()}
        self._run(program)
        for name, view in program.download.arrays.items():
            if not np.array_equal(eager[name], view, equal_nan=view.dtype != np.uint8):
                raise CaptureError(
                    f"the CUDA graph of {num_steps} steps at {size_px} pixels gives other {name} than the same engines run "
                    f"one by one (largest difference {_difference(eager[name], view):g}); load with cuda_graphs='off', and "
                    "report this bundle"
                )

    def _captures_here(self, program: _Program, num_steps: int, size_px: int) -> bool:
        """Whether this program gets a graph of ours. Raises: CaptureError if it was asked for and an engine refuses."""
        mode = self._options.cuda_graphs
        if mode in ("off", "runtime"):
            return False
        refusing = program.refusing_capture()
        if refusing and mode == "capture":
            raise CaptureError(f"{refusing} cannot be captured into a CUDA graph on this GPU; load with cuda_graphs='off'")
        if refusing:
            self._notes.append(
                f"no CUDA graph for {num_steps} steps at {size_px} pixels: {refusing} cannot be captured on this GPU; "
                "its engines are launched one by one"
            )
        return not refusing

    def _run(self, program: _Program) -> dict[str, float]:
        """One image with one wait. Returns: milliseconds of device time, by stage where no graph holds them together."""
        if not program.is_captured:
            return self._run_eagerly(program)
        start, end, *_ = self._events
        stream = self._stream
        stream.record(start)
        program.graph.launch(self._state(program))
        stream.record(end)
        stream.sync()
        return {"device": end - start}

    def _run_eagerly(self, program: _Program) -> dict[str, float]:
        stream, events = self._stream, self._events
        program.record(stream, lambda number: stream.record(events[number]))
        stream.sync()
        return {stage: events[number + 1] - events[number] for number, stage in enumerate(("text", "denoise", "decode"))}

    def _state(self, program: _Program) -> BindingState:
        scratch = (int(self._scratch.handle), self._scratch.size)
        return BindingState(buffers=program.addresses, scratch=scratch, weights=self._weights)


class _Program:
    """The tensors, the launches and the graph of one (steps, size)."""

    def __init__(
        self,
        memory: DeviceMemory,
        stream: Any,
        *,
        text: TensorRtEngine,
        denoise: TensorRtEngine,
        decode: TensorRtEngine,
        specs: Mapping[str, TensorSpec],
        num_steps: int,
        first_row: int,
        captures: Counter[str],
    ) -> None:
        self._stream_handle = int(stream.handle)
        self._num_steps = num_steps
        latents, steps = specs["latents"], range(num_steps)
        self.noise_shape_NBCHW = (num_steps, *latents.shape)
        ids = {name: specs[name] for name in ("input_ids", "input_ids_2")}
        self._upload = PinnedBlock(memory, ids | {f"noise_{step}": latents for step in steps})
        constants = {f"step_{step}": specs["step_index"] for step in steps} | {"no_noise": latents}
        self._constants = PinnedBlock(memory, constants)
        embeds = {name: specs[name] for name in ("prompt_embeds", "pooled_prompt_embeds")}
        self._work = DeviceBlock(memory, embeds | {"even_latents": latents, "odd_latents": latents})
        self.download = PinnedBlock(memory, {name: specs[name] for name in ("next_latents", "images")})
        self._blocks = (self._upload, self._constants, self._work, self.download)
        self._fill_constants(stream, first_row)
        self._launches = tuple(self._launch_list(text, denoise, decode))
        self.addresses = tuple(address for block in self._blocks for address in block.addresses.values())
        self.is_captured = False
        self.graph = CudaGraph(stream, self.record, captures)

    def write(self, input_ids_BT: Any, input_ids_2_BT: Any, noise_NBCHW: NDArray[np.float32]) -> None:
        """Fill the pinned inputs; the stream must be idle."""
        arrays = self._upload.arrays
        arrays["input_ids"][...] = input_ids_BT
        arrays["input_ids_2"][...] = input_ids_2_BT
        for step in range(self._num_steps):
            arrays[f"noise_{step}"][...] = noise_NBCHW[step]

    def record(self, queue: Any, mark: Callable[[int], object] | None = None) -> None:
        """Queue one image.

        Args:
            queue: the executor's stream, or a graph builder that captures it.
            mark: called where stage 0, 1, 2 begins, and at the end of the last with 3.
        """
        self._upload.upload(queue)
        begins = {0: 0, 1: 1, len(self._launches) - 1: 2}
        for number, (engine, addresses) in enumerate(self._launches):
            if mark and number in begins:
                mark(begins[number])
            engine.enqueue(addresses, self._stream_handle)
        if mark:
            mark(3)
        self.download.download(queue)

    def refusing_capture(self) -> str | None:
        """The first stage that no CUDA graph can hold."""
        refusing = (engine.stage for engine, _ in self._launches if not engine.is_capturable(self._stream_handle))
        return next(refusing, None)

    def close(self) -> None:
        """Destroy the graph and free the blocks; the stream must be idle."""
        self.graph.close()
        for block in self._blocks:
            block.close()

    def _fill_constants(self, stream: Any, first_row: int) -> None:
        """The rows that the steps read, and what the last step mixes in: nothing, times nothing, which must not be NaN."""
        for step in range(self._num_steps):
            self._constants.arrays[f"step_{step}"][...] = first_row + step
        self._constants.arrays["no_noise"][...] = 0
        self._constants.upload(stream)
        stream.sync()

    def _launch_list(
        self, text: TensorRtEngine, denoise: TensorRtEngine, decode: TensorRtEngine
    ) -> Iterator[tuple[TensorRtEngine, dict[str, int]]]:
        """Every engine run of one image with the address of each of its tensors."""
        uploaded, constant = self._upload.addresses, self._constants.addresses
        work, downloaded = self._work.addresses, self.download.addresses
        embeds = {name: work[name] for name in ("prompt_embeds", "pooled_prompt_embeds")}
        yield text, {name: uploaded[name] for name in ("input_ids", "input_ids_2")} | embeds
        latents = uploaded["noise_0"]
        for step in range(self._num_steps):
            is_last = step == self._num_steps - 1
            # Two buffers in turn: a step reads what the step before wrote.
            written = downloaded["next_latents"] if is_last else work["odd_latents" if step % 2 else "even_latents"]
            noise = constant["no_noise"] if is_last else uploaded[f"noise_{step + 1}"]
            tensors = {"latents": latents, "step_index": constant[f"step_{step}"], "noise": noise, "next_latents": written}
            yield denoise, tensors | embeds
            latents = written
        yield decode, {"latents": latents, "images": downloaded["images"]}


def _kind(stage: str) -> str:
    """denoise/2@1024 -> denoise"""
    return stage.partition("/")[0].partition("@")[0]


def _difference(left: NDArray[Any], right: NDArray[Any]) -> float:
    return float(np.abs(left.astype(np.float64) - right.astype(np.float64)).max())

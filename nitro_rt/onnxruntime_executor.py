"""Runs a bundle on a GPU provider of ONNX Runtime: what one stage writes and the next reads stays in device memory."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from nitro_rt import reasons
from nitro_rt.bundle import Bundle
from nitro_rt.device import find_driver
from nitro_rt.errors import CaptureError, ConfigError, DeviceLost, EngineMismatch, NitroError
from nitro_rt.executor import DeviceOptions, Drawing
from nitro_rt.manifest import Engine, FileRef, TensorSpec
from nitro_rt.onnxruntime_session import OnnxRuntimeSession
from nitro_rt.providers import GPU_PROVIDERS, TENSORRT, Placement, provider_of
from nitro_rt.session import Array

VERIFY_TOLERANCE = 1e-2
"""Of the largest value: a replay with a stale address is far off, kernels that add up in another order are not."""

Values = dict[str, onnxruntime.OrtValue]


class OnnxRuntimeExecutor:
    """Text, denoisers and decoders, each a session, all on one set of device values per size.

    Token ids, noise and step numbers are copied up, images and the last latents down. ONNX Runtime waits for the GPU at the
    end of every stage. Engines are loaded when their size and step count are first prepared.
    """

    def __init__(self, bundle: Bundle, options: DeviceOptions | None = None, *, memory: str = "cuda") -> None:
        """
        Args:
            options: `cuda_graphs` auto lets ONNX Runtime capture each engine and notes those that it refuses; runtime insists.
            memory: where the values are, in ONNX Runtime's words; `cpu` is for tests on a machine without a GPU.
        Raises: BackendUnavailable where there is no GPU or no provider for it; EngineMismatch; ConfigError for an option that
            ONNX Runtime does not have.
        """
        self._bundle, self._options, self._memory = bundle, options or DeviceOptions(), memory
        if self._options.cuda_graphs == "capture":
            raise ConfigError(
                "cuda_graphs='capture' is one graph of the whole image, which ONNX Runtime's engines do not allow; "
                "say 'runtime' for one per engine, 'off' or 'auto'"
            )
        if memory == "cuda":
            self._require_gpu()
        self._sessions = ExitStack()
        self._sized: dict[int, _Sized] = {}
        self._notes: list[str] = []
        self._compute_dtypes: dict[str, str] = {}
        try:
            # A session first: it loads the libraries that a value on a GPU needs.
            self._text, own_graph = self._open("text", bundle.manifest.text)
            self._text_values = self._allocate(bundle.manifest.text)
            self._place("text", self._text, bundle.manifest.text, self._text_values, own_graph)
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
        bundle, sized = self._bundle, self._sized.get(size_px)
        engines = bundle.engines_at(size_px)
        if sized is not None and num_steps in sized.denoisers:
            return False
        if sized is None:
            # The same name is the same value in every stage, but for the decoder, which reads where the denoiser wrote.
            values = self._allocate(engines.denoise[num_steps], engines.decode) | self._text_values
            read = {"latents": values["next_latents"], "images": values["images"]}
            decode = self._loaded(bundle.stage("decode", size_px), engines.decode, read)
            sized = self._sized[size_px] = _Sized(values, decode)
        engine, stage = engines.denoise[num_steps], bundle.stage("denoise", size_px, num_steps)
        session = sized.loaded.get(engine.files) or self._loaded(stage, engine, sized.values)
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
        sized = self._sized[size_px]
        with _running(f"drawing with {self._bundle.folder}"):
            laps = [time.perf_counter()]
            self._text_values["input_ids"].update_inplace(input_ids_BT)
            self._text_values["input_ids_2"].update_inplace(input_ids_2_BT)
            self._text.execute()
            laps.append(time.perf_counter())
            sized.run_steps(num_steps, noise_NBCHW)
            laps.append(time.perf_counter())
            sized.decode.execute()
            laps.append(time.perf_counter())
            images_BHWC = _owned(sized.values["images"].numpy())
            finite = bool(np.isfinite(sized.values["next_latents"].numpy()).all())
        stages = zip(("text", "denoise", "decode"), laps[:-1], laps[1:], strict=True)
        return Drawing(
            images_BHWC=images_BHWC, timings_ms={name: (end - start) * 1e3 for name, start, end in stages}, finite=finite
        )

    def refit(self, weights: Mapping[str, Mapping[str, Array]]) -> None:
        raise EngineMismatch(
            f"{self._bundle.folder} runs on ONNX Runtime, whose engines take no new weights; fuse LoRAs when it is built: "
            "nitro-rt build --lora FILE"
        )

    def close(self) -> None:
        self._sessions.close()
        self._sized.clear()
        self._text_values = {}

    def _require_gpu(self) -> None:
        driver, device = find_driver(), self._options.device
        reason = reasons.no_gpu(driver) if driver.reason else None
        if reason is None and device >= len(driver.gpus):
            reason = reasons.no_device(driver.gpus, device)
        if reason is not None:
            raise reason.kind(f"{self._bundle.folder} is for ONNX Runtime's {provider_of(self._bundle)}; {reason}")

    def _allocate(self, *engines: Engine) -> Values:
        """A value of zeros per tensor name over all engines."""
        specs = {spec.name: spec for engine in engines for spec in (*engine.inputs, *engine.outputs)}
        return {name: self._value(spec) for name, spec in specs.items()}

    def _value(self, spec: TensorSpec) -> onnxruntime.OrtValue:
        dtype = np.dtype(spec.dtype).type
        with _running(f"allocating {spec.name}"):
            value = onnxruntime.OrtValue.ortvalue_from_shape_and_type(spec.shape, dtype, self._memory, self._options.device)
            value.update_inplace(np.zeros(spec.shape, dtype))
        return value

    def _loaded(self, stage: str, engine: Engine, values: Mapping[str, onnxruntime.OrtValue]) -> OnnxRuntimeSession:
        session, own_graph = self._open(stage, engine)
        self._place(stage, session, engine, values, own_graph)
        return session

    def _open(self, stage: str, engine: Engine) -> tuple[OnnxRuntimeSession, bool]:
        """The session of a stage, and whether ONNX Runtime puts it into a CUDA graph."""
        paths = tuple(self._bundle.path(reference) for reference in engine.files)
        own_graph = self._options.cuda_graphs in ("auto", "runtime") and provider_of(self._bundle) in GPU_PROVIDERS
        try:
            session = OnnxRuntimeSession(stage, engine, paths, self._placement(own_graph))
        except CaptureError as exc:
            if self._options.cuda_graphs == "runtime":
                raise
            self._notes.append(f"{exc}; its kernels are launched one by one")
            own_graph, session = False, OnnxRuntimeSession(stage, engine, paths, self._placement(False))
        self._sessions.callback(session.close)
        self._compute_dtypes[stage] = session.compute_dtype
        elsewhere = session.elsewhere()
        if elsewhere:
            listed = ", ".join(f"{count} {kind}" for kind, count in sorted(elsewhere.items()))
            self._notes.append(f"ONNX Runtime runs these operators of {stage} on the CPU, not on the GPU: {listed}")
        return session, own_graph

    def _place(
        self,
        stage: str,
        session: OnnxRuntimeSession,
        engine: Engine,
        values: Mapping[str, onnxruntime.OrtValue],
        own_graph: bool,
    ) -> None:
        """Bind a session to its values, and run it until it allocates no more."""
        session.bind_values({spec.name: values[spec.name] for spec in (*engine.inputs, *engine.outputs)})
        self._warm_up(stage, session, [values[spec.name] for spec in engine.outputs] if own_graph else [])

    def _placement(self, own_graph: bool) -> Placement:
        cache = None
        if self._options.runtime_cache and provider_of(self._bundle) == TENSORRT:
            folder = self._bundle.folder.resolve()
            cache = folder.with_name(f"{folder.name}.onnxruntime-tensorrt")  # beside the bundle, which never changes
        return Placement(device_id=self._options.device, own_graph=own_graph, cache=cache)

    def _warm_up(self, stage: str, session: OnnxRuntimeSession, outputs: Iterable[onnxruntime.OrtValue]) -> None:
        """One run, which may allocate and choose kernels. With a CUDA graph two more, the capture and a replay, compared."""
        with _running(f"warming up {stage}"):
            session.execute()
            outputs = list(outputs)
            if not outputs:
                return
            eager = [_owned(value.numpy()) for value in outputs]
            session.execute()
            session.execute()
            replayed = [value.numpy() for value in outputs]
        if self._options.verify_capture and not all(map(_are_near, eager, replayed)):
            raise CaptureError(
                f"ONNX Runtime's CUDA graph of {stage} gives another result than its kernels launched one by one; "
                "load with cuda_graphs='off', and report this bundle"
            )


class _Sized:
    """What one size has for itself: its values, its decoder and its denoisers."""

    def __init__(self, values: Values, decode: OnnxRuntimeSession) -> None:
        self.values, self.decode = values, decode
        self.loaded: dict[tuple[FileRef, ...], OnnxRuntimeSession] = {}
        """Denoisers by their files, which step counts share."""
        self.denoisers: dict[int, tuple[OnnxRuntimeSession, int]] = {}
        """Step count -> its denoiser, and the row of that one's tables where its steps begin."""

    def run_steps(self, num_steps: int, noise_NBCHW: NDArray[np.float32]) -> None:
        (denoiser, first_row), values = self.denoisers[num_steps], self.values
        values["latents"].update_inplace(noise_NBCHW[0])
        for step in range(num_steps):
            is_last = step == num_steps - 1
            values["step_index"].update_inplace(np.array([first_row + step], np.int64))
            values["noise"].update_inplace(np.zeros_like(noise_NBCHW[0]) if is_last else noise_NBCHW[step + 1])
            denoiser.execute()
            if not is_last:
                values["latents"].update_inplace(values["next_latents"])  # on the device


@contextmanager
def _running(doing: str) -> Iterator[None]:
    """ONNX Runtime's failures as ours. Raises: DeviceLost where CUDA failed, EngineMismatch for want of memory and the rest."""
    try:
        yield
    except NitroError:
        raise
    except Exception as exc:
        # Its own classes, one for each status code, and RuntimeError where its Python binding fails; the rest are bugs.
        if not (isinstance(exc, RuntimeError) or type(exc).__module__.startswith("onnxruntime")):
            raise
        words = " ".join(str(exc).split())
        if "CUDA failure" in words and "out of memory" not in words:
            raise DeviceLost(
                f"the GPU failed while {doing} ({words}); nothing more runs in this process's CUDA context"
            ) from exc
        raise EngineMismatch(
            f"ONNX Runtime failed while {doing} ({words}); if memory ran out, close other programs, or build with a smaller "
            "--size, --batch or --precision"
        ) from exc


def _owned(array: Array) -> Array:
    """A copy, unless it is one already: values in host memory give a view of themselves."""
    return array if array.flags.owndata else array.copy()


def _are_near(left: Array, right: Array) -> bool:
    scale = max(1.0, float(np.abs(left.astype(np.float64)).max()))
    return bool(
        np.allclose(left.astype(np.float64), right.astype(np.float64), rtol=0, atol=VERIFY_TOLERANCE * scale, equal_nan=True)
    )

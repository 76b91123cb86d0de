"""An executor runs one whole image call of a bundle, from token ids and noise to uint8, on one backend."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from nitro_rt.bundle import Bundle
from nitro_rt.cpu import cpu_target, saturates
from nitro_rt.errors import BackendUnavailable, BundleError, ConfigError
from nitro_rt.providers import GPU_PROVIDERS, provider_of


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """What one call gave."""

    images_BHWC: NDArray[np.uint8]
    """Owned by the caller: the next call does not touch it."""
    timings_ms: dict[str, float]
    """By stage."""
    finite: bool
    """Whether the last latents hold numbers only: uint8 hides a NaN as a black picture."""


DEVICE_BACKENDS = ("tensorrt", "tensorrt-rtx")
CUDA_GRAPHS = ("auto", "capture", "runtime", "off")


@dataclass(frozen=True, kw_only=True)
class DeviceOptions:
    """How a bundle of GPU engines is run. Of bundles that run on the host, OpenVINO's take `runtime_cache`, others none."""

    device: int = 0
    """CUDA's number of the GPU."""
    cuda_graphs: str = "auto"
    """auto: one CUDA graph per image, and a note where an engine cannot be captured; capture: the same, or CaptureError;
    runtime: TensorRT-RTX's own graphs, one per engine; off: engines launched one by one, which also times each stage."""
    verify_capture: bool = True
    """Compare a graph's first replay with the engines run one by one, when it is loaded."""
    runtime_cache: bool = True
    """Keep what TensorRT-RTX compiles for this GPU, or OpenVINO for this CPU, beside the bundle."""

    def __post_init__(self) -> None:
        """Raises: ConfigError for the first option that is wrong."""
        if isinstance(self.device, bool) or not isinstance(self.device, int) or self.device < 0:
            raise ConfigError(f"device must be a GPU's number from 0, got {self.device!r}; see nitro-rt doctor")
        if self.cuda_graphs not in CUDA_GRAPHS:
            raise ConfigError(f"cuda_graphs {self.cuda_graphs!r} is unknown; available: {', '.join(CUDA_GRAPHS)}")


class Executor(Protocol):
    """Runs the three stages. One thread opens, uses and closes it: the pipeline's worker."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know about how the bundle runs here, such as another compute type than it was built for."""

    @property
    def compute_dtypes(self) -> dict[str, str]:
        """Loaded stage (`text`, `denoise/1`, `decode`, as `Bundle.stage` names them) -> what it computes in on this machine."""

    def prepare(self, num_steps: int, size_px: int) -> bool:
        """Load what `num_steps` steps at this size need; False where it is loaded already."""

    def draw(
        self,
        num_steps: int,
        size_px: int,
        input_ids_BT: NDArray[np.int64],
        input_ids_2_BT: NDArray[np.int64],
        noise_NBCHW: NDArray[np.float32],
    ) -> Drawing:
        """One full batch. `noise_NBCHW[0]` is the first latents, `[k]` the noise that step k - 1 mixes in."""

    def refit(self, weights: Mapping[str, Mapping[str, NDArray[Any]]]) -> None:
        """Exchange weights of the engines, all or none: stage kind -> initializer -> values.

        Raises: EngineMismatch if the engines cannot take them.
        """

    def close(self) -> None:
        """Release engines and buffers. A second call does nothing."""


def open_executor(bundle: Bundle, options: DeviceOptions | None = None) -> Executor:
    """The executor of the bundle's backend.

    Raises: BackendUnavailable if its library or device is not here; EngineMismatch if it cannot load the engines;
        ConfigError if options of a GPU are given for a bundle that runs on the host.

    Without options OpenVINO keeps nothing: builds and checks open bundles that have no place of their own yet.
    """
    if bundle.backend in DEVICE_BACKENDS:
        from nitro_rt.device_executor import DeviceExecutor

        return DeviceExecutor(bundle, options)
    if provider_of(bundle) in GPU_PROVIDERS:
        return _onnxruntime_on_gpu(bundle, options)
    factory = EXECUTORS.get(bundle.backend)
    if factory is None:
        known = ", ".join((*EXECUTORS, *DEVICE_BACKENDS))
        raise BundleError(f"{bundle.folder} is for the backend {bundle.backend!r}; this nitro-rt runs {known}")
    taken = (DeviceOptions(), DeviceOptions(runtime_cache=False)) if bundle.backend == "openvino" else (DeviceOptions(),)
    if options is not None and options not in taken:
        raise ConfigError(f"{bundle.folder} runs on {bundle.backend}, not on a GPU; leave {options} out")
    return factory(bundle, options)


def _openvino(bundle: Bundle, options: DeviceOptions | None) -> Executor:
    try:
        from nitro_rt.openvino_cache import ModelCache, model_cache_folder
        from nitro_rt.openvino_session import OpenVinoSession
    except ImportError as exc:
        raise BackendUnavailable(f"{bundle.folder} runs on OpenVINO, {exc}; pip install 'nitro-rt[cpu]'") from exc
    from nitro_rt.host_executor import HostExecutor

    notes = _saturation_notes(bundle)
    if options is None or not options.runtime_cache:
        return HostExecutor(bundle, OpenVinoSession, notes)
    cache = ModelCache(model_cache_folder(bundle.folder), notes)
    return HostExecutor(bundle, partial(OpenVinoSession, cache=cache), notes)


def _saturation_notes(bundle: Bundle) -> list[str]:
    """A bundle that is built on such a CPU has weights of 7 bits, whose products do not saturate (docs/quantisation.md)."""
    recipe = bundle.manifest.quantisation or {}
    if (recipe.get("precision"), recipe.get("weight_bits")) != ("int8", 8) or not saturates(cpu_target()):
        return []
    return [
        f"{bundle.folder} has INT8 weights of 8 bits, and this CPU adds products of bytes up in 16 bits, which saturate: "
        "images are worse than the building machine's. Built here, it gets weights of 7 bits: nitro-rt build --precision int8"
    ]


def _onnxruntime(bundle: Bundle, _: DeviceOptions | None) -> Executor:
    try:
        from nitro_rt.onnxruntime_session import OnnxRuntimeSession
    except ImportError as exc:
        raise BackendUnavailable(f"{bundle.folder} runs on ONNX Runtime, {exc}; pip install 'nitro-rt[cpu]'") from exc
    from nitro_rt.host_executor import HostExecutor

    return HostExecutor(bundle, OnnxRuntimeSession)


def _onnxruntime_on_gpu(bundle: Bundle, options: DeviceOptions | None) -> Executor:
    try:
        from nitro_rt.onnxruntime_executor import OnnxRuntimeExecutor
    except ImportError as exc:
        raise BackendUnavailable(f"{bundle.folder} runs on ONNX Runtime, {exc}; pip install 'nitro-rt[cuda]'") from exc
    return OnnxRuntimeExecutor(bundle, options)


def _reference(bundle: Bundle, _: DeviceOptions | None) -> Executor:
    from nitro_rt.host_executor import HostExecutor
    from nitro_rt.reference_session import ReferenceSession

    return HostExecutor(bundle, ReferenceSession)


EXECUTORS: dict[str, Callable[[Bundle, DeviceOptions | None], Executor]] = {
    "openvino": _openvino,
    "onnxruntime": _onnxruntime,
    "reference": _reference,
}
"""Backend on the host -> factory. A backend's library is imported inside its factory."""

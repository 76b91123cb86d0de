"""An executor runs one whole image call of a bundle, from token ids and noise to uint8, on one backend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from nitro_rt.bundle import Bundle
from nitro_rt.errors import BackendUnavailable, BundleError


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """What one call gave."""

    images_BHWC: NDArray[np.uint8]
    """Owned by the caller: the next call does not touch it."""
    timings_ms: dict[str, float]
    """By stage."""
    finite: bool
    """Whether the last latents hold numbers only: uint8 hides a NaN as a black picture."""


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

    def close(self) -> None:
        """Release engines and buffers. A second call does nothing."""


def open_executor(bundle: Bundle) -> Executor:
    """The executor of the bundle's backend.

    Raises: BackendUnavailable if its library or device is not here; EngineMismatch if it cannot load the engines.
    """
    factory = EXECUTORS.get(bundle.backend)
    if factory is None:
        raise BundleError(f"{bundle.folder} is for the backend {bundle.backend!r}; this nitro-rt runs {', '.join(EXECUTORS)}")
    return factory(bundle)


def _openvino(bundle: Bundle) -> Executor:
    try:
        from nitro_rt.openvino_session import OpenVinoSession
    except ImportError as exc:
        raise BackendUnavailable(f"{bundle.folder} runs on OpenVINO, {exc}; pip install 'nitro-rt[cpu]'") from exc
    from nitro_rt.host_executor import HostExecutor

    return HostExecutor(bundle, OpenVinoSession)


def _onnxruntime(bundle: Bundle) -> Executor:
    try:
        from nitro_rt.onnxruntime_session import OnnxRuntimeSession
    except ImportError as exc:
        raise BackendUnavailable(f"{bundle.folder} runs on ONNX Runtime, {exc}; pip install 'nitro-rt[cpu]'") from exc
    from nitro_rt.host_executor import HostExecutor

    return HostExecutor(bundle, OnnxRuntimeSession)


def _reference(bundle: Bundle) -> Executor:
    from nitro_rt.host_executor import HostExecutor
    from nitro_rt.reference_session import ReferenceSession

    return HostExecutor(bundle, ReferenceSession)


def _device(bundle: Bundle) -> Executor:
    from nitro_rt.device import refuse

    raise refuse(bundle)


EXECUTORS: dict[str, Callable[[Bundle], Executor]] = {
    "openvino": _openvino,
    "onnxruntime": _onnxruntime,
    "tensorrt-rtx": _device,
    "tensorrt": _device,
    "reference": _reference,
}
"""Backend -> factory. A backend's library is imported inside its factory."""

"""CUDA's failures as our errors."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from nitro_rt.errors import BackendUnavailable, CaptureError, DeviceLost, EngineMismatch, NitroError

_CODE = re.compile(r"\bCUDA_ERROR_[A-Z0-9_]+")
_STICKY = frozenset(
    f"CUDA_ERROR_{name}"
    for name in (
        "ASSERT",
        "CONTEXT_IS_DESTROYED",
        "DEINITIALIZED",
        "DEVICE_UNAVAILABLE",
        "ECC_UNCORRECTABLE",
        "EXTERNAL_DEVICE",
        "HARDWARE_STACK_ERROR",
        "ILLEGAL_ADDRESS",
        "ILLEGAL_INSTRUCTION",
        "INVALID_ADDRESS_SPACE",
        "INVALID_PC",
        "LAUNCH_FAILED",
        "LAUNCH_TIMEOUT",
        "MISALIGNED_ADDRESS",
        "NVLINK_UNCORRECTABLE",
        "UNKNOWN",
    )
)
"""After one of these every further call in the CUDA context fails.
Source: CUDA Driver API, CUresult ("the context cannot be used")."""


@contextmanager
def device_errors(doing: str) -> Iterator[None]:
    """Turn CUDA's failures into ours; what carries no CUDA code is a bug and passes as it is.

    Raises: DeviceLost where the context is gone, CaptureError, EngineMismatch for want of memory, else BackendUnavailable.
    """
    try:
        yield
    except NitroError:
        raise
    except Exception as exc:  # cuda.core's own exception class is not public, its message begins with the code
        found = _CODE.search(str(exc))
        if found is None:
            raise
        raise _error(doing, found.group(), " ".join(str(exc).split())) from exc


def _error(doing: str, code: str, message: str) -> NitroError:
    if code in _STICKY:
        return DeviceLost(
            f"the GPU failed while {doing} ({message}); nothing more runs in this process's CUDA context. Start the process "
            "again, as CUDA's documentation asks for after this error"
        )
    if code.startswith("CUDA_ERROR_STREAM_CAPTURE"):
        return CaptureError(f"{doing} is not allowed while a CUDA graph is captured ({message})")
    if code == "CUDA_ERROR_OUT_OF_MEMORY":
        return EngineMismatch(
            f"GPU memory ran out while {doing} ({message}); close other programs or pipelines, or build with a smaller "
            "--size, --batch or --precision"
        )
    return BackendUnavailable(f"CUDA failed while {doing} ({message}); see nitro-rt doctor")

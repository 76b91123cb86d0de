"""The part of `cuda.bindings.driver` that is called directly, and CUDA's errors as `cuda.core` raises them.

Enumerations and handles are the real package's own: they need no driver.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING

from cuda.bindings.driver import CUresult, CUstream
from cuda.core._utils.cuda_utils import DRIVER_CU_RESULT_EXPLANATIONS, CUDAError

if TYPE_CHECKING:
    from cudasim.simulation import Simulation


def cuda_error(code: CUresult) -> CUDAError:
    """What `cuda.core` raises for a result code: its name and explanation."""
    return CUDAError(f"{code.name}: {DRIVER_CU_RESULT_EXPLANATIONS.get(int(code))}")


def driver_module(simulation: Simulation) -> SimpleNamespace:
    """Stands for `cuda.bindings.driver`."""

    def cuMemGetInfo() -> tuple[CUresult, int | None, int | None]:  # noqa: N802
        """(result, free bytes, total bytes) of the thread's current device."""
        code = simulation.refusal()
        if code is not CUresult.CUDA_SUCCESS:
            return code, None, None
        memory = simulation.memory
        return code, memory.total_bytes - memory.used_bytes, memory.total_bytes

    def cuDriverGetVersion() -> tuple[CUresult, int]:  # noqa: N802
        """(result, 1000 * major + 10 * minor): the newest CUDA that the driver runs."""
        return CUresult.CUDA_SUCCESS, simulation.driver_version

    return SimpleNamespace(
        CUresult=CUresult, CUstream=CUstream, cuMemGetInfo=cuMemGetInfo, cuDriverGetVersion=cuDriverGetVersion
    )

"""A simulator of the small part of `cuda.core` and of the TensorRT runtime that nitro_rt calls. See README.md."""

from __future__ import annotations

from cudasim.devices import cuda_module
from cudasim.plans import device_bundle, write_plan
from cudasim.simulation import Hazard, Leak, Simulation
from cudasim.tensorrt import tensorrt_module

__all__ = ["Hazard", "Leak", "Simulation", "device_bundle", "simulate", "write_plan"]


def simulate(
    seed: int = 0,
    *,
    backend: str = "tensorrt-rtx",
    compute_capability: tuple[int, int] = (8, 9),
    num_devices: int = 1,
    device_name: str = "Simulated GPU",
    memory_bytes: int = 8 << 30,
    driver_version: int = 13000,
) -> Simulation:
    """A machine of its own.

    Args:
        seed: decides the order in which device work runs, as far as the program leaves it open.
        backend: whether `trt` stands for `tensorrt_rtx` or `tensorrt`.
        memory_bytes: of the device; host memory is taken as needed.
        driver_version: as `cuDriverGetVersion` gives it.
    """
    simulation = Simulation(
        seed=seed,
        compute_capability=compute_capability,
        num_devices=num_devices,
        device_name=device_name,
        memory_bytes=memory_bytes,
        driver_version=driver_version,
    )
    simulation.cuda = cuda_module(simulation)
    simulation.trt = tensorrt_module(simulation, backend)
    return simulation

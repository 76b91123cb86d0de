"""The three modules that a device bundle runs on."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from nitro_rt.device import RUNTIMES
from nitro_rt.errors import BackendUnavailable


@dataclass(frozen=True, kw_only=True)
class DeviceModules:
    """What the device executor calls. Tests pass a simulator in its place."""

    cuda: Any
    """`cuda.core`: devices, streams, events, memory, graphs."""
    driver: Any
    """`cuda.bindings.driver`: free memory and the driver's version, which `cuda.core` does not tell."""
    trt: Any
    """`tensorrt` or `tensorrt_rtx`."""


def load_modules(backend: str) -> DeviceModules:
    """Import what `backend` (tensorrt, tensorrt-rtx) runs on. Raises: BackendUnavailable naming what is missing."""
    names = ("cuda.core", "cuda.bindings.driver", RUNTIMES[backend])
    try:
        cuda, driver, trt = (importlib.import_module(name) for name in names)
    except ImportError as exc:
        raise BackendUnavailable(f"{backend} engines need {exc.name or exc}; pip install 'nitro-rt[{backend}]'") from exc
    return DeviceModules(cuda=cuda, driver=driver, trt=trt)

"""A session runs one stage of a bundle: buffers are bound and checked once, then `execute` runs bare.

The caller owns the buffers. A session reads its inputs from them and writes its outputs into them on every `execute`,
so they must not be replaced, resized or freed while the session is open.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from nitro_rt.errors import ShapeError
from nitro_rt.manifest import Engine, TensorSpec

Array = NDArray[Any]


class Session(Protocol):
    """One compiled stage on one backend."""

    @property
    def compute_dtype(self) -> str:
        """What it computes in on this machine: float32, float16, bfloat16."""

    def bind(self, buffers: Mapping[str, Array]) -> None:
        """Fix the arrays of all inputs and outputs, by name. Raises: ShapeError if one does not fit the engine."""

    def execute(self) -> None:
        """Read the bound inputs, write the bound outputs."""

    def close(self) -> None:
        """Release the engine and let go of the buffers. A second call does nothing."""


SessionFactory = Callable[[str, Engine, tuple[Path, ...]], Session]
"""(stage, engine, its files) -> Session."""


def check_specs(stage: str, found: Iterable[TensorSpec], expected: Iterable[TensorSpec]) -> None:
    """Compare the tensors of a loaded engine with the manifest's. Raises: ShapeError for the first difference."""
    found_by_name = {spec.name: spec for spec in found}
    expected_by_name = {spec.name: spec for spec in expected}
    if set(found_by_name) != set(expected_by_name):
        raise ShapeError(
            f"the engine of {stage} has the tensors {sorted(found_by_name)}, its manifest says {sorted(expected_by_name)}; "
            "build the bundle again"
        )
    for name, spec in expected_by_name.items():
        if found_by_name[name] != spec:
            raise ShapeError(
                f"the engine of {stage} has {_describe(found_by_name[name])}, its manifest says {_describe(spec)}; "
                "build the bundle again"
            )


def check_buffers(stage: str, buffers: Mapping[str, Array], engine: Engine) -> None:
    """Compare buffers with an engine's inputs and outputs. Raises: ShapeError for the first that does not fit."""
    specs = (*engine.inputs, *engine.outputs)
    needed = {spec.name for spec in specs}
    if set(buffers) != needed:
        raise ShapeError(f"{stage} was given the buffers {sorted(buffers)}, it needs {sorted(needed)}")
    for spec in specs:
        buffer = buffers[spec.name]
        if buffer.dtype != np.dtype(spec.dtype) or buffer.shape != spec.shape:
            found = TensorSpec(name=spec.name, dtype=str(buffer.dtype), shape=buffer.shape)
            raise ShapeError(f"{stage} was given {_describe(found)}, it needs {_describe(spec)}")
        if not buffer.flags.c_contiguous:
            raise ShapeError(f"{stage} was given {spec.name} as a strided array; it must be C-contiguous")


def _describe(spec: TensorSpec) -> str:
    return f"{spec.name} {spec.dtype} {list(spec.shape)}"

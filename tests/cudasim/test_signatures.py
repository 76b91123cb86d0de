"""The simulator offers nothing that the real packages lack, and takes the same arguments."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cuda.bindings.driver
import cuda.core
import cuda.core.graph
import pytest
import tensorrt_lean_bindings
import tensorrt_rtx
from signatures import signatures_of

from cudasim import simulate

RTX, PROPER = simulate(backend="tensorrt-rtx"), simulate(backend="tensorrt")
CUDA_CLASSES = ("Device", "Stream", "Event", "Buffer", "DeviceMemoryResource", "LegacyPinnedMemoryResource")
GRAPH_CLASSES = ("Graph", "GraphBuilder")
TRT_CLASSES = ("Runtime", "ICudaEngine", "IExecutionContext", "IRuntimeConfig", "IStreamReaderV2", "Refitter")
RTX_CLASSES = ("IRuntimeCache",)
SPECIAL = {"__sub__", "__dlpack__", "__dlpack_device__", "__enter__", "__exit__", "__int__", "__cuda_stream__"}
"""Special methods that are part of what is simulated."""
PAIRS = {
    **{name: (getattr(cuda.core, name), getattr(RTX.cuda, name)) for name in CUDA_CLASSES},
    **{name: (getattr(cuda.core.graph, name), getattr(RTX.cuda.graph, name)) for name in GRAPH_CLASSES},
    **{f"rtx {name}": (getattr(tensorrt_rtx, name), getattr(RTX.trt, name)) for name in TRT_CLASSES + RTX_CLASSES},
    # The lean runtime stands for TensorRT, whose libraries cannot be installed everywhere.
    **{f"lean {name}": (getattr(tensorrt_lean_bindings, name), getattr(PROPER.trt, name)) for name in TRT_CLASSES},
}


def offered(kind: type) -> dict[str, Any]:
    """Name -> attribute of everything public that a simulated class defines."""
    found: dict[str, Any] = {}
    for base in reversed(kind.__mro__[:-1]):
        found |= {name: value for name, value in vars(base).items() if not name.startswith("_") or name in SPECIAL}
    return found


@pytest.mark.parametrize("pair", PAIRS)
def test_the_real_class_has_it_with_that_signature(pair: str) -> None:
    real, simulated = PAIRS[pair]
    for name, attribute in offered(simulated).items():
        theirs = inspect.getattr_static(real, name, None)
        assert theirs is not None, f"{real.__name__} has no {name}"
        is_property = isinstance(attribute, property)
        # What needs no arguments but self is not told of some special methods.
        if is_property or name in SPECIAL - {"__dlpack__"}:
            assert not is_property or inspect.isdatadescriptor(theirs), f"{real.__name__}.{name} is no property"
            continue
        (ours,) = signatures_of(getattr(simulated, name))
        known = list(signatures_of(getattr(real, name)))
        if name == "create_execution_context":  # two overloads in one, the second by keyword
            assert {*ours.positional, *ours.keyword_only} == {parameter for one in known for parameter in one.positional}
            assert not ours.required
            continue
        if real.__name__ == "IStreamReaderV2":  # a Python reader returns the bytes, the bindings put them into place
            known = [_without(signature, "destination") for signature in known]
        assert ours in known, f"{real.__name__}.{name} is {ours}, the real one {' or '.join(map(str, known))}"


def _without(signature: Any, name: str) -> Any:
    positional = tuple(parameter for parameter in signature.positional if parameter != name)
    return dataclasses.replace(signature, positional=positional, required=signature.required - {name})


@pytest.mark.parametrize("name", ["Device", "DeviceMemoryResource"])
def test_constructors_are_those_of_the_stubs(name: str) -> None:
    """Not all of Cython's constructors can be inspected."""
    real, simulated = getattr(cuda.core, name), getattr(RTX.cuda, name)
    module = Path(inspect.getfile(inspect.getmodule(real)))  # type: ignore[arg-type]
    stub = ast.parse((module.parent / f"{module.name.partition('.')[0]}.pyi").read_text(encoding="utf-8"))
    kind = next(node for node in stub.body if isinstance(node, ast.ClassDef) and node.name == name)
    constructor = next(node for node in kind.body if isinstance(node, ast.FunctionDef) and node.name in ("__new__", "__init__"))
    (ours,) = signatures_of(getattr(simulated, constructor.name))
    assert ours.positional == tuple(argument.arg for argument in constructor.args.args[1:])
    assert len(ours.positional) - len(ours.required) == len(constructor.args.defaults)


@pytest.mark.parametrize(
    "real, simulated",
    [
        (cuda.core, RTX.cuda),
        (cuda.bindings.driver, RTX.driver),
        (tensorrt_rtx, RTX.trt),
    ],
    ids=["cuda.core", "driver", "tensorrt_rtx"],
)
def test_nothing_else_stands_in_the_modules(real: Any, simulated: SimpleNamespace) -> None:
    for name, value in vars(simulated).items():
        assert hasattr(real, name), f"{real.__name__} has no {name}"
        if isinstance(value, SimpleNamespace):
            assert all(hasattr(getattr(real, name), inner) for inner in vars(value))


def test_only_tensorrt_rtx_has_its_own() -> None:
    assert all(hasattr(tensorrt_lean_bindings, name) for name in vars(PROPER.trt))
    for name in ("CudaGraphStrategy", "EngineValidity", "IRuntimeCache"):
        assert hasattr(RTX.trt, name) and not hasattr(PROPER.trt, name)
    assert not hasattr(PROPER.trt.Runtime, "get_engine_validity")
    assert not hasattr(PROPER.trt.IExecutionContext, "is_stream_capturable")


@pytest.mark.parametrize("name", ["cuMemGetInfo", "cuDriverGetVersion"])
def test_driver_functions_give_as_many_values_as_the_real_ones(name: str) -> None:
    real, simulated = getattr(cuda.bindings.driver, name), getattr(RTX.driver, name)
    assert list(signatures_of(real)) == list(signatures_of(simulated))
    returns = real.__doc__.partition("Returns\n-------\n")[2].partition("See Also")[0]
    RTX.cuda.Device(0).set_current()
    assert len(simulated()) == len(re.findall(r"^\w+", returns, re.M))

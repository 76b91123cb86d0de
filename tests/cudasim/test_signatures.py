"""The simulator offers nothing that the real packages lack, under the same names and signatures.

`cuda.core` answers `inspect.signature`, and its stubs say the rest; TensorRT's bindings put signatures into docstrings.
"""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cuda.bindings.driver
import cuda.core
import pytest
import tensorrt_rtx

from cudasim import simulate

SIMULATION = simulate()
KIND = inspect.Parameter
CUDA_CLASSES = ("Device", "Stream", "Event", "Buffer", "DeviceMemoryResource", "LegacyPinnedMemoryResource")
GRAPH_CLASSES = ("Graph", "GraphBuilder")
TRT_CLASSES = (
    "Runtime",
    "ICudaEngine",
    "IExecutionContext",
    "IRuntimeConfig",
    "IRuntimeCache",
    "IStreamReaderV2",
    "OnnxParserRefitter",
    "Refitter",
)
SPECIAL = {"__sub__", "__dlpack__", "__dlpack_device__", "__enter__", "__exit__", "__int__", "__cuda_stream__"}
"""Special methods that are part of what is simulated."""


def offered(kind: type) -> dict[str, Any]:
    """Name -> attribute of everything public that a simulated class defines."""
    found: dict[str, Any] = {}
    for base in reversed(kind.__mro__[:-1]):
        found |= {name: value for name, value in vars(base).items() if not name.startswith("_") or name in SPECIAL}
    return found


def parameters(function: Any) -> list[tuple[str, Any, bool]]:
    """(name, kind, has a default) of every parameter but the first."""
    signature = inspect.signature(function)
    return [(p.name, p.kind, p.default is not KIND.empty) for p in list(signature.parameters.values())[1:]]


@pytest.mark.parametrize(
    "real, simulated",
    [
        *((getattr(cuda.core, name), getattr(SIMULATION.cuda, name)) for name in CUDA_CLASSES),
        *((getattr(cuda.core.graph, name), getattr(SIMULATION.cuda.graph, name)) for name in GRAPH_CLASSES),
    ],
    ids=(*CUDA_CLASSES, *GRAPH_CLASSES),
)
def test_cuda_core_has_it_with_that_signature(real: type, simulated: type) -> None:
    for name, attribute in offered(simulated).items():
        assert hasattr(real, name), f"cuda.core's {real.__name__} has no {name}"
        is_property = isinstance(attribute, property)
        theirs = inspect.getattr_static(real, name)
        assert is_property == inspect.isdatadescriptor(theirs), f"{real.__name__}.{name} is a property in one of the two only"
        if not is_property and name not in SPECIAL - {"__dlpack__"}:
            assert parameters(getattr(simulated, name)) == parameters(getattr(real, name)), f"{real.__name__}.{name}"


@pytest.mark.parametrize("name", ["Device", "DeviceMemoryResource"])
def test_constructors_are_those_of_the_stubs(name: str) -> None:
    """Cython's constructors cannot be inspected."""
    real, simulated = getattr(cuda.core, name), getattr(SIMULATION.cuda, name)
    module = Path(inspect.getfile(inspect.getmodule(real)))  # type: ignore[arg-type]
    stub = ast.parse(next(module.parent.glob(f"{module.name.partition('.')[0]}.pyi")).read_text(encoding="utf-8"))
    kind = next(node for node in stub.body if isinstance(node, ast.ClassDef) and node.name == name)
    constructor = next(node for node in kind.body if isinstance(node, ast.FunctionDef) and node.name in ("__new__", "__init__"))
    theirs = [argument.arg for argument in constructor.args.args[1:]]
    ours = parameters(getattr(simulated, constructor.name))
    assert [name for name, _, _ in ours] == theirs
    assert sum(has_default for _, _, has_default in ours) == len(constructor.args.defaults)


def test_nothing_else_stands_in_the_modules() -> None:
    real_driver = cuda.bindings.driver
    for real, simulated in ((cuda.core, SIMULATION.cuda), (real_driver, SIMULATION.driver), (tensorrt_rtx, SIMULATION.trt)):
        for name, value in vars(simulated).items():
            assert hasattr(real, name), f"{real.__name__} has no {name}"
            if isinstance(value, SimpleNamespace):
                assert all(hasattr(getattr(real, name), inner) for inner in vars(value))


@pytest.mark.parametrize("name", ["cuMemGetInfo", "cuDriverGetVersion"])
def test_driver_functions_give_as_many_values_as_the_real_ones(name: str) -> None:
    real, simulated = getattr(cuda.bindings.driver, name), getattr(SIMULATION.driver, name)
    assert not inspect.signature(real).parameters and not inspect.signature(simulated).parameters
    returns = real.__doc__.partition("Returns\n-------\n")[2].partition("See Also")[0]
    SIMULATION.cuda.Device(0).set_current()
    assert len(simulated()) == len(re.findall(r"^\w+", returns, re.M))


# --- TensorRT -----------------------------------------------------------------------------------------------------------


def overloads(method: Any) -> list[list[tuple[str, bool]]]:
    """(name, has a default) of every parameter but self, of every overload, from a pybind11 docstring."""
    name = method.__name__
    lines = re.findall(rf"^(?:\d+\. )?{name}\((self: .*)\) -> ", method.__doc__, re.M)
    parameter = re.compile(r"(\w+): [^=]+?(?:( = ).*?)?(?:, (?=\w+: )|$)")
    return [[(found, bool(default)) for found, default in parameter.findall(line)[1:]] for line in lines]


def test_docstrings_are_read_rightly() -> None:
    execution = tensorrt_rtx.IExecutionContext
    assert overloads(execution.set_tensor_address) == [[("name", False), ("memory", False)]]
    assert overloads(tensorrt_rtx.ICudaEngine.create_execution_context) == [[("strategy", True)], [("runtime_config", True)]]


@pytest.mark.parametrize("name", TRT_CLASSES)
def test_tensorrt_has_it_with_that_signature(name: str) -> None:
    real, simulated = getattr(tensorrt_rtx, name), getattr(SIMULATION.trt, name)
    for attribute_name, attribute in offered(simulated).items():
        where = f"{name}.{attribute_name}"
        theirs = inspect.getattr_static(real, attribute_name, None)
        assert theirs is not None, f"tensorrt_rtx has no {where}"
        assert isinstance(attribute, property) == isinstance(theirs, property), f"{where} is a property in one of the two only"
        if isinstance(attribute, property):
            continue
        ours = [(parameter, has_default) for parameter, _, has_default in parameters(attribute)]
        known = overloads(getattr(real, attribute_name))
        if attribute_name == "create_execution_context":
            known = [[parameter for overload in known for parameter in overload]]  # both in one, with keywords
        if name == "IStreamReaderV2":
            known = [[p for p in overload if p[0] != "destination"] for overload in known]  # Python's side returns the bytes
        assert ours in known, f"{where} takes {ours}, the real one {known}"


@pytest.mark.parametrize("module", ["tensorrt", "tensorrt_lean"])
def test_tensorrt_proper_has_it_too(module: str) -> None:
    """As far as that package has these classes: the lean runtime has no refitter."""
    real = pytest.importorskip(module, exc_type=ImportError)
    simulated = simulate(backend="tensorrt").trt
    for name in set(TRT_CLASSES) & set(vars(simulated)):
        if module == "tensorrt_lean" and not hasattr(real, name):
            continue
        missing = [attribute for attribute in offered(getattr(simulated, name)) if not hasattr(getattr(real, name), attribute)]
        assert not missing, f"{module}.{name} has no {missing}"


def test_only_tensorrt_rtx_has_its_own() -> None:
    proper = simulate(backend="tensorrt").trt
    assert not hasattr(proper, "CudaGraphStrategy") and not hasattr(proper, "IRuntimeCache")
    assert not hasattr(proper.Runtime, "get_engine_validity")
    assert not hasattr(proper.IExecutionContext, "is_stream_capturable")

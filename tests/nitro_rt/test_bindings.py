"""What we use of TensorRT and of CUDA's Python packages exists there, is called as it may be, and is nothing that is gone.

Only names and arguments are looked at, so this needs neither a driver nor a GPU. Files that are written later are covered.
"""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tensorrt_rtx")
pytest.importorskip("tensorrt_lean_bindings")

import cuda.core
import tensorrt_lean_bindings as lean
import tensorrt_rtx as rtx
from signatures import Signature, return_type_of, signatures_of
from surface import Findings, Use, inspect_sources

ROOT = Path(__file__).parents[2]
SOURCES = [*sorted((ROOT / "nitro_rt").glob("*.py")), *sorted((ROOT / "engines/nitro_engines/backends").glob("*.py"))]

REMOVED = {
    "": """IAlgorithm IAlgorithmContext IAlgorithmIOInfo IAlgorithmSelector IAlgorithmVariant CalibrationAlgoType
        IInt8Calibrator IInt8EntropyCalibrator IInt8EntropyCalibrator2 IInt8LegacyCalibrator IInt8MinMaxCalibrator
        QuantizationFlag UffParser CaffeParser""",
    "Builder": "platform_has_fast_fp16 platform_has_fast_int8 platform_has_tf32 max_batch_size build_engine build_cuda_engine",
    "BuilderFlag": "FP16 INT8 BF16 FP8 INT4 FP4 OBEY_PRECISION_CONSTRAINTS PREFER_PRECISION_CONSTRAINTS STRICT_TYPES",
    "IBuilderConfig": """int8_calibrator set_calibration_profile get_calibration_profile set_quantization_flag
        get_quantization_flag clear_quantization_flag quantization_flags algorithm_selector max_workspace_size""",
    "ICudaEngine": """device_memory_size get_device_memory_size_for_profile weight_streaming_budget
        minimum_weight_streaming_budget create_execution_context_without_device_memory max_batch_size num_bindings
        get_binding_index get_binding_name get_binding_shape get_binding_dtype binding_is_input get_binding_format
        get_binding_format_desc get_binding_bytes_per_component get_binding_components_per_element
        get_binding_vectorized_dim is_execution_binding is_shape_binding get_profile_shape get_profile_shape_input
        get_location has_implicit_batch_dimension""",
    "IExecutionContext": """execute execute_async execute_async_v2 set_binding_shape set_shape_input get_shape
        get_binding_shape get_strides all_shape_inputs_specified""",
    "ILayer": "precision precision_is_set reset_precision set_output_type reset_output_type output_type_is_set",
    "INetworkDefinition": "has_implicit_batch_dimension has_explicit_precision add_fully_connected add_rnn_v2 add_plugin",
    "ITensor": "dynamic_range set_dynamic_range reset_dynamic_range",
}
"""Gone by TensorRT 11, by class; "" is the module.

Sources: docs.nvidia.com/deeplearning/tensorrt/11.4.0/api/migration/tensorrt-10x-to-11x-python-api-reference.html and
tensorrt-8x-to-10x-python-api-reference.html beside it ("Removed Python APIs and Replacements").
"""
TOO_COMMON = {"execute", "precision", "get_shape", "get_location", "add_plugin", "FP16", "INT8", "BF16", "FP8", "INT4", "FP4"}
"""Names that may well be something of our own; they are looked for on TensorRT's objects only."""

RTX_ONLY = {
    "CudaGraphStrategy": "its own CUDA graphs",
    "EngineInvalidityDiagnostics": "asked of its plans only",
    "EngineValidity": "asked of its plans only",
    "IExecutionContext.is_stream_capturable": "TensorRT tells by the failure of a capture",
    "IRuntimeCache": "it compiles on the user's machine, TensorRT does not",
    "IRuntimeConfig.create_runtime_cache": "it compiles on the user's machine, TensorRT does not",
    "IRuntimeConfig.cuda_graph_strategy": "its own CUDA graphs",
    "IRuntimeConfig.set_runtime_cache": "it compiles on the user's machine, TensorRT does not",
    "Runtime.engine_header_size": "asked of its plans only",
    "Runtime.get_engine_validity": "asked of its plans only",
}
"""Classes and members that TensorRT proper does not have, and why the code gets by without them there."""

BUILDING = set(
    """Builder BuilderFlag EngineInspector IBuilderConfig ILayer INetworkDefinition ITensor LayerInformationFormat LayerType
    NetworkDefinitionCreationFlag OnnxParser OnnxParserFlag ParserError""".split()
)
"""Classes that the lean runtime leaves out and TensorRT proper has; its own bindings are asked where they are installed."""


@pytest.fixture(scope="module")
def found() -> Findings:
    return inspect_sources(SOURCES)


def _in(source: str, tmp_path: Path, name: str = "planted.py") -> Findings:
    path = tmp_path / name
    path.write_text(source, encoding="utf-8")
    return inspect_sources([path])


def test_everything_that_we_use_exists_and_takes_our_arguments(found: Findings) -> None:
    assert not found.problems, "\n".join(found.problems)


def test_tensorrt_s_own_runtime_has_it_too(found: Findings) -> None:
    """The lean runtime of TensorRT 11 is that part of TensorRT that loads and runs plans."""
    lacking = {_named(use) for use in found.uses if _lacks_in_lean(use)}
    assert lacking <= set(RTX_ONLY), lacking - set(RTX_ONLY)
    by_now = {_named(use) for use in found.uses} & set(RTX_ONLY) - lacking
    assert not by_now, f"TensorRT has {by_now} by now; take it out of RTX_ONLY"


def test_tensorrt_s_own_bindings_name_it_too(found: Findings) -> None:
    """They need libraries of NVIDIA's index to be imported, but every name that they bind stands in their file."""
    spec = importlib.util.find_spec("tensorrt_bindings")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("tensorrt-cu13-bindings is not installed")
    bound = Path(spec.submodule_search_locations[0], "tensorrt.so").read_bytes()
    ours = {use for use in found.uses if use.owner is rtx or _is_tensorrt_s(use) and not use.name.startswith("__")}
    # dtypes and the version are set by the package's __init__.py
    set_by_python = {"float32", "float16", "bfloat16", "int64", "int32", "uint8", "__version__"}
    names = {use.name for use in ours if _named(use) not in RTX_ONLY} - set_by_python
    assert {name for name in names if f"{name}\0".encode() not in bound} == set()
    only = {name for kind in RTX_ONLY for name in kind.split(".")[-1:]}
    assert {name for name in only if f"{name}\0".encode() in bound} == set()


def test_no_name_that_tensorrt_11_removed_is_used(found: Findings) -> None:
    assert not _removed_uses(found, SOURCES)


@pytest.mark.parametrize("module", [rtx, lean], ids=["tensorrt_rtx", "tensorrt_lean"])
def test_the_list_of_removed_names_is_true(module: Any) -> None:
    for kind, names in REMOVED.items():
        owner = getattr(module, kind, None) if kind else module
        assert not [name for name in names.split() if owner is not None and hasattr(owner, name)], kind


def test_no_type_was_lost_sight_of(found: Findings) -> None:
    """Place what is listed here in the tables of tests/surface.py: the checks above do not look at it."""
    assert not found.unplaced


def test_the_heart_of_the_executor_is_seen(found: Findings) -> None:
    """Where types could no longer be followed, the checks above would pass without looking at anything."""
    seen = {str(use) for use in found.uses}
    assert seen >= {
        "Runtime.deserialize_cuda_engine",
        "Runtime.get_engine_validity",
        "ICudaEngine.create_execution_context",
        "ICudaEngine.device_memory_size_v2",
        "IExecutionContext.execute_async_v3",
        "IExecutionContext.set_device_memory",
        "IExecutionContext.set_tensor_address",
        "Device.create_stream",
        "Device.set_current",
        "Stream.create_graph_builder",
        "Stream.sync",
        "Buffer.copy_to",
        "Buffer.close",
        "Refitter.refit_cuda_engine",
        "GraphBuilder.begin_building",
        "GraphBuilder.end_building",
        "Graph.launch",
        "cuda.bindings.driver.cuMemGetInfo",
    }
    assert found.num_calls >= 50


# The checks themselves: planted faults.

EXECUTOR = """
class Executor:
    def __init__(self, modules: DeviceModules) -> None:
        runtime = modules.trt.Runtime(modules.trt.Logger())
        engine = runtime.deserialize_cuda_engine(b"plan")
        self._context = engine.create_execution_context()
        self._stream = modules.cuda.Device(0).create_stream()

    def run(self) -> None:
        {line}
"""


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("self._context.set_binding_shape(0, (1,))", "IExecutionContext.set_binding_shape does not exist"),
        ("self._context.execute_async_v2([], 0)", "IExecutionContext.execute_async_v2 does not exist"),
        ("self._context.set_tensor_adress('latents', 0)", "IExecutionContext.set_tensor_adress does not exist"),
        ("self._stream.synchronize()", "Stream.synchronize does not exist"),
        ("self._context.set_tensor_address('latents')", "set_tensor_address is called with 1 positional and []"),
        ("self._context.execute_async_v3(stream=0)", "execute_async_v3 is called with 0 positional and ['stream']"),
        ("self._stream.sync(1)", "sync is called with 1 positional and []"),
        ("self._stream.create_graph_builder().begin_building(kind='relaxed')", "begin_building is called with"),
        ("self._stream.create_graph_builder().end_building().finish()", "GraphBuilder.finish does not exist"),
        ("modules.driver.cuMemGetInfos()", "cuda.bindings.driver.cuMemGetInfos does not exist"),
        ("modules.trt.CudaGraphStrategy.CAPTURE", "CudaGraphStrategy.CAPTURE does not exist"),
        ("hasattr(modules.trt, 'CudaGraphStrategie')", "tensorrt_rtx.CudaGraphStrategie does not exist"),
        ("modules.cuda.StreamOptions(blocking=True)", "StreamOptions is called with 0 positional and ['blocking']"),
    ],
)
def test_a_planted_fault_is_found(tmp_path: Path, line: str, problem: str) -> None:
    findings = _in(EXECUTOR.format(line=line), tmp_path)
    assert len(findings.problems) == 1 and problem in findings.problems[0]
    assert findings.problems[0].startswith("planted.py:10: ")


def test_code_that_is_right_gives_no_problem(tmp_path: Path) -> None:
    findings = _in(EXECUTOR.format(line="self._context.execute_async_v3(int(self._stream.handle))"), tmp_path)
    assert not findings.problems and "IExecutionContext.execute_async_v3" in map(str, findings.uses)


def test_parameters_are_known_by_their_names(tmp_path: Path) -> None:
    source = (
        "def load(context: Any, engine: Engine) -> None:\n    context.get_binding_name(0)\n    engine.get_binding_name(0)\n"
    )
    (problem,) = _in(source, tmp_path).problems
    assert problem == "planted.py:2: IExecutionContext.get_binding_name does not exist"


def test_types_are_followed_through_our_own_functions_and_classes(tmp_path: Path) -> None:
    source = (
        "class Memory:\n"
        "    def __init__(self, modules: Any) -> None:\n"
        "        self._pool = modules.cuda.DeviceMemoryResource(0)\n"
        "    def pinned(self, size: int) -> Any:\n"
        "        return self._own(self._pool.allocate(size, stream=0))\n"
        "    def _own(self, buffer: Any) -> Any:\n"
        "        return buffer\n"
        "class Block:\n"
        "    def __init__(self, memory: Memory) -> None:\n"
        "        self.memory = memory.pinned(1)\n"
        "class Twin(Block):\n"
        "    def upload(self) -> None:\n"
        "        self.memory.copy_too(self.memory, stream=0)\n"
    )
    assert _in(source, tmp_path).problems == ["planted.py:13: Buffer.copy_too does not exist"]


def test_a_lost_type_is_listed(tmp_path: Path) -> None:
    source = "def run(modules: Any, thing: Any) -> None:\n    modules.trt.Runtime\n    thing.execute_async_v3(0)\n"
    assert _in(source, tmp_path).unplaced == ["planted.py:3: thing.execute_async_v3"]


def test_a_callback_that_would_never_be_called_is_found(tmp_path: Path) -> None:
    source = (
        "import tensorrt as trt\n"
        "class Log(trt.ILogger):\n"
        "    def log(self, severity, message): ...\n"
        "class Quiet(trt.ILogger):\n"
        "    def log(self, message): ...\n"
        "class Loud(trt.ILogger):\n"
        "    def logg(self, severity, message): ...\n"
    )
    assert _in(source, tmp_path).problems == [
        "planted.py:5: Quiet.log takes 1 arguments, it is called back with [2]",
        "planted.py:7: ILogger.logg does not exist",
    ]


@pytest.mark.parametrize("line", ["thing.execute_async_v2([], 0)", "trt.BuilderFlag.FP16", "x = trt.IInt8Calibrator"])
def test_a_removed_name_is_found_on_whatever_it_is(tmp_path: Path, line: str) -> None:
    path = tmp_path / "planted.py"
    path.write_text(f"import tensorrt as trt\n{line}\n", encoding="utf-8")
    assert _removed_uses(inspect_sources([path]), [path])


@pytest.mark.parametrize(
    ("called", "expected"),
    [
        (rtx.IExecutionContext.set_device_memory, [Signature(("memory", "size"), (), frozenset({"memory", "size"}))]),
        (rtx.Logger, [Signature(("min_severity",), (), frozenset())]),
        (
            rtx.Runtime.deserialize_cuda_engine,
            [Signature((name,), (), frozenset({name})) for name in ("serialized_engine", "stream_reader_v2")],
        ),
    ],
    ids=["method", "constructor", "overloads"],
)
def test_signatures_are_read_from_docstrings(called: Any, expected: list[Signature]) -> None:
    assert list(signatures_of(called)) == expected


def test_a_signature_takes_what_python_would() -> None:
    signature = Signature(("dst", "size"), ("stream",), frozenset({"dst", "stream"}))
    assert signature.takes(1, ["stream"]) and signature.takes(2, ["stream"]) and signature.takes(0, ["dst", "stream"])
    for num_positional, keywords in ((1, []), (3, ["stream"]), (1, ["dst", "stream"]), (1, ["stream", "else"])):
        assert not signature.takes(num_positional, keywords)


def test_return_types() -> None:
    assert return_type_of(rtx.ICudaEngine.create_execution_context).endswith("IExecutionContext")
    assert return_type_of(cuda.core.Device.create_stream) == "Stream"


def _named(use: Use) -> str:
    """The member, or its whole class where that is TensorRT-RTX's."""
    kind = use.name if use.owner is rtx else use.owner.__name__
    return kind if kind in RTX_ONLY else str(use)


def _lacks_in_lean(use: Use) -> bool:
    if use.owner is rtx:
        return not hasattr(lean, use.name) and use.name not in BUILDING
    name = use.owner.__name__
    return _is_tensorrt_s(use) and name not in BUILDING and not hasattr(getattr(lean, name, None), use.name)


def _is_tensorrt_s(use: Use) -> bool:
    return getattr(use.owner, "__module__", "").startswith("tensorrt_rtx")


def _removed_uses(findings: Findings, paths: list[Path]) -> list[str]:
    """On what is known to be TensorRT's by its class; anywhere, where the name leaves no doubt."""
    names = {name for listed in REMOVED.values() for name in listed.split()}
    uses = [
        f"{use.where}: {use}"
        for use in findings.uses
        if use.name in REMOVED.get("" if use.owner is rtx else use.owner.__name__, "").split()
    ]
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr in names - TOO_COMMON:
                uses.append(f"{path.name}:{node.lineno}: {node.attr}")
    return uses

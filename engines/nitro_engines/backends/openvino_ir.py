"""OpenVINO: an engine is an IR, `.xml` with its weights in `.bin`, compiled for the CPU when it is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import openvino

from nitro_engines.backends.base import check_bindings
from nitro_engines.files import foreign_errors
from nitro_engines.host import cpu_target
from nitro_rt.errors import BuildError
from nitro_rt.manifest import Graph, TensorSpec

_HINTS = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
_DTYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16", "i64": "int64", "i32": "int32", "u8": "uint8"}


class OpenVinoBackend:
    """Saves IRs. The weights keep the graph's own types: nothing is compressed behind the graph's back."""

    name = "openvino"

    def __init__(self) -> None:
        self._core = openvino.Core()

    def toolchain(self) -> dict[str, str]:
        return {"openvino": str(openvino.__version__)}

    def target(self) -> dict[str, str]:
        return cpu_target()

    def options(self, graph_dtype: str) -> dict[str, str]:
        """Without the hint OpenVINO would choose: on CPUs with AMX an fp32 engine would silently run in bfloat16."""
        return {"INFERENCE_PRECISION_HINT": _HINTS[self.compute_dtype(graph_dtype)]}

    def compute_dtype(self, graph_dtype: str) -> str:
        """A float32 graph in float32; a float16 graph in the narrow type that this CPU computes in natively, if any."""
        if graph_dtype == "float32":
            return "float32"
        native = self._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        return "bfloat16" if "BF16" in native else "float16" if "FP16" in native else "float32"

    def compile(self, onnx_path: Path, graph: Graph, work: Path) -> list[Path]:
        xml, weights = work / "engine.xml", work / "engine.bin"
        with foreign_errors(f"saving {onnx_path.name} as OpenVINO IR", work):
            # compress_to_fp16 would also halve the schedule's float32 constants; fp16 graphs have fp16 weights already.
            source = self._core.read_model(str(onnx_path))
            _forget_inner_names(source)
            openvino.save_model(source, str(xml), compress_to_fp16=False)
            weights.touch()  # a graph without weights gets no file, and the pair is the contract
            # A full disk cuts the weights without an error: only what can be read back was saved.
            model = self._core.read_model(str(xml), str(weights)) if weights.stat().st_size else self._core.read_model(str(xml))
        check_bindings(_specs(model.inputs, graph.inputs), graph.inputs, "inputs", onnx_path)
        check_bindings(_specs(model.outputs, graph.outputs), graph.outputs, "outputs", onnx_path)
        return [xml, weights]


def _forget_inner_names(model: openvino.Model) -> None:
    """Keep the names of inputs and outputs only.

    Where a cast does nothing, compiling folds it into the input beside it, which would then answer to both names, in
    no particular order: `latents` would also be `_to_copy`.
    """
    outputs = {name for port in model.outputs for name in port.get_names()}
    for operation in model.get_ops():
        if operation.get_type_name() in ("Parameter", "Result"):
            continue
        for port in operation.outputs():
            if not port.get_names() & outputs:
                port.get_tensor().set_names(set())


def _specs(ports: Sequence[openvino.Output], expected: Sequence[TensorSpec]) -> list[TensorSpec]:
    """The ports in the model's order. A port may have several names; the expected one is taken if it is there."""
    wanted = {spec.name for spec in expected}
    specs = []
    for port in ports:
        name = next(iter(wanted & port.get_names()), port.get_any_name())
        shape, kind = port.get_partial_shape(), port.get_element_type().get_type_name()
        if shape.is_dynamic:
            raise BuildError(f"{name} has the dynamic shape {shape}; engines are static, export again")
        specs.append(TensorSpec(name=name, dtype=_DTYPES.get(kind, kind), shape=tuple(shape.to_shape())))
    return specs

"""OpenVINO: an engine is the exported graph with its weight files beside it, compiled for the CPU when it is loaded.

An IR would hold a copy of the weights for every step count: 4.8 GiB each for SDXL's UNet, written in 11 s per 2 GB and
shared with nothing. OpenVINO maps an ONNX graph's weight files into memory just the same and reads the graph no slower.

INT8 graphs for a CPU without dot products of bytes have their linear layers as 1x1 convolutions, see `onnx_pointwise`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import openvino

from nitro_engines.backends.base import check_bindings, version
from nitro_engines.files import foreign_errors, storage_errors
from nitro_engines.progress import Progress
from nitro_rt.cpu import cpu_target, has_dot_products
from nitro_rt.errors import BuildError
from nitro_rt.manifest import Graph, TensorSpec
from nitro_rt.openvino_model import read_model

_HINTS = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
_DTYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16", "i64": "int64", "i32": "int32", "u8": "uint8"}


class OpenVinoBackend:
    """Takes the graph as it is, but for the INT8 layers that this CPU computes faster in another form."""

    name = "openvino"

    def __init__(self) -> None:
        self._core = openvino.Core()

    def toolchain(self) -> dict[str, str]:
        return {"openvino": str(openvino.__version__), "onnx": version("onnx")}  # onnx writes the exchanged layers

    def target(self) -> dict[str, str]:
        return cpu_target()

    def options(self, graph_dtype: str) -> dict[str, str]:
        """Without the hint OpenVINO would choose: on CPUs with AMX an fp32 engine would silently run in bfloat16."""
        return {"INFERENCE_PRECISION_HINT": _HINTS[self.compute_dtype(graph_dtype)]}

    def compute_dtype(self, graph_dtype: str) -> str:
        """A float32 graph in float32; a narrower one in the narrow type that this CPU computes in natively, if any."""
        if graph_dtype == "float32":
            return "float32"
        native = self._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        return "bfloat16" if "BF16" in native else "float16" if "FP16" in native else "float32"

    def compile(self, onnx_path: Path, graph: Graph, work: Path, progress: Progress | None = None) -> list[Path]:
        from nitro_engines.backends.onnx_graph import link_graph  # here, so that plans need no onnx

        paths = link_graph(onnx_path, graph, work)
        if not has_dot_products(self.target()):
            _exchange_linears(paths[0])
        with foreign_errors(f"reading {onnx_path.name} into OpenVINO", work):
            model = read_model(self._core, tuple(paths), widen=self.compute_dtype(graph.compute_dtype) == "float32")
        check_bindings(_specs(model.inputs, graph.inputs), graph.inputs, "inputs", onnx_path)
        check_bindings(_specs(model.outputs, graph.outputs), graph.outputs, "outputs", onnx_path)
        return paths


def _exchange_linears(path: Path) -> None:
    """In the graph at `path`, which may be a link to the graphs folder's own: that one stays."""
    from nitro_engines.backends.onnx_pointwise import linears_as_convolutions

    rewritten = path.with_suffix(".rewritten")
    with storage_errors(f"writing {path.name}", path.parent):
        if linears_as_convolutions(path, rewritten):
            os.replace(rewritten, path)


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

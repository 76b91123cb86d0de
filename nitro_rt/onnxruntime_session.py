"""A stage on ONNX Runtime, with inputs and outputs bound to NumPy memory or to values in a GPU's memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime

from nitro_rt.errors import BackendUnavailable, BundleError, CaptureError, EngineMismatch, ShapeError
from nitro_rt.manifest import Engine, TensorSpec
from nitro_rt.providers import (
    CPU,
    GPU_PROVIDERS,
    REFUSES_GRAPHS,
    Placement,
    missing_provider,
    provider_list,
    start_session,
)
from nitro_rt.session import Array, check_buffers, check_specs

DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(int64)": "int64",
    "tensor(uint8)": "uint8",
}
OPTIMISATION = {
    "disable": onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
}


class OnnxRuntimeSession:
    """One ONNX graph in an `InferenceSession`.

    Engine options: `provider` (default CPUExecutionProvider), `graph_optimization_level` (disable, basic, extended, all).
    """

    def __init__(self, stage: str, engine: Engine, paths: tuple[Path, ...], placement: Placement | None = None) -> None:
        """
        Args:
            placement: for a GPU provider; None: the first GPU, without a CUDA graph.
        Raises: BackendUnavailable if the provider is missing or does not start; CaptureError if it does not take the graph
            into a CUDA graph; EngineMismatch if this ONNX Runtime cannot load the graph; ShapeError if it is another graph.
        """
        self._stage, self._engine = stage, engine
        self.compute_dtype = engine.compute_dtype
        options = dict(engine.options)
        self._provider = options.pop("provider", CPU)
        settings = _settings(stage, options)
        self._session: onnxruntime.InferenceSession | None = self._open(paths[0], settings, placement or Placement())
        check_specs(stage, _specs(self._session), (*engine.inputs, *engine.outputs))
        self._binding: onnxruntime.IOBinding | None = None
        self._bound: dict[str, object] = {}

    def bind(self, buffers: Mapping[str, Array]) -> None:
        assert self._session is not None, "bind after close"
        check_buffers(self._stage, buffers, self._engine)
        binding = self._session.io_binding()
        for spec in self._engine.inputs:
            binding.bind_input(spec.name, "cpu", 0, np.dtype(spec.dtype), spec.shape, buffers[spec.name].ctypes.data)
        for spec in self._engine.outputs:
            binding.bind_output(spec.name, "cpu", 0, np.dtype(spec.dtype), spec.shape, buffers[spec.name].ctypes.data)
        self._binding, self._bound = binding, dict(buffers)

    def bind_values(self, values: Mapping[str, onnxruntime.OrtValue]) -> None:
        """The same with values on a device, which the caller owns. Raises: ShapeError if one does not fit the engine."""
        assert self._session is not None, "bind after close"
        binding = self._session.io_binding()
        for specs, bind in (
            (self._engine.inputs, binding.bind_ortvalue_input),
            (self._engine.outputs, binding.bind_ortvalue_output),
        ):
            for spec in specs:
                value = values[spec.name]
                dtype = DTYPES.get(value.data_type(), value.data_type())
                if (dtype, tuple(value.shape())) != (spec.dtype, spec.shape):
                    given, needed = f"{dtype} {value.shape()}", f"{spec.name} {spec.dtype} {list(spec.shape)}"
                    raise ShapeError(f"{self._stage} was given {spec.name} {given}, it needs {needed}")
                bind(spec.name, value)
        self._binding, self._bound = binding, dict(values)

    def execute(self) -> None:
        assert self._session is not None
        self._session.run_with_iobinding(self._binding)

    def elsewhere(self) -> Counter[str]:
        """Operators that did not go to the provider, by type: ONNX Runtime gives the CPU what a GPU provider does not know."""
        assert self._session is not None
        subgraphs = self._session.get_provider_graph_assignment_info()
        asked = GPU_PROVIDERS if self._provider in GPU_PROVIDERS else (self._provider,)
        return Counter(node.op_type for part in subgraphs if part.ep_name not in asked for node in part.get_nodes())

    def close(self) -> None:
        self._binding, self._session, self._bound = None, None, {}

    def _open(self, path: Path, settings: onnxruntime.SessionOptions, placement: Placement) -> onnxruntime.InferenceSession:
        stage, version = self._stage, onnxruntime.__version__
        missing = missing_provider(self._provider, onnxruntime.get_available_providers())
        if missing is not None:
            raise BackendUnavailable(f"{stage} asks for {self._provider}; {missing}")
        asked = provider_list(self._provider, self._engine.compute_dtype, placement)
        try:
            return start_session(onnxruntime, str(path), settings, asked)
        except BackendUnavailable as exc:
            raise BackendUnavailable(f"{stage}: {exc}") from exc
        except Exception as exc:  # ONNX Runtime raises a class of its own for each status code
            words = _one_line(exc)
            if REFUSES_GRAPHS in words:
                raise CaptureError(f"ONNX Runtime {version} takes {stage} into no CUDA graph: {words}") from exc
            raise EngineMismatch(f"ONNX Runtime {version} cannot load {stage}, {path}: {words}; build again here") from exc


def _settings(stage: str, options: dict[str, str]) -> onnxruntime.SessionOptions:
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3  # errors only: warnings go to stderr past Python's control
    settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    level = options.pop("graph_optimization_level", "all")
    if level not in OPTIMISATION:
        raise BundleError(f"{stage} asks for graph_optimization_level {level!r}; available: {', '.join(OPTIMISATION)}")
    settings.graph_optimization_level = OPTIMISATION[level]
    if options:
        raise BundleError(f"{stage} has the unknown option {min(options)!r}; known: provider, graph_optimization_level")
    return settings


def _specs(session: onnxruntime.InferenceSession) -> list[TensorSpec]:
    return [
        TensorSpec(name=node.name, dtype=DTYPES.get(node.type, node.type), shape=tuple(node.shape))
        for node in (*session.get_inputs(), *session.get_outputs())
    ]


def _one_line(exc: Exception) -> str:
    return str(exc).strip().partition("\n")[0]

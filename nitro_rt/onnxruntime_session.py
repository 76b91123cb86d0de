"""A stage on ONNX Runtime's CPU provider, with inputs and outputs bound to NumPy memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime

from nitro_rt.errors import BackendUnavailable, BundleError, EngineMismatch
from nitro_rt.manifest import Engine, TensorSpec
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

    def __init__(self, stage: str, engine: Engine, paths: tuple[Path, ...]) -> None:
        """Raises: EngineMismatch if this ONNX Runtime cannot load the graph; ShapeError if it is another graph."""
        self._stage, self._engine = stage, engine
        self.compute_dtype = engine.compute_dtype
        options = dict(engine.options)
        provider = options.pop("provider", "CPUExecutionProvider")
        settings = _settings(stage, options)
        _require_provider(provider)
        try:
            session = onnxruntime.InferenceSession(str(paths[0]), settings, providers=[provider])
        except Exception as exc:  # ONNX Runtime raises a class of its own for each status code
            raise EngineMismatch(
                f"ONNX Runtime {onnxruntime.__version__} cannot load {stage}, {paths[0]}: {_one_line(exc)}; build again here"
            ) from exc
        # ONNX Runtime carries on with the CPU where a provider does not start.
        if session.get_providers()[0] != provider:
            raise BackendUnavailable(f"{stage} asked for {provider}, ONNX Runtime started {session.get_providers()}")
        check_specs(stage, _specs(session), (*engine.inputs, *engine.outputs))
        self._session: onnxruntime.InferenceSession | None = session
        self._binding: onnxruntime.IOBinding | None = None
        self._buffers: dict[str, Array] = {}

    def bind(self, buffers: Mapping[str, Array]) -> None:
        assert self._session is not None, "bind after close"
        check_buffers(self._stage, buffers, self._engine)
        binding = self._session.io_binding()
        for spec in self._engine.inputs:
            binding.bind_input(spec.name, "cpu", 0, np.dtype(spec.dtype), spec.shape, buffers[spec.name].ctypes.data)
        for spec in self._engine.outputs:
            binding.bind_output(spec.name, "cpu", 0, np.dtype(spec.dtype), spec.shape, buffers[spec.name].ctypes.data)
        self._binding, self._buffers = binding, dict(buffers)

    def execute(self) -> None:
        assert self._session is not None
        self._session.run_with_iobinding(self._binding)

    def close(self) -> None:
        self._binding, self._session, self._buffers = None, None, {}


def _settings(stage: str, options: dict[str, str]) -> onnxruntime.SessionOptions:
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3  # errors only: warnings go to stderr past Python's control
    level = options.pop("graph_optimization_level", "all")
    if level not in OPTIMISATION:
        raise BundleError(f"{stage} asks for graph_optimization_level {level!r}; available: {', '.join(OPTIMISATION)}")
    settings.graph_optimization_level = OPTIMISATION[level]
    if options:
        raise BundleError(f"{stage} has the unknown option {min(options)!r}; known: provider, graph_optimization_level")
    return settings


def _require_provider(provider: str) -> None:
    available = onnxruntime.get_available_providers()
    if provider not in available:
        raise BackendUnavailable(f"the bundle asks for {provider}; this ONNX Runtime has {', '.join(available)}")


def _specs(session: onnxruntime.InferenceSession) -> list[TensorSpec]:
    return [
        TensorSpec(name=node.name, dtype=DTYPES.get(node.type, node.type), shape=tuple(node.shape))
        for node in (*session.get_inputs(), *session.get_outputs())
    ]


def _one_line(exc: Exception) -> str:
    return str(exc).strip().partition("\n")[0]

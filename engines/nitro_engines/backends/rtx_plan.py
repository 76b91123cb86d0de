"""TensorRT-RTX: an engine is one plan for the named GPUs, compiled here without a GPU or driver."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nitro_engines.backends.base import check_bindings, version
from nitro_engines.files import storage_errors
from nitro_rt.errors import BackendUnavailable, BuildError, ConfigError
from nitro_rt.manifest import Graph, TensorSpec


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


# polygraphy reads this once, when it is imported: a process has either TensorRT or TensorRT-RTX.
with _environment("POLYGRAPHY_USE_TENSORRT_RTX", "1"):
    import tensorrt_rtx as trt
    from polygraphy import config as polygraphy_config
    from polygraphy.backend.tensorrt_rtx import CreateConfigRTX
    from polygraphy.backend.trt import EngineBytesFromNetwork, NetworkFromOnnxPath
    from polygraphy.logger import G_LOGGER

_DTYPES = {
    trt.float32: "float32",
    trt.float16: "float16",
    trt.bfloat16: "bfloat16",
    trt.int64: "int64",
    trt.int32: "int32",
    trt.uint8: "uint8",
}


class TensorRtRtxBackend:
    """Compiles strongly typed networks: the graph's types are the plan's."""

    name = "tensorrt-rtx"

    def __init__(self, capabilities: dict[str, tuple[int, int]]) -> None:
        """Args: capabilities: compute capability by target name; one plan serves them all."""
        if not polygraphy_config.USE_TENSORRT_RTX:
            raise BackendUnavailable(
                "this process loaded polygraphy for TensorRT, and it cannot serve both; build in a fresh process"
            )
        self._capabilities = capabilities

    def toolchain(self) -> dict[str, str]:
        return {
            "tensorrt-rtx": version("tensorrt-rtx-cu13", "tensorrt_rtx_cu13", "tensorrt-rtx"),
            "polygraphy": version("polygraphy"),
        }

    def target(self) -> dict[str, str]:
        return {
            "device": "cuda",
            "targets": " ".join(self._capabilities),
            "compute_capabilities": " ".join(f"{major}.{minor}" for major, minor in self._capabilities.values()),
        }

    def options(self, graph_dtype: str) -> dict[str, str]:
        return {}

    def compute_dtype(self, graph_dtype: str) -> str:
        if graph_dtype == "float32" and "sm75" in self._capabilities:
            raise ConfigError(
                "TensorRT-RTX cannot multiply float32 matrices on sm75 (Turing); say --precision fp16 "
                "(and use a VAE made for float16), or leave sm75 out"
            )
        return graph_dtype

    def compile(self, onnx_path: Path, graph: Graph, work: Path) -> list[Path]:
        plan = work / "engine.plan"
        with _messages() as messages:
            try:
                builder, network, parser = NetworkFromOnnxPath(str(onnx_path), strongly_typed=True)()
                check_bindings(_specs(network.num_inputs, network.get_input), graph.inputs, "inputs", onnx_path)
                check_bindings(_specs(network.num_outputs, network.get_output), graph.outputs, "outputs", onnx_path)
                config = CreateConfigRTX(compute_capabilities=list(self._capabilities.values()))
                content = EngineBytesFromNetwork((builder, network, parser), config=config)()
            except BuildError:
                raise
            except Exception as exc:  # polygraphy's own exception says little; TensorRT's messages do
                reason = "; ".join(dict.fromkeys(messages)) or str(exc)
                targets = ", ".join(self._capabilities)
                raise BuildError(f"TensorRT-RTX refused {onnx_path.name} for {targets}: {reason}") from exc
        with storage_errors("writing the plan", work):
            plan.write_bytes(content)
        return [plan]


def _specs(count: int, tensor_at: Any) -> list[TensorSpec]:
    tensors = [tensor_at(index) for index in range(count)]
    return [TensorSpec(name=t.name, dtype=_DTYPES.get(t.dtype, str(t.dtype)), shape=tuple(t.shape)) for t in tensors]


@contextmanager
def _messages() -> Iterator[list[str]]:
    """The errors that TensorRT logs while it works; they go nowhere else. What is changed for that is put back."""
    collected: list[str] = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = lambda record: collected.append(" ".join(record.getMessage().split()))  # type: ignore[method-assign]
    logger = logging.getLogger("Polygraphy")
    propagated, was_python = logger.propagate, G_LOGGER.use_python_logging_system
    logger.addHandler(handler)
    logger.propagate = False
    try:
        with G_LOGGER.verbosity(G_LOGGER.ERROR), warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # polygraphy calls what TensorRT-RTX deprecates
            G_LOGGER.use_python_logging_system = True
            yield collected
    finally:
        G_LOGGER.use_python_logging_system = was_python
        logger.propagate = propagated
        logger.removeHandler(handler)

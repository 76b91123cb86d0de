"""One compilation by TensorRT or TensorRT-RTX in a process of its own: `python -m nitro_engines.backends._trt_compile JOB FD`.

A full-size UNet takes some 15 GB while it is compiled. Only the end of a process gives all of that back, a compiler that
crashes or is killed for memory takes no more than this process with it, and the build can end it at any moment.

Which of the two it is, polygraphy reads from POLYGRAPHY_USE_TENSORRT_RTX once, when it is imported. JOB is a JSON file (see
`Job`); `result` is written at the end: facts of the plan, or why there is none. FD takes the progress, a JSON line an event.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import signal
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypedDict

from polygraphy import config as polygraphy_config
from polygraphy.backend.trt import NetworkFromOnnxPath
from polygraphy.logger import G_LOGGER

if polygraphy_config.USE_TENSORRT_RTX:
    import tensorrt_rtx as trt
    from polygraphy.backend.tensorrt_rtx import CreateConfigRTX
else:
    import tensorrt as trt
    from polygraphy.backend.trt import CreateConfig

from nitro_engines.backends.base import check_bindings
from nitro_engines.backends.built_precision import check_inspection, check_network
from nitro_rt.errors import BuildError
from nitro_rt.manifest import TensorSpec

PR_SET_PDEATHSIG = 1
"""linux/prctl.h"""
STEP_INTERVAL_S = 0.2
"""Some phases have thousands of steps, done in a moment."""
_DTYPES = {
    trt.float32: "float32",
    trt.float16: "float16",
    trt.bfloat16: "bfloat16",
    trt.int64: "int64",
    trt.int32: "int32",
    trt.uint8: "uint8",
}


class Job(TypedDict):
    """What is compiled, and where the results go."""

    onnx: str
    plan: str
    result: str
    inputs: list[dict[str, Any]]
    outputs: list[dict[str, Any]]
    compute_dtype: str
    compute_capabilities: list[tuple[int, int]]
    """Of TensorRT-RTX; empty for TensorRT, which compiles for the GPU that is here."""
    refit: bool
    """The plan takes new weights when it is loaded."""
    timing_in: str
    """A timing cache to begin with; empty: none."""
    timing_out: str
    """Where the timing cache goes; empty: the compiler times nothing."""


def main() -> None:
    _die_with_parent()
    job: Job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    with _messages() as messages:
        try:
            outcome = _compile(job, _Monitor(int(sys.argv[2])))
        except BuildError as exc:
            outcome = {"mismatch": str(exc)}
        except OSError as exc:
            outcome = {"storage": [exc.errno, exc.strerror]}
        except Exception as exc:  # polygraphy's own exception says little; TensorRT's messages do
            outcome = {"refused": "; ".join(dict.fromkeys(messages)) or str(exc)}
    Path(job["result"]).write_text(json.dumps(outcome), encoding="utf-8")


def _compile(job: Job, monitor: _Monitor) -> dict[str, Any]:
    """Returns: the facts of the plan that was written."""
    onnx_path = Path(job["onnx"])
    builder, network, parser = NetworkFromOnnxPath(str(onnx_path), strongly_typed=True)()
    for kind, found in (
        ("inputs", _specs(network.num_inputs, network.get_input)),
        ("outputs", _specs(network.num_outputs, network.get_output)),
    ):
        expected = [TensorSpec(**{**spec, "shape": tuple(spec["shape"])}) for spec in job[kind]]  # type: ignore[literal-required]
        check_bindings(found, expected, kind, onnx_path)
    check_network(_multiplications(network), job["compute_dtype"], onnx_path.name)
    config = _config(job, builder, network)
    config.progress_monitor = monitor
    with Path(job["plan"]).open("wb") as file:
        writer = _FileWriter(file)
        # To the file as it is made: the whole plan, 5 GB of it, need not stand in memory.
        built = builder.build_serialized_network_to_stream(network, config, writer)
        if writer.failure is not None:
            raise writer.failure
        if not built:
            raise RuntimeError("it gave no reason")
        file.flush()
        os.fsync(file.fileno())
    facts: dict[str, Any] = {"num_layers": network.num_layers, "note": ""}
    if job["timing_out"]:
        Path(job["timing_out"]).write_bytes(bytes(memoryview(config.get_timing_cache().serialize())))
    del parser  # it owns the weights until here
    if not polygraphy_config.USE_TENSORRT_RTX:
        facts["note"] = _inspect(Path(job["plan"]), job["compute_dtype"], onnx_path.name)
    return facts


def _config(job: Job, builder: Any, network: Any) -> Any:
    if polygraphy_config.USE_TENSORRT_RTX:
        capabilities = [tuple(capability) for capability in job["compute_capabilities"]]
        config = CreateConfigRTX(compute_capabilities=capabilities, refittable=job["refit"])(builder, network)
    else:
        config = CreateConfig(load_timing_cache=job["timing_in"] or None, refittable=job["refit"])(builder, network)
    config.clear_flag(trt.BuilderFlag.TF32)  # float32 is to mean that; it is on where nobody says otherwise
    return config


def _multiplications(network: Any) -> Counter[str]:
    """Type of the first input -> number of convolutions and matrix products."""
    kinds = (trt.LayerType.CONVOLUTION, trt.LayerType.DECONVOLUTION, trt.LayerType.MATRIX_MULTIPLY, trt.LayerType.EINSUM)
    layers = (network.get_layer(index) for index in range(network.num_layers))
    return Counter(_dtype(layer.get_input(0)) for layer in layers if layer.type in kinds)


def _inspect(plan: Path, compute_dtype: str, name: str) -> str:
    """Returns: what there is to say. Raises: BuildError if the engine computes in another type."""
    runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
    engine = runtime.deserialize_cuda_engine(plan.read_bytes())
    if engine is None:
        raise RuntimeError("the plan that it wrote cannot be loaded")
    inspector = engine.create_engine_inspector()
    return check_inspection(inspector.get_engine_information(trt.LayerInformationFormat.JSON), compute_dtype, name)


class _Monitor(trt.IProgressMonitor):  # type: ignore[misc]
    """Writes what the compiler reports, from whichever of its threads, as lines into a pipe."""

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._descriptor, self._lock = descriptor, threading.Lock()
        self._done: dict[str, int] = {}
        self._last_s = 0.0
        self._is_heard = True

    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
        with self._lock:
            self._done[phase_name] = 0
            self._write({"start": phase_name, "num_steps": num_steps})

    def step_complete(self, phase_name: str, step: int) -> bool:
        """Returns: False, which ends the build, once nobody reads."""
        with self._lock:
            done = self._done[phase_name] = self._done.get(phase_name, 0) + 1
            now_s = time.monotonic()
            if now_s - self._last_s >= STEP_INTERVAL_S:
                self._last_s = now_s
                self._write({"step": phase_name, "done": done})
            return self._is_heard

    def phase_finish(self, phase_name: str) -> None:
        with self._lock:
            self._write({"finish": phase_name})

    def _write(self, event: dict[str, Any]) -> None:
        try:
            os.write(self._descriptor, json.dumps(event).encode() + b"\n")
        except OSError:  # the compiler cannot pass an exception on
            self._is_heard = False


class _FileWriter(trt.IStreamWriter):  # type: ignore[misc]
    def __init__(self, file: Any) -> None:
        super().__init__()
        self._file = file
        self.failure: OSError | None = None

    def write(self, content: Any) -> int:
        """Called by the compiler, which cannot pass an exception on: a short count tells it to stop."""
        try:
            return int(self._file.write(content))
        except OSError as exc:
            self.failure = exc
            return 0


def _specs(count: int, tensor_at: Any) -> list[TensorSpec]:
    tensors = [tensor_at(index) for index in range(count)]
    return [TensorSpec(name=tensor.name, dtype=_dtype(tensor), shape=tuple(tensor.shape)) for tensor in tensors]


def _dtype(tensor: Any) -> str:
    return _DTYPES.get(tensor.dtype, str(tensor.dtype))


@contextmanager
def _messages() -> Iterator[list[str]]:
    """The errors that TensorRT logs while it works; they go nowhere else."""
    collected: list[str] = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = lambda record: collected.append(" ".join(record.getMessage().split()))  # type: ignore[method-assign]
    logger = logging.getLogger("Polygraphy")
    logger.addHandler(handler)
    logger.propagate = False
    with G_LOGGER.verbosity(G_LOGGER.ERROR), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # polygraphy calls what TensorRT deprecates
        G_LOGGER.use_python_logging_system = True
        yield collected


def _die_with_parent() -> None:
    """A build that is killed must not leave a compiler behind that holds the machine's memory."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    main()

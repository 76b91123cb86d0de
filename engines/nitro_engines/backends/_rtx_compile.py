"""One TensorRT-RTX compilation in a process of its own: `python -m nitro_engines.backends._rtx_compile JOB`.

A full-size UNet takes some 15 GB while it is compiled. Only the end of a process gives all of that back, and a compiler that
crashes or is killed for memory takes no more than this process with it.

JOB is a JSON file: `onnx` and `plan` (paths), `compute_capabilities`, `inputs` and `outputs` (the manifest's tensors), and
`result`, the path of the JSON file that is written at the end: `{}` or `{"refused": why}`.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# polygraphy reads this once, when it is imported: a process has either TensorRT or TensorRT-RTX.
os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = "1"
import tensorrt_rtx as trt
from polygraphy.backend.tensorrt_rtx import CreateConfigRTX
from polygraphy.backend.trt import NetworkFromOnnxPath
from polygraphy.logger import G_LOGGER

from nitro_engines.backends.base import check_bindings
from nitro_rt.errors import BuildError
from nitro_rt.manifest import TensorSpec

PR_SET_PDEATHSIG = 1
"""linux/prctl.h"""
_DTYPES = {
    trt.float32: "float32",
    trt.float16: "float16",
    trt.bfloat16: "bfloat16",
    trt.int64: "int64",
    trt.int32: "int32",
    trt.uint8: "uint8",
}


def main() -> None:
    _die_with_parent()
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    with _messages() as messages:
        try:
            _compile(job)
            outcome: dict[str, Any] = {}
        except BuildError as exc:
            outcome = {"mismatch": str(exc)}
        except OSError as exc:
            outcome = {"storage": [exc.errno, exc.strerror]}
        except Exception as exc:  # polygraphy's own exception says little; TensorRT's messages do
            outcome = {"refused": "; ".join(dict.fromkeys(messages)) or str(exc)}
    Path(job["result"]).write_text(json.dumps(outcome), encoding="utf-8")


def _compile(job: dict[str, Any]) -> None:
    onnx_path = Path(job["onnx"])
    builder, network, parser = NetworkFromOnnxPath(str(onnx_path), strongly_typed=True)()
    for kind, found in (
        ("inputs", _specs(network.num_inputs, network.get_input)),
        ("outputs", _specs(network.num_outputs, network.get_output)),
    ):
        expected = [TensorSpec(**{**spec, "shape": tuple(spec["shape"])}) for spec in job[kind]]
        check_bindings(found, expected, kind, onnx_path)
    config = CreateConfigRTX(compute_capabilities=[tuple(capability) for capability in job["compute_capabilities"]])(
        builder, network
    )
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
    del parser  # it owns the weights until here


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
    return [TensorSpec(name=t.name, dtype=_DTYPES.get(t.dtype, str(t.dtype)), shape=tuple(t.shape)) for t in tensors]


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
        warnings.simplefilter("ignore", DeprecationWarning)  # polygraphy calls what TensorRT-RTX deprecates
        G_LOGGER.use_python_logging_system = True
        yield collected


def _die_with_parent() -> None:
    """A build that is killed must not leave a compiler behind that holds the machine's memory."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    main()

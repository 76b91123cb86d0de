"""TensorRT-RTX: an engine is one plan for the named GPUs, compiled here without a GPU or driver, each in its own process."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import tensorrt_rtx  # noqa: F401  where it is missing, `load_backend` says so

from nitro_engines.backends.base import version
from nitro_engines.files import storage_errors
from nitro_engines.host import available_bytes
from nitro_rt.errors import BuildError, ConfigError
from nitro_rt.manifest import Graph

if find_spec("polygraphy") is None:  # it is loaded in the compiler's process only
    raise ImportError("No module named 'polygraphy'", name="polygraphy")

COMPILER = ("-m", "nitro_engines.backends._rtx_compile")


class TensorRtRtxBackend:
    """Compiles strongly typed networks: the graph's types are the plan's."""

    name = "tensorrt-rtx"

    def __init__(self, capabilities: dict[str, tuple[int, int]]) -> None:
        """Args: capabilities: compute capability by target name; one plan serves them all."""
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
        if graph_dtype == "bfloat16" and "sm75" in self._capabilities:
            raise ConfigError("sm75 (Turing) has no bfloat16; say --precision fp16, or leave sm75 out")
        return graph_dtype

    def compile(self, onnx_path: Path, graph: Graph, work: Path) -> list[Path]:
        plan, job, result = work / "engine.plan", work / "job.json", work / "result.json"
        content = {
            "onnx": str(onnx_path),
            "plan": str(plan),
            "result": str(result),
            "compute_capabilities": list(self._capabilities.values()),
            "inputs": [dataclasses.asdict(spec) for spec in graph.inputs],
            "outputs": [dataclasses.asdict(spec) for spec in graph.outputs],
        }
        with storage_errors("preparing the compiler", work):
            job.write_text(json.dumps(content), encoding="utf-8")
        status, peak_bytes, words = _run(job, work)
        try:
            outcome: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise BuildError(f"TensorRT-RTX {_end(status, peak_bytes)} while it compiled {onnx_path.name}{words}") from None
        if "mismatch" in outcome:
            raise BuildError(outcome["mismatch"])
        if "storage" in outcome:
            with storage_errors("writing the plan", work):
                raise OSError(*outcome["storage"], str(plan))
        if "refused" in outcome:
            targets = ", ".join(self._capabilities)
            raise BuildError(f"TensorRT-RTX refused {onnx_path.name} for {targets}: {outcome['refused']}")
        return [plan]


def _run(job: Path, work: Path) -> tuple[int, int, str]:
    """Returns: exit code (negative: the signal), peak resident bytes, and what the process said last."""
    said = work / "compiler.log"
    with said.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, *COMPILER, str(job)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            process.wait()
            raise
        process.returncode = os.waitstatus_to_exitcode(status)
    lines = said.read_text(encoding="utf-8", errors="replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return process.returncode, usage.ru_maxrss * 1024, f": {last}" if last else ""


def _end(status: int, peak_bytes: int) -> str:
    held = f"its process held {peak_bytes / 2**30:.1f} GiB"
    if status == -signal.SIGKILL:
        return (
            f"was killed, most likely for memory ({held}, {available_bytes() / 2**30:.1f} GiB are available now): close other "
            "programs, choose a smaller --size, or build on a machine with more memory;"
        )
    if status < 0:
        return f"crashed with signal {signal.Signals(-status).name} ({held})"
    return f"ended with status {status} ({held})"

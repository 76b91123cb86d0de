"""Runs the compiler of TensorRT and TensorRT-RTX in its own process: its progress, its end, and Ctrl-C, which kills it."""

from __future__ import annotations

import dataclasses
import json
import os
import select
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nitro_engines.backends.built_precision import check_plan_size
from nitro_engines.files import storage_errors
from nitro_engines.host import available_bytes
from nitro_engines.progress import Progress
from nitro_rt.errors import BuildError
from nitro_rt.manifest import Graph

COMPILER = ("-m", "nitro_engines.backends._trt_compile")
REFIT_OPTION = "refit"
"""Engine option: `yes` where the plan holds its weights and takes others."""
TICK_S = 1.0
"""How often a silent compiler's progress is looked at."""


@dataclass(frozen=True, kw_only=True)
class Compiler:
    """TensorRT or TensorRT-RTX."""

    name: str
    """For messages."""
    is_rtx: bool
    capabilities: dict[str, tuple[int, int]]
    """Target name -> compute capability."""
    refit: bool = False
    """Plans that take new weights."""

    def compile(self, onnx_path: Path, graph: Graph, work: Path, progress: Progress | None, timing: Path | None) -> list[Path]:
        """Write `engine.plan` into `work`, and for TensorRT `engine.timing`, its timing cache.

        Args: timing: a timing cache to begin with, so that the same tactics are chosen again.
        Raises: BuildError if the graph is refused, the compiler dies, the disk is full, or the plan has another precision.
        """
        from nitro_engines.backends.onnx_graph import weight_bytes  # here, so that plans need no onnx

        plan, job, result = work / "engine.plan", work / "job.json", work / "result.json"
        timing_out = None if self.is_rtx else work / "engine.timing"
        content = {
            "onnx": str(onnx_path),
            "plan": str(plan),
            "result": str(result),
            "inputs": [dataclasses.asdict(spec) for spec in graph.inputs],
            "outputs": [dataclasses.asdict(spec) for spec in graph.outputs],
            "compute_dtype": graph.compute_dtype,
            "compute_capabilities": list(self.capabilities.values()) if self.is_rtx else [],
            "refit": self.refit,
            "timing_in": str(timing or ""),
            "timing_out": str(timing_out or ""),
        }
        with storage_errors("preparing the compiler", work):
            job.write_text(json.dumps(content), encoding="utf-8")
        facts = self._facts(_run(job, self.is_rtx, progress), result, onnx_path, plan)
        check_plan_size(plan.stat().st_size, weight_bytes(onnx_path), facts["num_layers"], graph.compute_dtype, onnx_path.name)
        if facts["note"] and progress is not None:
            progress.say(facts["note"])
        return [plan] if timing_out is None else [plan, timing_out]

    def _facts(self, end: _End, result: Path, onnx_path: Path, plan: Path) -> dict[str, Any]:
        """What the compiler's process found out about the plan that it wrote. Raises: BuildError if it wrote none."""
        try:
            outcome: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise BuildError(f"{self.name} {end} while it compiled {onnx_path.name}{end.words}") from None
        if "mismatch" in outcome:
            raise BuildError(outcome["mismatch"])
        if "storage" in outcome:
            with storage_errors("writing the plan", plan.parent):
                raise OSError(*outcome["storage"], str(plan))
        if "refused" in outcome:
            targets = ", ".join(self.capabilities)
            raise BuildError(f"{self.name} refused {onnx_path.name} for {targets}: {outcome['refused']}")
        return outcome


@dataclass(frozen=True, kw_only=True)
class _End:
    """How the compiler's process ended."""

    status: int
    """Exit code; negative: the signal."""
    peak_bytes: int
    words: str
    """What it said last, after a colon; empty if it said nothing."""

    def __str__(self) -> str:
        held = f"its process held {self.peak_bytes / 2**30:.1f} GiB"
        if self.status == -signal.SIGKILL:
            return (
                f"was killed, most likely for memory ({held}, {available_bytes() / 2**30:.1f} GiB are available now): close "
                "other programs, choose a smaller --size, or build on a machine with more memory;"
            )
        if self.status < 0:
            return f"crashed with signal {signal.Signals(-self.status).name} ({held})"
        return f"ended with status {self.status} ({held})"


def _run(job: Path, is_rtx: bool, progress: Progress | None) -> _End:
    """Start the process, follow it to its end, and kill it if anything goes wrong here, Ctrl-C included."""
    said = job.with_name("compiler.log")
    reading, writing = os.pipe()
    try:
        with said.open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, *COMPILER, str(job), str(writing)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(writing,),
                # polygraphy reads this once, when it is imported: a process has either TensorRT or TensorRT-RTX.
                env={**os.environ, "POLYGRAPHY_USE_TENSORRT_RTX": str(int(is_rtx))},
                process_group=0,  # a terminal's Ctrl-C is for us, who then end it
            )
        try:
            os.close(writing)
            writing = -1
            _follow(reading, progress)
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            process.wait()
            raise
    finally:
        os.close(reading)
        if writing >= 0:
            os.close(writing)
    process.returncode = os.waitstatus_to_exitcode(status)
    lines = said.read_text(encoding="utf-8", errors="replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return _End(status=process.returncode, peak_bytes=usage.ru_maxrss * 1024, words=f": {last}" if last else "")


def _follow(descriptor: int, progress: Progress | None) -> None:
    """Pass on what the compiler reports until it closes its end of the pipe."""
    rest = b""
    while True:
        ready, _, _ = select.select([descriptor], [], [], TICK_S)
        chunk = os.read(descriptor, 1 << 16) if ready else None
        if chunk == b"":
            return
        *lines, rest = (rest + (chunk or b"")).split(b"\n")
        if progress is not None:
            for line in lines:
                _pass_on(json.loads(line), progress)
            progress.tick()


def _pass_on(event: dict[str, Any], progress: Progress) -> None:
    if "start" in event:
        progress.start(event["start"], event["num_steps"])
    elif "step" in event:
        progress.step(event["step"], event["done"])
    else:
        progress.finish(event["finish"])

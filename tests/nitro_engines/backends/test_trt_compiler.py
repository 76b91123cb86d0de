"""The compiler's process: what it reports on its way, how it ends, and that nothing of it stays."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nitro_engines.backends import load_backend, trt_compiler
from nitro_engines.cache import EngineCache
from nitro_engines.engines import Builder
from nitro_engines.graphs import parts_of, read_graphs
from nitro_engines.progress import Progress
from nitro_rt.errors import BuildError

MakeGraphs = Callable[..., Path]
CHILD = Path(__file__).parents[1] / "cli_child.py"
REPORTING = """
import json, os, sys, time
def say(**event): os.write(int(sys.argv[2]), json.dumps(event).encode() + b"\\n")
say(start="Building engine", num_steps=4)
say(start="Timing graph nodes", num_steps=100)
for done in (30, 60):
    say(step="Timing graph nodes", done=done)
    time.sleep(0.3)
say(finish="Timing graph nodes")
sys.exit("the end")
"""


@pytest.fixture(autouse=True)
def library() -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")


@pytest.mark.trt
def test_a_killed_compiler_is_a_typed_error(make_graphs: MakeGraphs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the system kills it where memory ends: the build lives on, and says what happened."""
    graphs = make_graphs(precision="fp16")
    backend = load_backend("tensorrt-rtx", ("sm89",))
    monkeypatch.setattr(trt_compiler, "COMPILER", ("-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"))
    with pytest.raises(BuildError, match="TensorRT-RTX was killed, most likely for memory .its process held .* decode.onnx"):
        backend.compile(graphs / "decode.onnx", read_graphs(graphs).decode, tmp_path)
    monkeypatch.setattr(trt_compiler, "COMPILER", ("-c", "raise SystemExit('no such thing')"))
    with pytest.raises(BuildError, match="ended with status 1 .* decode.onnx: no such thing"):
        backend.compile(graphs / "decode.onnx", read_graphs(graphs).decode, tmp_path)


@pytest.mark.trt
def test_its_progress_comes_through_the_pipe(make_graphs: MakeGraphs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs, lines = make_graphs(precision="fp16"), []
    monkeypatch.setattr(trt_compiler, "COMPILER", ("-c", REPORTING))
    say_everything(monkeypatch)
    with pytest.raises(BuildError, match="ended with status 1 .*: the end"):
        load_backend("tensorrt-rtx", ("sm89",)).compile(
            graphs / "decode.onnx", read_graphs(graphs).decode, tmp_path, Progress(lines.append, "decode")
        )
    assert any(line.startswith("decode: Timing graph nodes 30 %") for line in lines)
    assert any(line.startswith("decode: Timing graph nodes 60 %") and "left in this phase" in line for line in lines)
    assert lines[-1].startswith("decode: Building engine, ")


@pytest.mark.trt
def test_the_real_compiler_reports_its_phases(make_graphs: MakeGraphs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs, lines = make_graphs(precision="fp16"), []
    say_everything(monkeypatch)
    progress = Progress(lines.append, "text", expected_s=60)
    load_backend("tensorrt-rtx", ("sm89",)).compile(graphs / "text.onnx", read_graphs(graphs).text, tmp_path, progress)
    text = "\n".join(lines)
    assert "text: Building engine" in text and "text: Optimizing graph" in text and "Determining refit engines" in text
    assert "s left" in lines[0] and lines[-1].startswith("text: writing the plan")


@pytest.mark.trt
@pytest.mark.skipif(sys.platform != "linux", reason="processes are looked for in /proc")
def test_ctrl_c_stops_the_build_at_once(make_graphs: MakeGraphs, checkpoint: Path, tmp_path: Path) -> None:
    """Exit 130, no compiler, nothing half-written; what was finished stays in the cache and is not done again."""
    graphs, out, cache = make_graphs(size_px=64), tmp_path / "bundle", EngineCache(tmp_path / "cache")
    command = [sys.executable, str(CHILD), str(graphs), "build", "--model", str(checkpoint)]
    command += ["--backend", "tensorrt-rtx", "--target", "sm89", "--out", str(out)]
    environment = {**os.environ, "NITRO_RT_CACHE": str(cache.root)}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        wait_for(lambda: compilers(tmp_path) or process.poll() is not None)
        started = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    seconds = time.monotonic() - started
    assert process.returncode == 130 and said.endswith("nitro-rt: interrupted\n"), said
    assert seconds < 3, "0.5 to 0.9 s were measured on a busy machine"
    wait_for(lambda: not compilers(tmp_path), seconds=5)  # it is killed; the system takes its time to free gigabytes
    assert not out.exists() and not list((cache.root / "work").iterdir())


@pytest.mark.trt
@pytest.mark.skipif(sys.platform != "linux", reason="the compiler is tied to its build through Linux's prctl")
def test_a_killed_build_leaves_no_compiler_and_the_next_one_resumes(make_graphs: MakeGraphs, tmp_path: Path) -> None:
    """A compiler left behind would hold gigabytes of the memory that the next build needs."""
    graphs, out, cache = make_graphs(precision="fp16"), tmp_path / "bundle", EngineCache(tmp_path / "cache")
    code = (
        "from pathlib import Path\nfrom nitro_engines.bundle import build_bundle\nfrom nitro_engines.cache import EngineCache\n"
        f"build_bundle(Path({str(graphs)!r}), Path({str(out)!r}), backend='tensorrt-rtx', targets=('sm89',), "
        f"cache=EngineCache(Path({str(cache.root)!r})))"
    )
    with subprocess.Popen([sys.executable, "-c", code]) as process:
        wait_for(lambda: len(list((cache.engines / "entries").glob("*.json"))) == 1 and compilers(tmp_path))  # the second stage
        process.kill()
    wait_for(lambda: not compilers(tmp_path))
    assert not out.exists()
    cache.sweep()
    assert not list((cache.root / "work").iterdir())
    text = {"text": parts_of((graphs,), {})["text"]}
    assert Builder(backend=load_backend("tensorrt-rtx", ("sm89",)), cache=cache).build(text).states == {"text": "cached"}


def say_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FIRST_LINE_S", "INTERVAL_S", "INTERVAL_SHARE"):
        monkeypatch.setattr(f"nitro_engines.progress.{name}", 0.0)


def compilers(tmp_path: Path) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            line = path.read_bytes().decode(errors="replace")
            found += [line] if "_trt_compile" in line and str(tmp_path) in line else []
    return found


def wait_for(condition: Callable[[], object], seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time
from pathlib import Path

import fake_peer
import numpy as np
import pytest

from nitro_bench.peer import DrawRequest, LoadRequest, Peer, PeerFailed, PeerProcess

FAKE = Peer(name="fake", title="Fake", adapter=Path(fake_peer.__file__), python=Path(sys.executable))


@pytest.fixture
def load(tmp_path: Path) -> LoadRequest:
    return LoadRequest(model="somewhere", size_px=8, batch=1, steps=(1,), shift=250, work=str(tmp_path), options={})


@pytest.fixture
def drawing(tmp_path: Path) -> DrawRequest:
    np.save(tmp_path / "noise.npy", np.zeros((1, 1, 4, 1, 1), np.float32))
    return DrawRequest(prompts=("x",), seed=1, steps=1, size_px=8, noise=str(tmp_path / "noise.npy"))


def failing(load: LoadRequest, mode: str, timeout_s: float = 60.0) -> str:
    with pytest.raises(PeerFailed) as caught, PeerProcess(FAKE, timeout_s) as process:
        process.load(dataclasses.replace(load, options={"mode": mode}))
    assert caught.value.name == "fake" and str(caught.value) == f"fake: {caught.value.reason}"
    return caught.value.reason


def test_a_process_loads_draws_and_ends(load: LoadRequest, drawing: DrawRequest, tmp_path: Path) -> None:
    with PeerProcess(FAKE) as process:
        loaded = process.load(load)
        assert (loaded.compute_dtype, loaded.versions, loaded.notes) == ("float32", {"fake": "1.0"}, ("somewhere",))
        assert loaded.capture_ms == 1.0 and loaded.start_ms > 0
        drawn = process.draw(drawing, 3, save=tmp_path / "picture.npy")
        assert len(drawn.image_ms) == len(drawn.cpu_ms) == 3 and min(drawn.image_ms) >= 2.0
        assert drawn.timings_ms == ({"total": 2.0, "denoise": 1.0},) * 3
        assert drawn.since_start_ms > loaded.start_ms + sum(drawn.image_ms)
        assert np.load(tmp_path / "picture.npy").shape == (1, 8, 8, 3)
        memory = process.memory()
        assert memory.device_peak_bytes == 12345 and (memory.peak_rss_bytes or 0) > 1 << 20
        assert process.throughput_s(drawing, num_threads=2, num_images=4) >= 0.004
        pid = process._process.pid
    process.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.parametrize(
    ("mode", "reason"),
    [
        ("cannot", "cannot run here: needs a device of another kind"),
        ("missing", "cannot run here: ModuleNotFoundError: No module named 'a_package_that_nobody_has'"),
        ("exit", "its process ended with exit code 3 during load: a library that prints on standard output / a last word"),
        ("nonsense", "answered load with b'not json', which is no JSON"),
        ("numpy", "load failed: TypeError: Object of type float32 is not JSON serializable"),
        ("silent", "answered load without 'compute_dtype'; its adapter is at fault"),
    ],
)
def test_what_goes_wrong_is_told(load: LoadRequest, mode: str, reason: str) -> None:
    assert failing(load, mode) == reason


def test_a_type_that_nobody_knows_is_told(load: LoadRequest) -> None:
    with pytest.raises(
        PeerFailed, match=r"cannot be read: compute_dtype 'tf32' is none of float32, .*; its adapter is at fault"
    ):
        with PeerProcess(FAKE) as process:
            process.load(dataclasses.replace(load, options={"dtype": "tf32"}))


def test_a_process_that_ends_its_output_and_hangs_is_ended(load: LoadRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nitro_bench.peer.QUIT_TIMEOUT_S", 0.2)
    assert failing(load, "stuck").startswith("its process ended by signal SIGKILL during load: ")


BENCHMARK = """
import sys, time
from pathlib import Path
from nitro_bench.peer import Peer, PeerProcess
process = PeerProcess(Peer(name="fake", title="Fake", adapter=Path(sys.argv[1]), python=Path(sys.executable)))
print(process._process.pid, flush=True)
time.sleep(600)
"""


def test_no_side_outlives_a_benchmark_that_is_killed() -> None:
    command = [sys.executable, "-c", BENCHMARK, fake_peer.__file__]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as benchmark:
        assert benchmark.stdout is not None
        side = int(benchmark.stdout.readline())
        assert alive_in_session(side)
        benchmark.kill()
    deadline_s = time.monotonic() + 30
    while alive_in_session(side) and time.monotonic() < deadline_s:
        time.sleep(0.05)
    assert not alive_in_session(side)


def test_a_crash_is_told_with_its_signal(load: LoadRequest) -> None:
    assert failing(load, "crash").startswith("its process ended by signal SIGSEGV during load")


def test_a_process_that_hangs_is_ended_with_its_children(load: LoadRequest) -> None:
    started = time.monotonic()
    with pytest.raises(PeerFailed, match="did not answer load within 1.5 s and was ended"), PeerProcess(FAKE, 30.0) as process:
        process._timeout_s = 1.5  # only now: the interpreter's own start may take longer on a busy machine
        process.load(dataclasses.replace(load, options={"mode": "hang"}))
    assert time.monotonic() - started < 60
    assert not alive_in_session(process._process.pid)


def alive_in_session(leader: int) -> list[str]:
    """Processes of a session that run; those that are dead and wait for their parent do not count."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, session = path.read_text().rsplit(")", 1)[1].split()[:4]
        except OSError:
            continue  # it ended meanwhile
        if session == str(leader) and state != "Z":
            found.append(path.parent.name)
    return found


def test_a_failed_command_ends_the_process(load: LoadRequest, drawing: DrawRequest) -> None:
    with pytest.raises(PeerFailed, match=r"draw failed: AssertionError"), PeerProcess(FAKE) as process:
        process.load(load)
        process.draw(dataclasses.replace(drawing, steps=2))
    assert process._process.poll() is not None


def test_a_missing_environment_says_how_to_make_it(tmp_path: Path) -> None:
    absent = dataclasses.replace(FAKE, python=tmp_path / "python", how_to_make="make peers")
    with pytest.raises(PeerFailed, match="its environment is not made .*; make peers"):
        PeerProcess(absent)


def test_an_adapter_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(PeerFailed, match="ended with exit code 1 during start: .*FileNotFoundError"):
        PeerProcess(dataclasses.replace(FAKE, adapter=tmp_path / "absent.py"))

"""One side of a benchmark: a process that draws images when it is told to, and answers with what it measured.

Every side runs in a process of its own, ours too: under the interpreter of its own environment, with its own imports and
memory, driven over JSON lines by `PeerProcess`. The other end is `peers/serve.py`, which runs an adapter (`peers/adapter.py`
says what that is). To add a peer: write an adapter, list it in `peers/catalogue.py`.

A peer that cannot run here, crashes or hangs raises `PeerFailed` with a reason that can stand in the report; its process is
gone then, and the benchmark goes on with the others.
"""

from __future__ import annotations

import dataclasses
import json
import os
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from nitro_rt.errors import NitroError

SERVE = Path(__file__).resolve().parent / "peers" / "serve.py"
COMMAND_TIMEOUT_S = 3600.0
"""For one command: to convert and compile a full-size checkpoint, or a block of its images from several threads."""
QUIT_TIMEOUT_S = 20.0
COMPUTE_DTYPES = ("float32", "float16", "bfloat16", "int8", "fp8")
LAST_LINES = 3
"""Of standard error, in the reason of a crash."""


class PeerFailed(NitroError):
    """A side of a benchmark cannot run here, crashed, hung, or answered nonsense."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.name, self.reason = name, reason


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A way to draw a checkpoint, and the interpreter that can."""

    name: str
    """What `--peers` takes: letters, digits, hyphens."""
    title: str
    """For reports: library, way, precision."""
    adapter: Path
    """The file with the class `Adapter`."""
    python: Path
    """The interpreter of its environment. It need not exist: the peer is then listed with how to make it."""
    options: Mapping[str, str] = field(default_factory=dict)
    """What distinguishes peers that share an adapter: dtype, compile, provider."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Environment variables for its process, beside those of this one."""
    how_to_make: str = "make peers"
    """The command that makes its environment."""
    needs: tuple[str, ...] = ()
    """For a peer that runs in the benchmark's own environment: the requirements whose closure is its footprint, such as
    `diffusers[torch]`. Empty: its environment is its own, and all that is installed there counts."""


@dataclass(frozen=True, kw_only=True)
class LoadRequest:
    """What an adapter loads. Paths are absolute."""

    model: str
    """For a peer the diffusers folder of the checkpoint, for ours the bundle that was built from it."""
    size_px: int
    batch: int
    """Images per call: always exactly as many."""
    steps: tuple[int, ...]
    """All step counts that will be asked for."""
    shift: int
    """The schedule's shift, for `nitro_bench.peers.shifted`."""
    work: str
    """A folder that exists, where the adapter may keep what it converts or exports. It lives as long as the benchmark."""
    options: dict[str, str]
    """`Peer.options`."""


@dataclass(frozen=True, kw_only=True)
class DrawRequest:
    """One call. Every side gets the same."""

    prompts: tuple[str, ...]
    """As many as the batch."""
    seed: int
    """One generator for the whole call: `torch.Generator().manual_seed(seed)` draws the noise of the file below, first the
    latents, then the fresh noise of each step but the last."""
    steps: int
    size_px: int
    noise: str
    """A .npy file, float32 [steps, B, 4, h, w]: the first latents, then what is mixed in after each step but the last."""


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """What loading took."""

    compute_dtype: str
    versions: dict[str, str]
    notes: tuple[str, ...]
    start_ms: float
    """From before the process exists to its first line: the interpreter's start."""
    import_ms: float
    load_ms: float
    capture_ms: float | None
    """CUDA graph capture or compilation, where the side has one and tells; not in `load_ms`."""
    compute_dtypes: dict[str, str]
    """By stage, where the side tells; ours does."""
    differs: str
    """Why its picture cannot be ours although it does the same work, such as a schedule that it cannot be told; empty where it
    must be the same picture."""


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """What some images took, one entry per image."""

    image_ms: tuple[float, ...]
    """Wall clock, from the prompt to the pixels in host memory, measured inside the side's process."""
    cpu_ms: tuple[float, ...]
    """Processor time of its process, all threads."""
    timings_ms: tuple[dict[str, float], ...]
    """By stage, as the side tells them; empty dicts where it does not."""
    since_start_ms: float
    """From before the process exists to the last of these images."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Peaks of the side's process so far."""

    peak_rss_bytes: int | None
    device_peak_bytes: int | None


class PeerProcess:
    """A side's process, from its start to `close`. Not thread-safe.

    Use it as a context manager: whatever happens, the process and what it started are gone afterwards.
    """

    def __init__(self, peer: Peer, timeout_s: float = COMMAND_TIMEOUT_S) -> None:
        """Raises: PeerFailed if there is no such interpreter, or it does not come up."""
        self.peer, self._timeout_s = peer, timeout_s
        if not peer.python.is_file():
            raise PeerFailed(peer.name, f"its environment is not made ({peer.python.name} is missing); {peer.how_to_make}")
        # A file and no pipe: nobody reads standard error while the side works, and a full pipe would stop it.
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115  closed in `close`
        self._unread = b""
        self._started_s = time.perf_counter()
        try:
            self._process = subprocess.Popen(
                # -I: no PYTHONPATH, no user site, and no folder of ours on the path.
                [str(peer.python), "-I", str(SERVE), str(peer.adapter)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                env=os.environ | {"HF_HUB_OFFLINE": "1"} | dict(peer.environment),
                start_new_session=True,
            )
        except OSError as exc:
            self._stderr.close()
            raise PeerFailed(peer.name, f"its interpreter does not start: {exc.strerror}; {peer.how_to_make}") from exc
        try:
            found = self._answer("start")
            with self._understood("start"):
                self._start_ms = 1e3 * (found["started_at_s"] - self._started_s)
        except BaseException:
            self.close()
            raise

    def load(self, request: LoadRequest) -> Loaded:
        """Import and load. Raises: PeerFailed."""
        found = self._ask("load", request=dataclasses.asdict(request))
        with self._understood("load"):
            if found["compute_dtype"] not in COMPUTE_DTYPES:
                raise ValueError(f"compute_dtype {found['compute_dtype']!r} is none of {', '.join(COMPUTE_DTYPES)}")
            return Loaded(
                compute_dtype=found["compute_dtype"],
                versions=found["versions"],
                notes=tuple(found["notes"]),
                start_ms=self._start_ms,
                import_ms=found["import_ms"],
                load_ms=found["load_ms"],
                capture_ms=found["capture_ms"],
                compute_dtypes=found.get("compute_dtypes", {}),
                differs=found.get("differs", ""),
            )

    def draw(self, request: DrawRequest, num_images: int = 1, save: Path | None = None) -> Drawn:
        """Draw the same picture `num_images` times.

        Args:
            save: where the last one's pixels go: .npy, uint8 [B, H, W, 3].
        Raises: PeerFailed.
        """
        fields = dataclasses.asdict(request)
        found = self._ask("draw", request=fields, num_images=num_images, save=None if save is None else str(save))
        with self._understood("draw"):
            return Drawn(
                image_ms=tuple(found["image_ms"]),
                cpu_ms=tuple(found["cpu_ms"]),
                timings_ms=tuple(found["timings_ms"]),
                since_start_ms=1e3 * (found["at_s"] - self._started_s),
            )

    def throughput_s(self, request: DrawRequest, num_threads: int, num_images: int) -> float:
        """Seconds that `num_images` calls take from `num_threads` threads of its process. Raises: PeerFailed."""
        fields = dataclasses.asdict(request)
        found = self._ask("throughput", request=fields, num_threads=num_threads, num_images=num_images)
        with self._understood("throughput"):
            return float(found["seconds"])

    def memory(self) -> Memory:
        """Raises: PeerFailed."""
        found = self._ask("memory")
        with self._understood("memory"):
            return Memory(peak_rss_bytes=found["peak_rss_bytes"], device_peak_bytes=found["device_peak_bytes"])

    def close(self) -> None:
        """Ask the process to end, and end it, with all that it started. A second call does nothing."""
        if self._process.poll() is None:
            try:
                self._send({"command": "quit"})
                self._process.wait(QUIT_TIMEOUT_S)
            except (OSError, subprocess.TimeoutExpired):
                pass  # ended below
        self._kill()
        for stream in (self._process.stdin, self._process.stdout, self._stderr):
            if stream is not None and not stream.closed:
                try:
                    stream.close()
                except BrokenPipeError:
                    pass  # a last command that nobody reads any more

    def __enter__(self) -> PeerProcess:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None) -> None:
        if exc is not None:
            self._kill()  # a process that failed or is in the middle of something is not asked politely
        self.close()

    def _ask(self, command: str, **fields: Any) -> dict[str, Any]:
        try:
            self._send({"command": command, **fields})
        except OSError:
            pass  # it has ended; why is told where its answer is missing
        return self._answer(command)

    def _send(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message).encode() + b"\n")
        self._process.stdin.flush()

    def _answer(self, command: str) -> dict[str, Any]:
        line = self._line(command)
        try:
            found: dict[str, Any] = json.loads(line)
        except ValueError as exc:
            self._kill()
            raise PeerFailed(self.peer.name, f"answered {command} with {line[:80]!r}, which is no JSON") from exc
        with self._understood(command):
            if not found.pop("ok"):
                self._kill()
                reason = found.get("cannot_run")
                told = f"cannot run here: {reason}" if reason else f"{command} failed: {found['error']}"
                raise PeerFailed(self.peer.name, told)
        return found

    @contextmanager
    def _understood(self, command: str) -> Iterator[None]:
        """An adapter that leaves out what it must tell, or tells nonsense, fails alone. Raises: PeerFailed."""
        try:
            yield
        except (KeyError, TypeError, ValueError, AttributeError) as exc:
            self._kill()
            what = f"without {exc}" if isinstance(exc, KeyError) else f"with what cannot be read: {exc}"
            raise PeerFailed(self.peer.name, f"answered {command} {what}; its adapter is at fault") from exc

    def _line(self, command: str) -> bytes:
        """The next line of the process, waited for at most as long as a command may take."""
        assert self._process.stdout is not None
        deadline_s = time.monotonic() + self._timeout_s
        while b"\n" not in self._unread:
            ready, _, _ = select.select([self._process.stdout], [], [], max(0.0, deadline_s - time.monotonic()))
            if not ready:
                self._kill()
                raise PeerFailed(self.peer.name, f"did not answer {command} within {self._timeout_s:g} s and was ended")
            found = os.read(self._process.stdout.fileno(), 1 << 16)
            if not found:
                raise PeerFailed(self.peer.name, self._death(command))
            self._unread += found
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    def _death(self, command: str) -> str:
        try:
            status = self._process.wait(QUIT_TIMEOUT_S)
        except subprocess.TimeoutExpired:  # it has closed its output and hangs in its own end
            self._kill()
            status = self._process.wait()
        how = f"by signal {signal.Signals(-status).name}" if status < 0 else f"with exit code {status}"
        self._stderr.seek(0)
        lines = [line for line in self._stderr.read().decode(errors="replace").splitlines() if line.strip()]
        return f"its process ended {how} during {command}: {' / '.join(lines[-LAST_LINES:]) or 'it printed nothing'}"

    def _kill(self) -> None:
        """End the process and what it started in its session, if any of it is left."""
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self._process.wait()

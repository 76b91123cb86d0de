"""The result of `nitro-rt bench`: what its JSON holds. `schema_of(BenchReport)` is the published schema.

Names end in their units: _ms, _s, _bytes, _px, _db. A figure that could not be had is null, and a reason stands beside it.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from nitro_bench.ceilings import Ceiling
from nitro_bench.roofline import Prediction, StageWork
from nitro_bench.samples import Ratio, Summary
from nitro_bench.telemetry import MachineState
from nitro_bench.warmup import WarmUp

SCHEMA_VERSION = 1
KIND = "nitro-rt bench"
STAGES = ("tokenize", "noise", "queue", "text", "denoise", "decode", "images")
"""In the order in which they run; a device bundle has `device` for text, denoise and decode."""
ENGINE_STAGES = ("text", "denoise", "decode")
"""What runs in engines."""
GRAPH_STAGE = "device"
"""All of them, where one CUDA graph holds them; the summary has each of them too, then, launched one by one elsewhere."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What was timed: one step count at one size of one bundle."""

    id: str
    """Unique in the report: `nitro-emoji-1step, 1 step, 128 px`."""
    bundle: str
    """The bundle folder's name, without its path."""
    digest: str
    """sha256 of its bundle.json, which names every file by digest."""
    model: str
    checkpoint_sha256: str
    backend: str
    precisions: dict[str, str]
    """Stage -> what the engine was built as: fp32, fp16, int8."""
    compute_dtypes: dict[str, str]
    """Stage -> what it computes in on this machine."""
    steps: int
    size_px: int
    batch: int
    """Images per call."""
    num_bytes: int
    """Of the bundle's files on disk."""
    toolchain: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Quality:
    """How near our pictures are to the float32 parent's, over the bundle's references."""

    num_images: int
    worst_psnr_db: float | None
    mean_psnr_db: float | None
    worst_ssim: float | None
    limit_psnr_db: float | None
    limit_ssim: float | None
    note: str
    """Why nothing was compared, where the figures are null."""
    picture_prompt: str
    """What is drawn on every side, with `picture_seed`."""
    picture_seed: int
    picture_png: str
    """The timed picture as a data URI, at most 256 pixels wide."""


@dataclass(frozen=True, kw_only=True)
class ColdStart:
    """One fresh process, until its first image."""

    start_ms: float
    """The interpreter, to its first line."""
    import_ms: float
    load_ms: float
    capture_ms: float | None
    """CUDA graph capture or compilation, where the side has one and tells."""
    first_image_ms: float
    total_ms: float
    """From before the process existed to the first image in memory. What is left over is the benchmark's own pipe."""
    peak_rss_bytes: int | None
    """Until then."""


@dataclass(frozen=True, kw_only=True)
class Process:
    """One fresh process of ours, from its start to its last image; images in the order in which they were drawn."""

    cold_start: ColdStart
    warm_up: WarmUp
    total_ms: tuple[float, ...]
    """End to end, from the prompt to PIL images."""
    cpu_ms: tuple[float, ...]
    """Processor time of all threads."""
    stages_ms: dict[str, tuple[float, ...]]
    yardstick_ms: tuple[float, ...]
    """A fixed hash on every core before each block of images: the machine's speed just then."""
    yardstick_cpu_ms: tuple[float, ...]
    images_per_block: int


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """Calls from several threads on one pipeline."""

    num_threads: int
    num_calls: int
    seconds: float
    images_per_s: float


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything about one subject."""

    subject: Subject
    quality: Quality
    processes: tuple[Process, ...]
    summary: dict[str, Summary]
    """Stage, or `total`, `outside_engines`, `cpu` -> figures over the images of all processes, in milliseconds."""
    outside_share: float
    """Median share of a call that is spent outside the engines."""
    cold_start: ColdStart
    """Medians over the processes, each figure for itself."""
    throughput: tuple[Throughput, ...]
    peak_rss_bytes: int | None
    """Of one process, after all its images."""
    device_peak_bytes: int | None
    device_memory_note: str
    work: tuple[StageWork, ...]
    predictions: tuple[Prediction, ...]


@dataclass(frozen=True, kw_only=True)
class PeerRun:
    """A peer beside one subject."""

    subject: str
    """Its id."""
    name: str
    title: str
    status: str
    """`timed`, or `failed`: then `reason` says why, and figures are null or empty."""
    reason: str
    compute_dtype: str
    versions: dict[str, str]
    notes: tuple[str, ...]
    psnr_db: float | None
    """Its picture against ours, for the timed prompt and noise; null where a note says why it cannot be the same."""
    psnr_needed_db: float | None
    ours_ms: tuple[float, ...]
    """Medians of our turns, or of our processes where a note says that they were timed apart ..."""
    theirs_ms: tuple[float, ...]
    """... and of the peer's turn or process that followed each."""
    images_per_turn: int
    ratio: Ratio | None
    """Ours over theirs, pair by pair."""
    summary: Summary | None
    """Of all the peer's images, in milliseconds."""
    cold_starts: tuple[ColdStart, ...]
    cold_start: ColdStart | None
    """Medians."""
    peak_rss_bytes: int | None
    device_peak_bytes: int | None
    installed_bytes: int | None
    """Of the packages that it needs."""
    model_bytes: int | None
    """Of the checkpoint."""


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How it was measured, in sentences that go into the report, and the resolved numbers."""

    rules: dict[str, str]
    images: int
    """Per subject."""
    processes: int
    pairs: int
    concurrency: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class BenchReport:
    """One benchmark."""

    schema_version: int
    kind: str
    name: str
    device: str
    """`cpu`, or the GPU's name."""
    date: str
    command: str
    commit: str
    machine: dict[str, str]
    state_before: MachineState
    state_after: MachineState
    versions: dict[str, str]
    protocol: Protocol
    installed_bytes: int | None
    """Of the packages that drawing with these bundles needs, nitro-rt with them; null where `installed_note` says why."""
    installed_note: str
    ceilings: tuple[Ceiling, ...]
    runs: tuple[Run, ...]
    peers: tuple[PeerRun, ...]

    def to_json(self) -> str:
        return json.dumps(rounded(dataclasses.asdict(self)), indent=1, sort_keys=True, allow_nan=False) + "\n"

    def timed_peers(self, subject: str) -> tuple[PeerRun, ...]:
        return tuple(peer for peer in self.peers if peer.subject == subject and peer.status == "timed")


def rounded(value: Any) -> Any:
    """Floats with six significant digits: more than any clock here can tell, and a third of the bytes."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return value

"""A peer beside us: our turn, its turn, our turn, its turn, in one run, so that both of a pair see the same machine."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nitro_bench.bench_report import ColdStart, PeerRun, Process
from nitro_bench.peer import Drawn, DrawRequest, Loaded, Memory, Peer, PeerFailed, PeerProcess
from nitro_bench.samples import ratio_of, summary_of
from nitro_bench.timing import Started, block_sizes, images_per_block, median_cold_start
from nitro_bench.warmup import SLOW_MS, VERY_SLOW_MS
from nitro_rt.quality import Images, limits_of, psnr_db

PAUSE_S = 0.02
"""Between turns: threads of torch and ONNX Runtime spin for a while after their work, and would spin into the other's turn."""
TURN_MS, MAX_TURN = 250.0, 10
"""A turn takes about so long, and has at most so many images: its median counts."""
WARM_UP_IMAGES = 3
"""Before a side's first turn in a process, after its first image, at which torch.compile and the like have worked. One is
enough where an image takes seconds."""
MIN_PAIRS = 6
HEADROOM_SHARE = 0.1
"""Of the memory available, what both processes together must leave to the system and to the files they read."""
APART = (
    "our process is closed before theirs starts, which draws as many images; a pair is the median of our process over that of "
    f"the process of theirs which followed, so an interval needs {MIN_PAIRS} processes; what else the machine did meanwhile "
    "does not cancel out, and a start may find its files pushed out of memory"
)
RULE = (
    f"each side in processes of its own; ours and theirs take turns of about {TURN_MS:g} ms, at most {MAX_TURN} images, with "
    f"{1e3 * PAUSE_S:g} ms between them; a pair is our turn's median over that of their turn which followed; where an image "
    f"takes over {VERY_SLOW_MS / 1e3:g} s there are no more pairs than timed images; where both do not fit into memory "
    f"together, they are timed apart, and the peer's notes say so: {APART}"
)


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """The turns that two processes took, or the one turn of each where they were timed apart."""

    ours_ms: tuple[float, ...]
    theirs_ms: tuple[float, ...]
    """Median image of each turn."""
    their_images_ms: tuple[float, ...]
    images_per_turn: int


def take_turns(
    first: PeerProcess, second: PeerProcess, draws: tuple[DrawRequest, DrawRequest], num_pairs: int, images_per_turn: int
) -> list[tuple[Drawn, Drawn]]:
    """Each side draws its own request, in turns. Raises: PeerFailed with the name of the side that failed."""
    turns = []
    for _ in range(num_pairs):
        left = first.draw(draws[0], images_per_turn)
        time.sleep(PAUSE_S)
        turns.append((left, second.draw(draws[1], images_per_turn)))
        time.sleep(PAUSE_S)
    return turns


def pairs_of(turns: Iterable[tuple[Drawn, Drawn]]) -> Pairs:
    ours, theirs = zip(*turns, strict=True)
    return Pairs(
        ours_ms=tuple(statistics.median(turn.image_ms) for turn in ours),
        theirs_ms=tuple(statistics.median(turn.image_ms) for turn in theirs),
        their_images_ms=tuple(value for turn in theirs for value in turn.image_ms),
        images_per_turn=len(ours[0].image_ms),
    )


def apart(ours: Process, theirs: Started, draw: DrawRequest, their_image_ms: float) -> Pairs:
    """One pair of whole processes: `ours` is closed, and theirs draws as many images. Raises: PeerFailed."""
    sizes = block_sizes(len(ours.total_ms), images_per_block(their_image_ms))
    their_images_ms = tuple(value for size in sizes for value in theirs.process.draw(draw, size).image_ms)
    return Pairs(
        ours_ms=(statistics.median(ours.total_ms),),
        theirs_ms=(statistics.median(their_images_ms),),
        their_images_ms=their_images_ms,
        images_per_turn=len(their_images_ms),
    )


def fit_together(first_bytes: int, second_bytes: int, available_bytes: int) -> bool:
    """Whether two processes with these peaks can be alive together; 0 available bytes mean that nobody can tell."""
    return not available_bytes or first_bytes + second_bytes <= (1 - HEADROOM_SHARE) * available_bytes


def why_apart(ours_bytes: int | None, theirs_bytes: int | None, available_bytes: int) -> str:
    """Why two processes with these peaks cannot be alive together; empty where they can, or where nobody can tell."""
    if not (ours_bytes and theirs_bytes) or fit_together(ours_bytes, theirs_bytes, available_bytes):
        return ""
    return (
        f"timed apart, not in turns: our process takes {ours_bytes / 2**30:.1f} GiB and theirs {theirs_bytes / 2**30:.1f} GiB, "
        f"{available_bytes / 2**30:.1f} GiB are available, of which {HEADROOM_SHARE:.0%} stays free; {APART}"
    )


def turn_length(ours_ms: float, theirs_ms: float) -> int:
    """Images per turn: the faster side fills its turn, within reason for the slower."""
    return max(1, min(MAX_TURN, math.ceil(TURN_MS / max(ours_ms, theirs_ms)), round(TURN_MS / min(ours_ms, theirs_ms))))


def pairs_within(seconds: float, ours_ms: float, theirs_ms: float, most: int, num_images: int) -> int:
    """As many pairs as fit, but enough for an interval; of very slow images no more than the `num_images` asked for."""
    per_pair_s = turn_length(ours_ms, theirs_ms) * (ours_ms + theirs_ms) / 1e3 + 2 * PAUSE_S
    if max(ours_ms, theirs_ms) > VERY_SLOW_MS:
        most = min(most, num_images)
    return max(min(MIN_PAIRS, most), min(most, round(seconds / per_pair_s)))


def needed_psnr_db(precisions: Iterable[str], our_dtypes: Iterable[str], their_dtype: str) -> float:
    """How near two pictures must be when each may be so far from the float32 parent's as its precision allows.

    Their errors add up at worst: amplitudes, not powers, since both may err the same way or the opposite.
    """
    floors = (limits_of(precisions, our_dtypes).psnr_db, limits_of((), (their_dtype,)).psnr_db)
    return -20 * math.log10(sum(10 ** (-floor / 20) for floor in floors))


def require_same_picture(peer: Peer, theirs_BHWC: Images, ours_BHWC: Images, needed_db: float) -> float:
    """The PSNR of a peer's picture against ours. Raises: PeerFailed if it is another picture; it is not timed then."""
    require_same_shape(peer, theirs_BHWC, ours_BHWC)
    found = min(psnr_db(theirs, ours) for theirs, ours in zip(theirs_BHWC, ours_BHWC, strict=True))
    if found < needed_db:
        raise PeerFailed(peer.name, f"draws another picture: {found:.1f} dB from ours, {needed_db:.1f} are needed; not timed")
    return found


def require_same_shape(peer: Peer, theirs_BHWC: Images, ours_BHWC: Images) -> None:
    """Raises: PeerFailed if a peer draws pictures of another size or number; it is not timed then."""
    if theirs_BHWC.shape != ours_BHWC.shape:
        raise PeerFailed(peer.name, f"draws {list(theirs_BHWC.shape)}, ours is {list(ours_BHWC.shape)}; not timed")


def drawn_by(started: Started, draw: DrawRequest, path: Path) -> tuple[Images, float]:
    """The timed picture, [B, H, W, 3], and the median of a few images' milliseconds."""
    image_ms = statistics.median(warm_images(started, draw, path).image_ms)
    return np.load(path), image_ms


def warm_images(started: Started, draw: DrawRequest, save: Path | None = None) -> Drawn:
    """A few images after a process's first. Raises: PeerFailed."""
    count = 1 if started.cold_start.first_image_ms > SLOW_MS else WARM_UP_IMAGES
    return started.process.draw(draw, count, save)


@dataclass(frozen=True, kw_only=True)
class Tried:
    """A peer that drew the right picture in its first process, which is not counted: it warmed the file cache."""

    peer: Peer
    loaded: Loaded
    psnr_db: float | None
    """None, and no limit, where `loaded.differs` says why it cannot be the same picture."""
    needed_db: float | None
    image_ms: float
    peak_rss_bytes: int | None


def failed(subject: str, peer: Peer, reason: str) -> PeerRun:
    """What the report says of a peer that was not timed."""
    return PeerRun(
        subject=subject,
        name=peer.name,
        title=peer.title,
        status="failed",
        reason=reason,
        compute_dtype="",
        versions={},
        notes=(),
        psnr_db=None,
        psnr_needed_db=None,
        ours_ms=(),
        theirs_ms=(),
        images_per_turn=0,
        ratio=None,
        summary=None,
        cold_starts=(),
        cold_start=None,
        peak_rss_bytes=None,
        device_peak_bytes=None,
        installed_bytes=None,
        model_bytes=None,
    )


def timed(
    subject: str,
    tried: Tried,
    pairs: list[Pairs],
    cold_starts: list[ColdStart],
    memory: Memory,
    installed_bytes: int | None,
    model_bytes: int,
    why_apart: str,
) -> PeerRun:
    """All turns of all processes together."""
    ours_ms = tuple(value for part in pairs for value in part.ours_ms)
    theirs_ms = tuple(value for part in pairs for value in part.theirs_ms)
    return PeerRun(
        subject=subject,
        name=tried.peer.name,
        title=tried.peer.title,
        status="timed",
        reason="",
        compute_dtype=tried.loaded.compute_dtype,
        versions=tried.loaded.versions,
        notes=(*filter(None, (tried.loaded.differs, f"{subject}: {why_apart}" if why_apart else "")), *tried.loaded.notes),
        psnr_db=tried.psnr_db,
        psnr_needed_db=tried.needed_db,
        ours_ms=ours_ms,
        theirs_ms=theirs_ms,
        images_per_turn=pairs[0].images_per_turn,
        ratio=ratio_of(ours_ms, theirs_ms),
        summary=summary_of([value for part in pairs for value in part.their_images_ms]),
        cold_starts=tuple(cold_starts),
        cold_start=median_cold_start(cold_starts),
        peak_rss_bytes=memory.peak_rss_bytes,
        device_peak_bytes=memory.device_peak_bytes,
        installed_bytes=installed_bytes,
        model_bytes=model_bytes,
    )

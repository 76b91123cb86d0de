"""`nitro-rt bench-compare OLD_BUNDLE NEW_BUNDLE`: two bundles in turns, in one run.

What shares the machine slows both of a pair, so this tells a few percent where two reports of different hours cannot. The unit
is a pair of fresh processes, one of each bundle; its figure is the median over their pairs of turns. Which of them starts and
draws first changes from pair to pair: a bundle was seen to be 1.5 % faster as the second, and its denoiser 3 %. Where the pairs
leave something undecided, as many more are taken, and the intervals are as wide as several looks at the figures ask for.
"""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from nitro_bench import pairing, timing
from nitro_bench.bench_config import BenchConfig
from nitro_bench.checking import open_cases
from nitro_bench.compare import JUDGED_SHARE, NOT_JUDGED, UNDECIDED, Comparison, Line, verdict_of
from nitro_bench.intervals import MAX_LOOKS, paired
from nitro_bench.peer import COMMAND_TIMEOUT_S, Drawn, PeerProcess
from nitro_bench.subject import OURS, Case, verified
from nitro_engines.host import available_bytes
from nitro_rt.errors import ConfigError

CPU = "cpu"
NUM_PROCESSES, NUM_PAIRS = 6, 12
"""Process pairs before each look, an even number, and pairs of turns in each."""

Pair = tuple[dict[str, float], dict[str, float]]
"""A turn of the old bundle and the turn of the new one beside it: stage -> milliseconds."""


def compare_bundles(old: Path, new: Path, max_slowdown: float, report: Callable[[str], None]) -> Comparison:
    """Verify both, then draw with them in turns, at the step counts and the size that both have.

    Raises: ConfigError if they have none in common, are of different models or do not fit into memory together; otherwise as
        `nitro_bench.bench.measure`.
    """
    with tempfile.TemporaryDirectory(prefix="nitro-compare-") as scratch:
        olds, news = (_cases(folder, Path(scratch) / name) for folder, name in ((old, "old"), (new, "new")))
        common = [key for key in olds if key in news]
        if not common:
            listed = [", ".join(case.id for case in cases.values()) for cases in (olds, news)]
            raise ConfigError(f"the bundles have nothing in common: the old one draws {listed[0]}, the new one {listed[1]}")
        if len({cases[key].on_gpu for cases in (olds, news) for key in common}) > 1:
            raise ConfigError("one of the bundles runs on a GPU and one on the processor; two of one device can be compared")
        lines = [line for key in common for line in _compare(olds[key], news[key], max_slowdown, report)]
    return Comparison(lines=tuple(lines), notes=(), max_slowdown=max_slowdown)


def _cases(folder: Path, work: Path) -> dict[tuple[object, ...], Case]:
    work.mkdir()
    cases = open_cases(BenchConfig(bundles=(folder,)), work)
    return {(case.bundle.manifest.source.name, case.num_steps, case.size_px, case.batch): case for case in cases}


def _compare(old: Case, new: Case, max_slowdown: float, report: Callable[[str], None]) -> list[Line]:
    image_ms, peaks = zip(*(_verify(case, report) for case in (old, new)), strict=True)
    _require_memory(new, *peaks)
    length = pairing.turn_length(*image_ms)
    units: list[list[Pair]] = []
    lines: list[Line] = []
    while len(units) < MAX_LOOKS * NUM_PROCESSES:
        for _ in range(NUM_PROCESSES):
            units.append(_unit(old, new, length, new_first=len(units) % 2 == 1))
            report(f"{new.id}: process pair {len(units)}: x{_ratio(units[-1], 'total'):.3f}")
        lines = list(_lines(new, units, max_slowdown))
        if all(line.verdict != UNDECIDED for line in lines):
            break
    return lines


def _unit(old: Case, new: Case, length: int, *, new_first: bool) -> list[Pair]:
    """The turns of one pair of processes."""
    first, second = (new, old) if new_first else (old, new)
    with _start(first) as left, _start(second) as right:
        turns = pairing.take_turns(left, right, (first.draw_request(), second.draw_request()), NUM_PAIRS, length)
    pairs = [(_turn(one), _turn(other)) for one, other in turns]
    return [(of_old, of_new) for of_new, of_old in pairs] if new_first else pairs


def _lines(new: Case, units: Sequence[Sequence[Pair]], max_slowdown: float) -> Iterator[Line]:
    totals = [pair[0]["total"] for unit in units for pair in unit]
    on_cpu = not new.on_gpu
    first = units[0][0]
    for stage in (stage for stage in first[0] if stage != CPU and stage in first[1]):  # CUDA graphs hold several stages as one
        olds = [pair[0][stage] for unit in units for pair in unit]
        news = [pair[1][stage] for unit in units for pair in unit]
        change = paired([math.log(_ratio(unit, stage)) for unit in units])
        cpu = paired([math.log(_ratio(unit, CPU)) for unit in units]) if stage == "total" and on_cpu else None
        judged = statistics.median(olds) >= JUDGED_SHARE * statistics.median(totals)
        yield Line(
            subject=new.id,
            stage=stage,
            old_ms=statistics.median(olds),
            new_ms=statistics.median(news),
            wall=change,
            cpu=cpu,
            verdict=verdict_of(change, cpu, max_slowdown) if judged else NOT_JUDGED,
        )


def _verify(case: Case, report: Callable[[str], None]) -> tuple[float, int]:
    """Check the pictures of a bundle in a process that is not counted; about how long an image takes in ms, and its peak memory
    in bytes (0 where nobody can tell)."""
    draw = case.draw_request()
    started = timing.start(OURS, case.load_request(case.bundle.folder, OURS), draw, COMMAND_TIMEOUT_S)
    with started.process as process:
        drawn_BHWC, image_ms = pairing.drawn_by(started, draw, case.work / "picture.npy")
        verified(case, process, started.loaded, drawn_BHWC)
        peak_rss_bytes = process.memory().peak_rss_bytes or 0
    report(f"{case.id}: verified, about {image_ms:.1f} ms an image")
    return image_ms, peak_rss_bytes


def _require_memory(new: Case, old_bytes: int, new_bytes: int) -> None:
    available = available_bytes()
    if not pairing.fit_together(old_bytes, new_bytes, available):
        raise ConfigError(
            f"{new.id}: two processes in turns do not fit into memory: the old bundle takes {old_bytes / 2**30:.1f} GiB, the "
            f"new one {new_bytes / 2**30:.1f} GiB, {available / 2**30:.1f} GiB are available; write a report of each with "
            "`nitro-rt bench --json` and compare those, or use a machine with more memory"
        )


def _start(case: Case) -> PeerProcess:
    """A process that is loaded and has drawn a few images: both sides the same number."""
    draw = case.draw_request()
    started = timing.start(OURS, case.load_request(case.bundle.folder, OURS), draw, COMMAND_TIMEOUT_S)
    try:
        pairing.warm_images(started, draw)
    except BaseException:
        started.process.close()
        raise
    return started.process


def _turn(drawn: Drawn) -> dict[str, float]:
    """Median of each stage over a turn's images, in ms, the whole and the processor's time among them."""
    stages = {stage: statistics.median(timings[stage] for timings in drawn.timings_ms) for stage in drawn.timings_ms[0]}
    return stages | {"total": statistics.median(drawn.image_ms), CPU: statistics.median(drawn.cpu_ms)}


def _ratio(unit: Sequence[Pair], stage: str) -> float:
    """New over old, the median over the pairs of two processes."""
    return statistics.median(new[stage] / old[stage] for old, new in unit)

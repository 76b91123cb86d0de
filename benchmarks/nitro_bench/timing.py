"""Times one subject: fresh processes one after another, each from its start over warm-up to its share of the images."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from nitro_bench import yardstick
from nitro_bench.bench_report import ENGINE_STAGES, GRAPH_STAGE, ColdStart, Process, Throughput
from nitro_bench.peer import Drawn, DrawRequest, Loaded, LoadRequest, Peer, PeerProcess
from nitro_bench.samples import Summary, summary_of
from nitro_bench.warmup import VERY_SLOW_MS, WarmUp, warm_up

BLOCK_MS, MAX_BLOCK = 100.0, 10
"""Between blocks of images the yardstick is measured; a block takes about so long, and has at most so many images."""
THROUGHPUT_MS = 3000.0
"""A level of concurrency draws for about so long, and at least two calls per thread."""
SLOW_CALL_MS = 10_000.0
"""Above this, one call per thread must do."""
THROUGHPUT_RULE = (
    f"calls from several threads on one pipeline for about {THROUGHPUT_MS / 1e3:g} s; where an image takes over "
    f"{VERY_SLOW_MS / 1e3:g} s nothing is drawn for one thread: its figure is that of the timed images, one after another"
)


@dataclass(frozen=True, kw_only=True)
class Started:
    """A process that has drawn its first image."""

    process: PeerProcess
    loaded: Loaded
    cold_start: ColdStart


def start(peer: Peer, load: LoadRequest, draw: DrawRequest, timeout_s: float) -> Started:
    """Start a process, load, draw one image. The caller closes it.

    Raises: PeerFailed; the process is gone then.
    """
    process = PeerProcess(peer, timeout_s)
    try:
        loaded = process.load(load)
        first = process.draw(draw)
        memory = process.memory()
    except BaseException:
        process.close()
        raise
    cold_start = ColdStart(
        start_ms=loaded.start_ms,
        import_ms=loaded.import_ms,
        load_ms=loaded.load_ms,
        capture_ms=loaded.capture_ms,
        first_image_ms=first.image_ms[0],
        total_ms=first.since_start_ms,
        peak_rss_bytes=memory.peak_rss_bytes,
    )
    return Started(process=process, loaded=loaded, cold_start=cold_start)


def time_images(started: Started, draw: DrawRequest, num_images: int) -> Process:
    """Warm up, then draw `num_images` in blocks with the yardstick before each. Raises: PeerFailed."""
    process, blocks = started.process, []
    warmed = warm_up(lambda count: process.draw(draw, count).image_ms, started.cold_start.first_image_ms)
    per_block = images_per_block(warmed.last_ms)
    yardsticks = []
    for size in block_sizes(num_images, per_block):
        yardsticks.append(yardstick.measure())
        blocks.append(process.draw(draw, size))
    return _process(started.cold_start, warmed, blocks, yardsticks, per_block)


def images_per_block(image_ms: float) -> int:
    return max(1, min(MAX_BLOCK, round(BLOCK_MS / image_ms)))


def block_sizes(num_images: int, per_block: int) -> Iterator[int]:
    """Blocks that make `num_images`; the last takes what is left."""
    for drawn in range(0, num_images, per_block):
        yield min(per_block, num_images - drawn)


def throughput(
    process: PeerProcess, draw: DrawRequest, levels: Iterable[int], image_ms: float, timed: Sequence[Process]
) -> tuple[Throughput, ...]:
    """Images a second, for each number of threads.

    Args:
        timed: what one thread has drawn already; very slow images are not drawn again for its level.
    Raises: PeerFailed.
    """
    found = []
    for num_threads in levels:
        if num_threads == 1 and image_ms > VERY_SLOW_MS:
            found.append(_one_thread(timed, len(draw.prompts)))
            continue
        num_calls = num_threads * (1 if image_ms > SLOW_CALL_MS else 2)
        num_calls = max(num_calls, math.ceil(THROUGHPUT_MS / image_ms))
        seconds = process.throughput_s(draw, num_threads, num_calls)
        images_per_s = num_calls * len(draw.prompts) / seconds
        found.append(Throughput(num_threads=num_threads, num_calls=num_calls, seconds=seconds, images_per_s=images_per_s))
    return tuple(found)


def _one_thread(timed: Iterable[Process], batch: int) -> Throughput:
    drawn_ms = [value for process in timed for value in process.total_ms]
    seconds = sum(drawn_ms) / 1e3
    images_per_s = len(drawn_ms) * batch / seconds
    return Throughput(num_threads=1, num_calls=len(drawn_ms), seconds=seconds, images_per_s=images_per_s)


def median_cold_start(starts: Sequence[ColdStart]) -> ColdStart:
    """Each figure's own median; the process nearest to it need not exist."""
    captures = [start.capture_ms for start in starts if start.capture_ms is not None]
    peaks = [start.peak_rss_bytes for start in starts if start.peak_rss_bytes is not None]
    return ColdStart(
        start_ms=statistics.median(start.start_ms for start in starts),
        import_ms=statistics.median(start.import_ms for start in starts),
        load_ms=statistics.median(start.load_ms for start in starts),
        capture_ms=statistics.median(captures) if captures else None,
        first_image_ms=statistics.median(start.first_image_ms for start in starts),
        total_ms=statistics.median(start.total_ms for start in starts),
        peak_rss_bytes=int(statistics.median(peaks)) if peaks else None,
    )


def summaries(processes: Sequence[Process]) -> dict[str, Summary]:
    """The figures of every stage, of the whole, of what is spent outside the engines, and of processor time."""
    stages = dict.fromkeys(stage for process in processes for stage in process.stages_ms)
    found = {stage: [value for process in processes for value in process.stages_ms[stage]] for stage in stages}
    found["total"] = [value for process in processes for value in process.total_ms]
    found["outside_engines"] = outside_ms(processes)
    found["cpu"] = [value for process in processes for value in process.cpu_ms]
    return {name: summary_of(values) for name, values in found.items()}


def outside_ms(processes: Iterable[Process]) -> list[float]:
    """Of each image, the time that is no engine's: tokens, noise, buffers, Python, pictures."""
    return [
        total - sum(process.stages_ms[stage][index] for stage in engine_stages(process))
        for process in processes
        for index, total in enumerate(process.total_ms)
    ]


def engine_stages(process: Process) -> tuple[str, ...]:
    """A device bundle times everything from the first upload to the last download as one."""
    return (GRAPH_STAGE,) if GRAPH_STAGE in process.stages_ms else ENGINE_STAGES


def outside_share(processes: Sequence[Process]) -> float:
    totals = [value for process in processes for value in process.total_ms]
    return statistics.median(outside / total for outside, total in zip(outside_ms(processes), totals, strict=True))


def _process(
    cold_start: ColdStart, warmed: WarmUp, blocks: Sequence[Drawn], yardsticks: Sequence[yardstick.Yardstick], per_block: int
) -> Process:
    timings = [timing for block in blocks for timing in block.timings_ms]
    # `load` is there where an engine was loaded in the call, which warm-up has seen to.
    stages_ms = {stage: tuple(timing[stage] for timing in timings) for stage in timings[0] if stage != "total"}
    image_ms = [value for block in blocks for value in block.image_ms]
    # What the pipeline's own total leaves out: pictures made from its array when they are asked for.
    stages_ms["images"] = tuple(value - timing["total"] for value, timing in zip(image_ms, timings, strict=True))
    return Process(
        cold_start=cold_start,
        warm_up=warmed,
        total_ms=tuple(image_ms),
        cpu_ms=tuple(value for block in blocks for value in block.cpu_ms),
        stages_ms=stages_ms,
        yardstick_ms=tuple(measured.wall_ms for measured in yardsticks),
        yardstick_cpu_ms=tuple(measured.cpu_ms for measured in yardsticks),
        images_per_block=per_block,
    )

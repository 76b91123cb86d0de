"""`nitro-rt bench`: verifies what bundles draw, then times it, alone and beside peers.

Everything that is timed runs in fresh processes of its own (`peer`), ours too. A first round, which is not counted, checks each
side's picture and warms the file cache. Then, for each step count of each bundle: several processes one after another, each
from its start over warm-up to its share of the images, each followed by turns with every peer, or by a process of a peer that
does not fit into memory beside ours.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from pathlib import Path

from nitro_bench import ceilings, pairing, roofline, samples, telemetry, timing, warmup
from nitro_bench.bench_config import BenchConfig, Report
from nitro_bench.bench_markdown import ceiling
from nitro_bench.bench_report import KIND, SCHEMA_VERSION, BenchReport, PeerRun, Protocol, Run
from nitro_bench.cards import card_of, ceilings_of_gpu
from nitro_bench.ceilings import Ceiling
from nitro_bench.checking import Checked, check, device_of, name_of, open_cases
from nitro_bench.footprint import installed_bytes
from nitro_bench.machine import commit, machine
from nitro_bench.peer import Memory
from nitro_bench.rounds import Rounds, Timed
from nitro_bench.subject import Case, subject_of
from nitro_bench.telemetry import PACKAGE, read_state


def measure(
    config: BenchConfig, report: Report = print, before_timing: Callable[[str, str], None] | None = None
) -> BenchReport:
    """Verify, then time.

    Args:
        before_timing: is told the report's name and device before anything is run; it may raise.

    Raises: ModelNotFound, BundleError (a bundle that is damaged or misses its quality limits: nothing is timed), EngineMismatch
        for steps, sizes or a batch that a bundle lacks, ConfigError; PeerFailed only if our own process fails.
    """
    before, place = read_state(), machine()
    with tempfile.TemporaryDirectory(prefix="nitro-bench-") as scratch:
        cases = open_cases(config, Path(scratch))
        name, device = name_of(config, cases), device_of(cases, before)
        if before_timing is not None:
            before_timing(name, device)
        checked = [check(case, config, report) for case in cases]
        rates = _ceilings(checked, device)
        results = [Rounds(found, config, report).run() for found in checked]
        rates = ceilings.better_of(rates, _ceilings(checked, device))
        report("ceilings: " + "; ".join(map(ceiling, rates)))
    runs = tuple(_run(found, result, rates, config, report) for found, (result, _) in zip(checked, results, strict=True))
    peers = tuple(peer for _, found in results for peer in found)
    ours_bytes, ours_note = installed_bytes({run.subject.backend for run in runs}, on_gpu=device != "cpu")
    return BenchReport(
        schema_version=SCHEMA_VERSION,
        kind=KIND,
        name=name,
        device=device,
        date=time.strftime("%Y-%m-%d"),
        command=config.command,
        commit=commit(),
        machine=place,
        state_before=before,
        state_after=telemetry.after([*(state for timed, _ in results for state in timed.states), read_state()]),
        versions=checked[0].loaded.versions | {"nitro-rt": metadata.version("nitro-rt")},
        protocol=_protocol(config, runs, peers),
        installed_bytes=ours_bytes,
        installed_note=ours_note,
        ceilings=rates,
        runs=runs,
        peers=peers,
    )


def _run(checked: Checked, timed: Timed, rates: Iterable[Ceiling], config: BenchConfig, report: Report) -> Run:
    summary = timing.summaries(timed.processes) | timed.launched_alone
    medians = {stage: figures.p50 for stage, figures in summary.items()}
    num_steps = checked.case.num_steps
    works = roofline.stage_works(checked.works, num_steps, rates, checked.compute_dtypes, medians)
    for line in roofline.sentences(works):
        report(f"{checked.case.id}: {line}")
    return Run(
        subject=subject_of(checked.case, checked.loaded),
        quality=checked.quality,
        processes=tuple(timed.processes),
        summary=summary,
        outside_share=timing.outside_share(timed.processes),
        cold_start=timing.median_cold_start([process.cold_start for process in timed.processes]),
        throughput=timed.throughput,
        peak_rss_bytes=timed.memory.peak_rss_bytes,
        device_peak_bytes=timed.memory.device_peak_bytes if checked.case.on_gpu else None,
        device_memory_note=_device_memory_note(checked.case, timed.memory),
        work=works,
        predictions=tuple(roofline.predict(checked.works, num_steps, card_of(name)) for name in config.predict),
    )


def _protocol(config: BenchConfig, runs: Sequence[Run], peers: Sequence[PeerRun]) -> Protocol:
    return Protocol(
        rules={
            "verification": "in a process that is not counted, pictures of the bundle's references against those of its "
            "float32 parent (PSNR, SSIM); a peer's picture against ours",
            "clock": "time.perf_counter inside the drawing process; device stages by CUDA events",
            "timed span": "from the prompt as a string to the pictures in host memory; stages are the pipeline's own timings; "
            "where one CUDA graph holds text, denoise and decode, their figures are of one process more that launches them one "
            "by one",
            "warm-up": warmup.RULE,
            "statistics": samples.RULE,
            "throughput": timing.THROUGHPUT_RULE,
            "peers": pairing.RULE,
            "cold start": "fresh processes, not the first on this machine: files are warm, and what a library compiles and "
            "keeps was compiled; from before the process exists to the first picture",
            "floor": "operations at the measured rate of their type, or weights, inputs and outputs through memory: the larger",
        },
        images=max(run.summary["total"].num_samples for run in runs),
        processes=max(len(run.processes) for run in runs),
        pairs=max((len(peer.ours_ms) for peer in peers), default=0),
        concurrency=config.concurrency,
    )


def _device_memory_note(case: Case, memory: Memory) -> str:
    if not case.on_gpu:
        return "this backend has no device memory of its own"
    if memory.device_peak_bytes is None:
        return f"it is read through {PACKAGE}, which is not here"
    return ""


def _ceilings(checked: Iterable[Checked], device: str) -> tuple[Ceiling, ...]:
    """Measured on a processor; of a GPU its data sheet's, if it is known."""
    if device != "cpu":
        return ceilings_of_gpu(device)
    dtypes = {dtype for one in checked for dtype in roofline.dtypes_of(one.works, one.compute_dtypes)}
    return ceilings.measure_ceilings(sorted(dtypes))

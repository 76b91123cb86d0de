"""The report as Markdown: tables, what they say, how they were measured, what is missing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from nitro_bench.bench_report import STAGES, BenchReport, ColdStart, PeerRun, Run
from nitro_bench.ceilings import Ceiling
from nitro_bench.samples import Ratio, Summary
from nitro_bench.telemetry import MachineState

MIB = 2**20
BUSY_SHARE = 0.5
"""Load average over cores from which a machine counts as busy."""


def markdown(report: BenchReport) -> str:
    """A whole page."""
    sections = {
        "Latency": _latency(report),
        "Quality": _quality(report),
        "Beside peers": _peers(report),
        "Start": _starts(report),
        "Throughput": _throughput(report),
        "Memory and disk": _footprint(report),
        "Roofline": _roofline(report),
        "Predicted floors": _predictions(report),
        "How it was measured": _protocol(report),
        "Machine": _machine(report),
    }
    body = "\n\n".join(f"## {title}\n\n{text}" for title, text in sections.items() if text)
    return f"# Benchmark: {report.name}, {report.device}, {report.date}\n\n{busy_note(report)}{body}\n\n    {report.command}"


def busy_note(report: BenchReport) -> str:
    """A warning where something else had the processors before we began."""
    load, cores = report.state_before.load_average, float(report.machine["cores"])
    if load < BUSY_SHARE * cores:
        return ""
    return (
        f"**The machine was busy** (load {load:.1f} on {cores:.0f} cores before the start): times are too long, and by how "
        "much differs from process to process. Believe ratios of turns and processor time, and those with care; measure again "
        "on an idle machine before quoting anything else.\n\n"
    )


def ms(value: float | None) -> str:
    """Milliseconds with three significant digits; a dash for what is missing."""
    if value is None:
        return "-"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def mib(num_bytes: int | None) -> str:
    return "-" if num_bytes is None else f"{num_bytes / MIB:,.0f}"


def psnr(peer: PeerRun) -> str:
    """Of its picture against ours."""
    return "not comparable" if peer.psnr_db is None else f"{peer.psnr_db:.1f}"


def share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def ceiling(rate: Ceiling) -> str:
    if rate.per_s is None:
        return f"{rate.kind}: {rate.note}"
    return f"{rate.kind} {rate.per_s / 1e9:,.1f} {'GB/s' if rate.kind == 'copy' else 'GFLOP/s'} ({rate.by})"


def ceilings_sentence(report: BenchReport) -> str:
    """What the roofline stands on, and how far to trust it."""
    told = "; ".join(map(ceiling, report.ceilings)) or "none are known"
    shares = [work.achieved_share or 0.0 for run in report.runs for work in run.work]
    doubt = (
        " A share above 100 % says that the machine was busier when its ceilings were measured, or that an engine has a faster "
        "kernel than the product that was measured."
        if max(shares, default=0.0) > 1
        else ""
    )
    whose = "this machine, as measured" if report.device == "cpu" else f"{report.device}, from its data sheet"
    return f"Counted work of each stage under the ceilings of {whose}: {told}.{doubt}"


def shown_stages(run: Run) -> Iterator[tuple[str, Summary]]:
    """The stages in their order, then the whole, what is outside the engines, and processor time."""
    order = [*STAGES, *sorted(set(run.summary) - set(STAGES) - {"total", "outside_engines", "cpu"})]
    for stage in (*order, "total", "outside_engines", "cpu"):
        if stage in run.summary:
            yield stage, run.summary[stage]


def ratio(found: Ratio | None) -> str:
    if found is None:
        return "-"
    interval = f" [{found.low:.3f}, {found.high:.3f}]" if found.low is not None and found.high is not None else ""
    return f"{found.median:.3f}{interval}"


def _latency(report: BenchReport) -> str:
    parts = []
    for run in report.runs:
        rows = [
            (
                stage.replace("_", " "),
                ms(figures.p50),
                "-" if figures.p50_low is None else f"{ms(figures.p50_low)} to {ms(figures.p50_high)}",
                *map(ms, (figures.p90, figures.p95, figures.p99, figures.mean, figures.min, figures.max)),
            )
            for stage, figures in shown_stages(run)
        ]
        total, subject = run.summary["total"], run.subject
        head = ("ms", "p50", "its 95 % interval", "p90", "p95", "p99", "mean", "min", "max")
        missing = [f"{name} {why}" for name, why in total.reasons.items() if name in ("p90", "p95", "p99")]
        stable = sum(process.warm_up.stable for process in run.processes)
        parts.append(
            f"**{subject.id}**: {subject.backend}, {_pairs(subject.precisions)}, computing in "
            f"{_pairs(subject.compute_dtypes)}, batch {subject.batch}.\n\n{table(head, rows)}\n\n"
            f"{total.num_samples} calls in {len(run.processes)} fresh processes, {stable} of which warmed up to a stable time. "
            f"Outside the engines: {run.outside_share:.1%} of a call (median)."
            + (f" Not reported: {'; '.join(missing)}." if missing else "")
        )
    return "\n\n".join(parts)


def _quality(report: BenchReport) -> str:
    rows, notes = [], []
    for run in report.runs:
        quality = run.quality
        if quality.note:
            notes.append(f"{run.subject.id}: {quality.note}.")
            continue
        rows.append(
            (
                run.subject.id,
                f"{quality.worst_psnr_db:.1f}",
                f"{quality.limit_psnr_db:g}",
                f"{quality.worst_ssim:.4f}",
                f"{quality.limit_ssim:g}",
                str(quality.num_images),
            )
        )
    head = ("subject", "worst PSNR dB", "limit", "worst SSIM", "limit", "pictures")
    return "\n\n".join([*([table(head, rows)] if rows else []), *notes])


def _peers(report: BenchReport) -> str:
    if not report.peers:
        return ""
    timed = [peer for peer in report.peers if peer.status == "timed"]
    rows = [
        (
            peer.subject,
            peer.title,
            peer.compute_dtype,
            psnr(peer),
            ms(peer.summary.p50) if peer.summary else "-",
            ratio(peer.ratio),
            str(len(peer.ours_ms)),
        )
        for peer in timed
    ]
    head = ("subject", "peer", "computes in", "PSNR to ours, dB", "its p50, ms", "ours / theirs, 95 % interval", "pairs")
    absent = [f"- {peer.subject}: {peer.title}: {peer.reason}" for peer in report.peers if peer.status != "timed"]
    parts = [table(head, rows)] if rows else []
    notes = dict.fromkeys(f"- {peer.title}: {note}" for peer in timed for note in peer.notes)
    if notes:
        parts.append("\n".join(notes))
    if absent:
        parts.append("Not timed:\n\n" + "\n".join(absent))
    return "\n\n".join(parts)


def _starts(report: BenchReport) -> str:
    rows = []
    for run in report.runs:
        rows.append((run.subject.id, "nitro-rt", *_start_cells(run.cold_start), str(len(run.processes))))
        rows += [
            (peer.subject, peer.title, *_start_cells(peer.cold_start), str(len(peer.cold_starts)))
            for peer in report.timed_peers(run.subject.id)
            if peer.cold_start is not None
        ]
    head = ("subject", "side", "interpreter", "import", "load", "capture", "first image", "in all", "peak RSS MiB", "processes")
    return "Milliseconds, medians.\n\n" + table(head, rows)


def _start_cells(start: ColdStart) -> tuple[str, ...]:
    times = (start.start_ms, start.import_ms, start.load_ms, start.capture_ms, start.first_image_ms, start.total_ms)
    return (*map(ms, times), mib(start.peak_rss_bytes))


def _throughput(report: BenchReport) -> str:
    rows = [
        (run.subject.id, str(level.num_threads), f"{level.images_per_s:.3g}", str(level.num_calls))
        for run in report.runs
        for level in run.throughput
    ]
    return table(("subject", "threads", "images a second", "calls"), rows) if rows else ""


def _footprint(report: BenchReport) -> str:
    rows: list[tuple[str, ...]] = []
    for run in report.runs:
        sizes: tuple[int | None, ...] = (run.peak_rss_bytes, run.device_peak_bytes, report.installed_bytes)
        rows.append((run.subject.id, "nitro-rt", *map(mib, (*sizes, run.subject.num_bytes))))
        for peer in report.timed_peers(run.subject.id):
            sizes = (peer.peak_rss_bytes, peer.device_peak_bytes, peer.installed_bytes, peer.model_bytes)
            rows.append((peer.subject, peer.title, *map(mib, sizes)))
    head = ("MiB", "side", "peak RSS", "device peak", "packages", "model on disk")
    notes = dict.fromkeys(run.device_memory_note for run in report.runs if run.device_memory_note)
    text = table(head, rows) + f"\n\nPackages of nitro-rt: {report.installed_note}."
    return text + "".join(f" No device peak: {note}." for note in notes)


def _roofline(report: BenchReport) -> str:
    rows, notes = [], []
    for run in report.runs:
        for work in run.work:
            if work.note:
                notes.append(f"{run.subject.id}, {work.stage}: {work.note}.")
            rows.append(
                (
                    run.subject.id,
                    work.stage,
                    "-" if work.flops is None else f"{work.flops / 1e9:,.2f}",
                    "-" if work.io_bytes is None else f"{work.io_bytes / 1e6:,.1f}",
                    ms(work.floor_ms),
                    work.bound or "-",
                    ms(work.operator_floor_ms),
                    ms(work.measured_ms),
                    share(work.achieved_share),
                )
            )
    head = ("subject", "stage", "GFLOP", "MB", "floor ms", "bound by", "operator by operator ms", "measured ms", "achieved")
    return "\n\n".join([ceilings_sentence(report), table(head, rows), *dict.fromkeys(notes)])


def _predictions(report: BenchReport) -> str:
    rows, sources = [], {}
    for run in report.runs:
        for found in run.predictions:
            sources[found.card] = found.source
            cells = [f"{ms(found.floor_ms.get(stage))}" for stage in ("text", "denoise", "decode")]
            rows.append(
                (run.subject.id, found.card, *cells, ms(found.total_ms), ms(found.operator_total_ms), found.note or "-")
            )
    if not rows:
        return ""
    head = ("subject", "card", "text", "denoise", "decode", "in all", "operator by operator", "note")
    told = "\n".join(f"- {card}: {source}." for card, source in sources.items())
    return (
        "**Predictions, not measurements**: the floor in milliseconds that the counted work has at the rates of public data "
        f"sheets, dense. At the clocks that those rates are for, no program reaches it.\n\n{table(head, rows)}\n\n{told}"
    )


def _protocol(report: BenchReport) -> str:
    return "\n".join(f"- {name}: {rule}." for name, rule in report.protocol.rules.items())


def _machine(report: BenchReport) -> str:
    facts = dict(report.machine) | {"commit": report.commit} | {f"package {k}": v for k, v in report.versions.items()}
    facts |= {f"{title}, {key}": value for title, state in _states(report) for key, value in state_facts(state)}
    digests = {f"bundle {run.subject.bundle}": run.subject.digest for run in report.runs}
    return table(("fact", ""), list((facts | digests).items()))


def _states(report: BenchReport) -> tuple[tuple[str, MachineState], ...]:
    return ("before", report.state_before), ("after", report.state_after)


def state_facts(state: MachineState) -> Iterator[tuple[str, str]]:
    """One reading of the machine, for a table."""
    yield "load average", f"{state.load_average:.2f}"
    yield "processor clock", "-" if state.cpu_mhz is None else f"{state.cpu_mhz:.0f} MHz"
    yield "stolen by the hypervisor", "-" if state.stolen_s is None else f"{state.stolen_s:.0f} s since start"
    if state.gpu is None:
        yield "GPU", f"none: {state.reasons['gpu']}"
        return
    gpu = state.gpu
    yield "GPU", f"{gpu.name}, driver {gpu.driver}, {_told(gpu.temperature_c)} C, {mib(gpu.used_memory_bytes)} MiB in use"
    clocks = (_told(clock) for clock in (gpu.sm_clock_mhz, gpu.max_sm_clock_mhz, gpu.memory_clock_mhz))
    yield "GPU clocks", "SM {} of {} MHz, memory {} MHz".format(*clocks)
    yield "GPU power", f"{_told(gpu.power_w)} of {_told(gpu.power_limit_w)} W"
    yield "GPU held down by", "-" if gpu.throttle_reasons is None else ", ".join(gpu.throttle_reasons) or "nothing"


def _told(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


def _pairs(values: dict[str, str]) -> str:
    """`fp32`, or by stage where they differ."""
    different = set(values.values())
    if len(different) == 1:
        return different.pop()
    return ", ".join(f"{stage} {value}" for stage, value in values.items())


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return "\n".join([*lines, *(f"| {' | '.join(map(str, row))} |" for row in rows)])

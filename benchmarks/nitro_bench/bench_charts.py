"""The charts of a benchmark's page, each section's cards as HTML with inline SVG."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape

from nitro_bench import svg
from nitro_bench.bench_markdown import ms, psnr, ratio, share
from nitro_bench.bench_report import ENGINE_STAGES, GRAPH_STAGE, STAGES, BenchReport, ColdStart, Run
from nitro_bench.markup import cards, element, table

MIB = 2**20
START_PARTS = ("interpreter", "import", "load", "capture", "first image", "other")


def latency(report: BenchReport) -> str:
    rows = [
        svg.Series(label=run.subject.id, values=[v for p in run.processes for v in p.total_ms], colour=index)
        for index, run in enumerate(report.runs)
    ]
    return cards(("", svg.distributions(group, "ms", "Distribution of end-to-end times")) for group in _groups(rows))


def _groups(rows: Sequence[svg.Series], factor: float = 4.0) -> Iterator[list[svg.Series]]:
    """Rows that fit one axis: none is more than so many times slower than the fastest of its group."""
    ordered = sorted(rows, key=lambda row: sorted(row.values)[len(row.values) // 2])
    group: list[svg.Series] = []
    for row in ordered:
        middle = sorted(row.values)[len(row.values) // 2]
        if group and (middle > factor * sorted(group[0].values)[len(group[0].values) // 2] or len(group) == 6):
            yield group
            group = []
        group.append(row)
    if group:
        yield group


def waterfall(report: BenchReport) -> str:
    names = _stage_names(report.runs)
    rows = [
        svg.Series(label=run.subject.id, values=[run.summary[name].p50 if name in run.summary else 0.0 for name in names])
        for run in report.runs
    ]
    return cards([("", svg.stacked(rows, names, "ms", "Median time of each stage"))])


def _stage_names(runs: Iterable[Run]) -> list[str]:
    found = {name for run in runs for name in run.summary} - {"total", "outside_engines", "cpu"}
    if GRAPH_STAGE in found:
        found -= set(ENGINE_STAGES)  # they are inside it
    return [*(stage for stage in STAGES if stage in found), *sorted(found - set(STAGES))]


def quality(report: BenchReport) -> str:
    judged = [(index, run) for index, run in enumerate(report.runs) if run.quality.worst_psnr_db is not None]
    dots = [
        svg.Dot(
            label=run.subject.id,
            x=run.summary["total"].p50,
            y=run.quality.worst_psnr_db or 0.0,
            colour=index,
            picture=run.quality.picture_png,
        )
        for index, run in judged
    ]
    charts = [("", svg.plane(dots, "ms", "dB", "Quality against latency"))] if len(dots) > 1 else []
    pictures = "".join(
        f'<figure><img alt="{escape(run.quality.picture_prompt)}" src="{run.quality.picture_png}">'
        f"<figcaption>{escape(run.subject.id)}<br>{_quality_caption(run)}</figcaption></figure>"
        for run in report.runs
    )
    prompts = dict.fromkeys(f"“{run.quality.picture_prompt}”, seed {run.quality.picture_seed}" for run in report.runs)
    return cards([*charts, ("; ".join(prompts), element("div", pictures, "pictures"))])


def _quality_caption(run: Run) -> str:
    quality = run.quality
    if quality.worst_psnr_db is None:
        return escape(quality.note)
    return f"{quality.worst_psnr_db:.1f} dB, {ms(run.summary['total'].p50)} ms"


def peers(report: BenchReport) -> str:
    charts = []
    for run in report.runs:
        timed = [peer for peer in report.timed_peers(run.subject.id) if peer.summary is not None]
        rows = [svg.Series(label="nitro-rt", values=[run.summary["total"].p50])]
        rows += [
            svg.Series(label=peer.title, values=[peer.summary.p50], colour=7) for peer in timed if peer.summary is not None
        ]
        if timed:
            spread = max(row.values[0] for row in rows) / min(row.values[0] for row in rows)
            chart = svg.bars(rows, "ms", f"Median call of every side: {run.subject.id}", log=spread > 30)
            ratios = [(peer.title, ratio(peer.ratio), psnr(peer), str(len(peer.ours_ms))) for peer in timed]
            charts.append((run.subject.id, chart + table(("ours / theirs", "95 % interval", "PSNR dB", "pairs"), ratios)))
    absent = [(f"{peer.title}, {peer.subject}", peer.reason) for peer in report.peers if peer.status != "timed"]
    told = "<details open><summary>Not timed</summary>" + table((), absent, "words") + "</details>" if absent else ""
    return cards(charts) + told


def starts(report: BenchReport) -> str:
    """A card per subject that stands beside peers, and one for all the others."""
    charts, alone = [], []
    for run in report.runs:
        timed = [peer for peer in report.timed_peers(run.subject.id) if peer.cold_start is not None]
        rows = [svg.Series(label=peer.title, values=_start_parts(peer.cold_start)) for peer in timed if peer.cold_start]
        if rows:
            ours = svg.Series(label="nitro-rt", values=_start_parts(run.cold_start))
            charts.append((run.subject.id, _start_chart([ours, *rows])))
        else:
            alone.append(svg.Series(label=run.subject.id, values=_start_parts(run.cold_start)))
    if alone:
        charts.append(("nitro-rt", _start_chart(alone)))
    return cards(charts)


def _start_chart(rows: Sequence[svg.Series]) -> str:
    """Parts that no row has are left out."""
    shown = [index for index in range(len(START_PARTS)) if any(row.values[index] for row in rows)]
    rows = [svg.Series(label=row.label, values=[row.values[index] for index in shown]) for row in rows]
    return svg.stacked(rows, [START_PARTS[index] for index in shown], "s", "Time to the first picture")


def _start_parts(start: ColdStart) -> list[float]:
    parts = [start.start_ms, start.import_ms, start.load_ms, start.capture_ms or 0.0, start.first_image_ms]
    return [part / 1e3 for part in (*parts, max(0.0, start.total_ms - sum(parts)))]


def footprint(report: BenchReport) -> str:
    memory = {run.subject.id: run.peak_rss_bytes for run in report.runs}
    device = {run.subject.id: run.device_peak_bytes for run in report.runs}
    disk = {run.subject.bundle: run.subject.num_bytes for run in report.runs}  # step counts of one bundle share its files
    return cards(
        [
            ("Peak host memory", _sizes("Peak host memory", memory, _of_peers(report, "peak_rss_bytes"))),
            ("Peak device memory", _sizes("Peak device memory", device, _of_peers(report, "device_peak_bytes"))),
            ("Model on disk", _sizes("Model on disk", disk, _of_peers(report, "model_bytes"))),
            (
                "Installed packages",
                _sizes("Installed packages", {"": report.installed_bytes}, _of_peers(report, "installed_bytes")),
            ),
        ]
    )


def _of_peers(report: BenchReport, field: str) -> dict[str, int]:
    """Peer -> the most that it took beside any subject."""
    found: dict[str, int] = {}
    for peer in report.peers:
        value = getattr(peer, field)
        if value is not None:
            found[peer.title] = max(value, found.get(peer.title, 0))
    return found


def _sizes(title: str, ours: Mapping[str, int | None], theirs: Mapping[str, int]) -> str:
    rows = [
        svg.Series(label=f"nitro-rt, {name}" if name else "nitro-rt", values=[value / MIB])
        for name, value in ours.items()
        if value is not None
    ]
    rows += [svg.Series(label=name, values=[value / MIB], colour=7) for name, value in theirs.items()]
    return svg.bars(rows, "MiB", title) if rows else ""


def throughput(report: BenchReport) -> str:
    levels = list(dict.fromkeys(level.num_threads for run in report.runs for level in run.throughput))
    rows = []
    for run in report.runs:
        found = {level.num_threads: f"{level.images_per_s:.3g}" for level in run.throughput}
        rows.append((run.subject.id, *(found.get(level, "-") for level in levels)))
    head = ("images a second", *(f"{level} thread{'s' * (level > 1)}" for level in levels))
    return cards([("", table(head, rows))]) if levels else ""


def roofline(report: BenchReport) -> str:
    rates = {rate.kind: rate.per_s for rate in report.ceilings if rate.per_s}
    bandwidth = rates.pop("copy", None)
    charts = []
    for run in report.runs:
        dots = [
            svg.Dot(
                label=work.stage,
                x=work.flops / work.io_bytes,
                y=work.flops / (work.measured_ms / 1e3),
                colour=index,
            )
            for index, work in enumerate(run.work)
            if work.flops and work.io_bytes and work.measured_ms
        ]
        used = {dtype for work in run.work for dtype in work.flops_by_dtype}
        roofs = {name: rate for name, rate in rates.items() if name in used}
        if dots and roofs and bandwidth:
            rows = [(work.stage, ms(work.floor_ms), ms(work.measured_ms), share(work.achieved_share)) for work in run.work]
            told = table(("stage", "floor ms", "measured ms", "achieved"), rows)
            charts.append((run.subject.id, svg.roofline(dots, roofs, bandwidth, f"Roofline of {run.subject.id}") + told))
    return cards(charts)

"""The report as one HTML page: no script, no file beside it, light and dark, from a phone to a desk."""

from __future__ import annotations

from html import escape
from pathlib import Path

from nitro_bench import bench_charts
from nitro_bench.bench_markdown import busy_note, ceilings_sentence, mib, ms, shown_stages, state_facts
from nitro_bench.bench_report import BenchReport, PeerRun
from nitro_bench.markup import element, table
from nitro_bench.samples import Summary

HEAD = ("ms", "p50", "95 % interval", "p90", "p95", "p99", "mean", "min", "max")
STYLE = Path(__file__).with_name("bench_page.css")
QUALITY_WORDS = (
    "Worst PSNR of the bundle's references against the float32 parent (100 dB: equal). Up and to the left is better."
)
PEER_WORDS = "Same checkpoint, prompt and noise, in turns where nothing else is noted. Below 1, ours is faster."
PREDICTION_WORDS = "Predictions, not measurements: what the counted work takes at least, at the rates of public data sheets."


def html(report: BenchReport) -> str:
    """The page."""
    sections = [
        ("Latency", "Every timed call; the tall mark is the median, the dashed one p95.", bench_charts.latency(report)),
        ("Where the time goes", "Median of each stage.", bench_charts.waterfall(report)),
        ("Quality against latency", QUALITY_WORDS, bench_charts.quality(report)),
        ("Beside peers", PEER_WORDS, bench_charts.peers(report) + _peer_notes(report)),
        ("From nothing to the first picture", "A fresh process, not the first on this machine.", bench_charts.starts(report)),
        ("Footprint", "", bench_charts.footprint(report)),
        ("Throughput", "Images a second when several threads call one pipeline.", bench_charts.throughput(report)),
        ("Roofline", ceilings_sentence(report), bench_charts.roofline(report)),
        ("Predicted floors", PREDICTION_WORDS, _predictions(report)),
        ("All figures", "", _tables(report)),
        ("How it was measured", "", _rules(report)),
    ]
    body = "".join(
        element("section", element("h2", escape(title)) + (element("p", escape(words), "soft") if words else "") + content)
        for title, words, content in sections
        if content
    )
    title = escape(f"{report.name} on {report.device}")
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}, {report.date}</title>'
    style = element("style", STYLE.read_text(encoding="utf-8"))
    top = element("h1", title) + element("p", _subtitle(report), "soft") + _busy(report) + _tiles(report)
    page = element("head", head + style) + element("body", element("main", top + body))
    return f'<!doctype html><html lang="en">{page}</html>\n'


def _subtitle(report: BenchReport) -> str:
    place = report.machine
    return escape(f"{report.date}; {place['cpu']}, {place['cores']} cores, {place['memory_gib']} GiB; commit {report.commit}")


def _busy(report: BenchReport) -> str:
    note = busy_note(report).replace("**", "").strip()
    return f'<p class="warn">{escape(note)}</p>' if note else ""


def _tiles(report: BenchReport) -> str:
    best = min(report.runs, key=lambda run: run.summary["total"].p50)
    start = min(report.runs, key=lambda run: run.cold_start.total_ms)
    tiles = [
        (f"{ms(best.summary['total'].p50)} ms", "median call, end to end", best.subject.id),
        (f"{start.cold_start.total_ms / 1e3:.2f} s", "process start to first picture", start.subject.id),
        (f"{mib(best.peak_rss_bytes)} MiB", "peak host memory", best.subject.id),
        (f"{best.outside_share:.1%}", "of a call outside the engines", best.subject.id),
    ]
    ratios = [peer for peer in report.peers if peer.ratio is not None]
    if ratios:
        peer = max((p for p in ratios if p.subject == best.subject.id), key=_ratio_of, default=max(ratios, key=_ratio_of))
        tiles.append((f"{_ratio_of(peer):.3f}x", f"the time of {peer.title}", peer.subject))
    found = [
        element("div", f"{element('b', escape(figure))}{escape(what)}<br>{element('small', escape(whose))}", "card tile")
        for figure, what, whose in tiles
    ]
    return element("div", "".join(found), "tiles")


def _ratio_of(peer: PeerRun) -> float:
    return peer.ratio.median if peer.ratio else 0.0


def _peer_notes(report: BenchReport) -> str:
    notes = dict.fromkeys((peer.title, note) for peer in report.peers if peer.status == "timed" for note in peer.notes)
    return element("div", table((), notes, "words"), "card") if notes else ""


def _predictions(report: BenchReport) -> str:
    rows = [
        (run.subject.id, found.card, ms(found.total_ms), ms(found.operator_total_ms), found.note or found.source)
        for run in report.runs
        for found in run.predictions
    ]
    head = ("subject", "card", "floor ms", "operator by operator ms", "source")
    return element("div", table(head, rows, "wrap"), "card") if rows else ""


def _tables(report: BenchReport) -> str:
    parts = []
    for run in report.runs:
        total = run.summary["total"]
        rows = [_figures(stage.replace("_", " "), figures) for stage, figures in shown_stages(run)]
        reasons = "; ".join(f"{name} {why}" for name, why in total.reasons.items() if name.startswith("p9"))
        title = f"{run.subject.id}: {total.num_samples} calls in {len(run.processes)} processes"
        missing = element("p", escape(f"Not reported: {reasons}."), "soft") if reasons else ""
        parts.append(element("details", element("summary", escape(title)) + table(HEAD, rows) + missing))
    return "".join(parts)


def _figures(name: str, figures: Summary) -> tuple[str, ...]:
    interval = "-" if figures.p50_low is None else f"{ms(figures.p50_low)} to {ms(figures.p50_high)}"
    rest = map(ms, (figures.p90, figures.p95, figures.p99, figures.mean, figures.min, figures.max))
    return (name, ms(figures.p50), interval, *rest)


def _rules(report: BenchReport) -> str:
    facts = [*report.protocol.rules.items(), *report.machine.items(), *report.versions.items()]
    facts += [(f"before: {key}", value) for key, value in state_facts(report.state_before)]
    facts += [(f"after: {key}", value) for key, value in state_facts(report.state_after)]
    facts += [(f"bundle {run.subject.bundle}", f"sha256 {run.subject.digest}") for run in report.runs]
    rows = list(dict(facts).items())
    return element("code", escape(report.command)) + element("div", table((), rows, "words"), "card")

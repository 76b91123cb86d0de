"""The result of `export`, as JSON and as Markdown."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

from nitro_bench.export_plan import OUR_SIDES

GIB = 2**30
INT8_GOAL, FLOAT_GOAL = 0.55, 0.95
"""Our time over the best peer's, at most. INT8's is promised on processors that multiply 8-bit numbers natively."""
NATIVE_INT8 = ("amx_int8", "avx512_vnni", "avx_vnni")


def multiplies_natively(cpu_features: str) -> bool:
    """Whether a processor has instructions for 8-bit numbers; without, they saturate at 16 bits and gain little."""
    return any(name in cpu_features for name in NATIVE_INT8)


@dataclass(frozen=True, kw_only=True)
class Latency:
    """One stage on one side: medians over all calls of all its processes."""

    side: str
    wall_s: float
    cpu_s: float
    sqnr_db: float
    peak_rss_bytes: int
    wall_s_by_round: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """All measurements that are there, with all that is needed to repeat them."""

    command: str
    commit: str
    date: str
    machine: dict[str, str]
    sizes: tuple[str, ...]
    weight_bits: int
    num_prompts: int
    missing: tuple[str, ...]
    """Planned and not made."""
    results: dict[str, dict[str, Any]]
    """Measurement -> what its process answered, or `failed` with the reason."""

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2, sort_keys=True) + "\n"

    def whole(self, size: str, kind: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """The measurements `<size>/<kind>...` that succeeded, by the rest of their names."""
        prefix = f"{size}/{kind}"
        for name, result in self.results.items():
            if name.startswith(prefix) and "failed" not in result:
                yield name.removeprefix(f"{size}/"), result

    def latencies(self) -> dict[tuple[str, int, str], list[Latency]]:
        """(size, px, stage) -> its sides."""
        calls: dict[tuple[str, int, str], dict[str, list[dict[str, Any]]]] = {}
        for size in self.sizes:
            for name, result in self.whole(size, "latency@"):
                px, stage, side, _ = name.removeprefix("latency@").split("/")
                calls.setdefault((size, int(px), stage), {}).setdefault(side, []).append(result)
        return {key: [_latency(side, found) for side, found in sides.items()] for key, sides in calls.items()}


def _latency(side: str, results: list[dict[str, Any]]) -> Latency:
    return Latency(
        side=side,
        wall_s=median(value for result in results for value in result["wall_s"]),
        cpu_s=median(value for result in results for value in result["cpu_s"]),
        sqnr_db=min(result["sqnr_db"] for result in results),
        peak_rss_bytes=max(result["peak_rss_bytes"] for result in results),
        wall_s_by_round=tuple(median(result["wall_s"]) for result in results),
    )


def ratios(sides: list[Latency]) -> dict[str, float]:
    """Our sides -> their time over the fastest peer's; empty where no peer was timed."""
    peers = [side.wall_s for side in sides if side.side not in OUR_SIDES]
    return {side.side: side.wall_s / min(peers) for side in sides if side.side in OUR_SIDES} if peers else {}


def markdown(report: ExportReport) -> str:
    """A page with the tables, how they were measured, and what is not in them."""
    facts = "\n".join(f"| {key} | {value} |" for key, value in (report.machine | {"commit": report.commit}).items())
    return f"""# Export, quantisation, build and speed at SDXL's size, {report.date}

Checkpoints: `nitro_bench.synthetic`, seeded random weights of SDXL base 1.0's exact architecture in float16 (`full`, 2.57 B
parameters in the UNet, 1024 px), with half its widths (`half`, 0.64 B, 512 px), and of a few MB (`tiny`, 64 px: it shows that
a way can be gone and what it refuses, not what it costs). Each figure is of a process of its own.
Processor seconds count all threads; on a machine with other work they change less than wall-clock seconds.
{_dates(report)}{_busy_note(report)}
## What it costs

{_costs(report)}

GiB are peak resident memory of the process, mapped files included; "new on disk" leaves out files that are hard links to the
checkpoint's own. Ours writes the three stages of one bundle with the schedule inside; `torch.onnx.export` one network from a
loaded module; optimum two text encoders, the UNet and both halves of the VAE, in float32, since it runs what it traces and a
CPU without float16 arithmetic takes hours for that.

{_refusals(report)}

{_parts(report)}

## How near to float32

{_quality(report)}

SQNR of each stage alone, on the float32 parent's own inputs; PSNR and SSIM of the whole image against the parent's, worst of
the images. "as written" computes every operator as the graph says (ONNX Runtime without optimisations); "openvino" is what
this processor's kernels make of it.

## One step

{_speed(report)}

Seconds per call, batch 1, medians; before it was timed, each side's output was compared with the float32 parent's (SQNR). The
ratio is to the fastest peer, which is diffusers, eager or compiled: OpenVINO and ONNX Runtime run our graphs, as bundles for a
CPU do. (No other exporter's graph of `full`'s UNet runs on ONNX Runtime here: torch's is refused, optimum's is not to be had.)
diffusers with channels last. A processor without BF16 instructions runs diffusers fastest in float32, which is then its side
here.

{_goals(report)}

## What is not here

{_absent(report)}

    {report.command}

| machine | |
|---|---|
{facts}
"""


_TITLES = {
    "checkpoint": "making the checkpoint",
    "export/nitro-rt": "export, nitro-rt",
    "export/torch": "export, torch.onnx.export(dynamo)",
    "export/optimum-fp32": "export, optimum fp32",
    "calibrate": "calibration",
    "quantise": "quantised graphs",
    "build": "build",
}


def _costs(report: ExportReport) -> str:
    lines = ["| checkpoint | what | s | processor s | GiB | on disk GB | new on disk GB |", "|---|---|---|---|---|---|---|"]
    for size in report.sizes:
        for prefix, title in _TITLES.items():
            for name, result in report.whole(size, prefix):
                rest = name.removeprefix(prefix).strip("-/")
                shared = result.get("num_bytes_unshared", result["num_bytes"])
                cells = [size, f"{title} {rest}".strip(), f"{result['seconds']:.0f}", f"{result['cpu_seconds']:.0f}"]
                cells += [f"{result['peak_rss_bytes'] / GIB:.2f}", f"{result['num_bytes'] / 1e9:.2f}", f"{shared / 1e9:.2f}"]
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _refusals(report: ExportReport) -> str:
    """A graph that no runtime takes was cheap for nothing."""
    refused = [(name, result.get("refused_by_onnxruntime")) for name, result in report.results.items()]
    return "\n".join(f"- {name} made a graph that ONNX Runtime refuses: {said}" for name, said in refused if said)


def _parts(report: ExportReport) -> str:
    """The stages inside one process, where the job says when each ended."""
    lines = ["| checkpoint | what | stage | s | processor s | GiB |", "|---|---|---|---|---|---|"]
    for size in report.sizes:
        for kind in ("export/nitro-rt", "calibrate", "quantise", "build"):
            for name, result in report.whole(size, kind):
                for stage, part in stages(result["marks"]).items():
                    cells = [size, name, stage, f"{part['seconds']:.1f}", f"{part['cpu_seconds']:.1f}"]
                    lines.append(f"| {' | '.join(cells)} | {part['peak_rss_bytes'] / GIB:.2f} |")
    return "\n".join(lines)


def stages(marks: list[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Spans that a job reported, added up by the word before the colon of its lines; spans under half a second left out."""
    parts: dict[str, dict[str, float]] = {}
    for mark in marks:
        part = parts.setdefault(mark["name"].partition(":")[0].strip()[:60], {})
        for key in ("seconds", "cpu_seconds"):
            part[key] = part.get(key, 0.0) + mark[key]
        part["peak_rss_bytes"] = max(part.get("peak_rss_bytes", 0), mark["peak_rss_bytes"])
    return {name: part for name, part in parts.items() if part["seconds"] >= 0.5}


def _quality(report: ExportReport) -> str:
    head = "| checkpoint | precision | computed by | UNet SQNR dB | decoder SQNR dB | image PSNR dB | image SSIM |"
    lines = [head, "|---|---|---|---|---|---|---|"]
    for size in report.sizes:
        for name, result in report.whole(size, "quality/"):
            _, precision, side = name.split("/")
            figures = [f"{min(result[key]):.1f}" for key in ("denoise_sqnr_db", "decode_sqnr_db", "image_psnr_db")]
            cells = [
                size,
                precision,
                side.replace("onnxruntime-as-written", "as written"),
                *figures,
                f"{min(result['image_ssim']):.4f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _speed(report: ExportReport) -> str:
    lines = [
        "| checkpoint | px | stage | side | s | by round | processor s | SQNR dB | GiB | to the best peer |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (size, px, stage), sides in report.latencies().items():
        found = ratios(sides)
        for side in sides:
            rounds = ", ".join(f"{value:.2f}" for value in side.wall_s_by_round)
            cells = [size, str(px), stage, side.side, f"{side.wall_s:.2f}", rounds, f"{side.cpu_s:.1f}", f"{side.sqnr_db:.1f}"]
            ratio = f"{found[side.side]:.2f}" if side.side in found else ""
            lines.append(f"| {' | '.join(cells)} | {side.peak_rss_bytes / GIB:.2f} | {ratio} |")
    return "\n".join(lines)


def _goals(report: ExportReport) -> str:
    native = multiplies_natively(report.machine["cpu_features"])
    lines = []
    for (size, px, stage), sides in report.latencies().items():
        for side, ratio in ratios(sides).items():
            if size == "tiny":  # milliseconds, of which most are the call
                continue
            goal = INT8_GOAL if side.endswith("int8") else FLOAT_GOAL
            verdict = "met" if ratio <= goal else "missed"
            if verdict == "missed" and side.endswith("int8") and not native:
                verdict += "; promised only with AMX or VNNI, which this processor has not"
            lines.append(f"- {size}, {px} px, {stage}, {side}: {ratio:.2f} of the best peer, goal {goal}: {verdict}")
    return "\n".join(lines) or "No goal can be judged: nothing was timed beside a peer at half or full size."


def _dates(report: ExportReport) -> str:
    """Pieces are kept, so a report may hold measurements of several days and commits; the JSON has those of each."""
    days = sorted({result["date"][:10] for result in report.results.values() if "date" in result})
    return f"Measured from {days[0]} to {days[-1]}.\n" if len(days) > 1 else ""


def _busy_note(report: ExportReport) -> str:
    """A warning where something else had the processors when measurements began."""
    loads = [float(result["load_average"]) for result in report.results.values() if "load_average" in result]
    cores = float(report.machine["cores"])
    busy = sum(load > 0.5 * cores for load in loads)
    if not busy:
        return ""
    return f"""
**The machine was busy** when {busy} of {len(loads)} measurements began (load {min(loads):.1f} to {max(loads):.1f} on
{cores:.0f} cores; that of the measurement just before is in it): wall-clock seconds are too long, and by how much differs. Of
speeds believe the ratios of sides that ran in turns, and those with care; of costs the processor seconds and the memory.
"""


def _absent(report: ExportReport) -> str:
    lines = [f"- {name}: {result['failed']}" for name, result in report.results.items() if "failed" in result]
    lines += [f"- {name}: not made" for name in _grouped(report.missing)]
    return "\n".join(lines) or "Nothing: all that was planned was measured."


def _grouped(names: tuple[str, ...]) -> Iterator[str]:
    """Latencies of one size and stage in one line each."""
    groups: dict[str, int] = {}
    for name in names:
        group = "/".join([*name.split("/")[:3], "..."]) if "/latency@" in name else name
        groups[group] = groups.get(group, 0) + 1
    for group, count in groups.items():
        yield f"{group} ({count} of them)" if count > 1 else group

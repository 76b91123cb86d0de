"""The result of `training`, as JSON and as Markdown."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

PEER = "ladd"


@dataclass(frozen=True, kw_only=True)
class Case:
    """A loop at a batch size."""

    loop: str
    """`ladd` (the peer), `one-task` (a pool for the peer's one task), or `pool`."""
    heads_per_cell: int
    batch: int

    def __str__(self) -> str:
        size = "" if self.loop == PEER else f", {self.heads_per_cell} heads per cell"
        return f"{self.loop}{size}, batch {self.batch}"


@dataclass(frozen=True, kw_only=True)
class Row:
    """What was measured of a case, over all its processes."""

    case: Case
    num_heads: int
    heads_mb: float
    """All heads' weights, float32. Once every head has learnt, its moments take twice as much again, on the host."""
    num_iterations: int
    wall_ms: float
    """Median time of an iteration."""
    wall_ms_p10: float
    wall_ms_p90: float
    wall_ms_by_round: tuple[float, ...]
    """Each process's median."""
    cpu_ms: float
    """Median processor time of an iteration, all threads; a busy machine changes it least."""
    peak_rss_mb: float
    """Largest of the processes."""
    cuda_peak_mb: float | None
    """What torch had in use on the GPU at most; None without one."""
    samples: tuple[dict[str, Any], ...]
    """Every process's raw times."""

    @property
    def per_second(self) -> float:
        return 1e3 / self.wall_ms


def row_of(case: Case, samples: Sequence[dict[str, Any]]) -> Row:
    """The figures of a case from what its processes measured."""
    wall = [value for sample in samples for value in sample["wall_ms"]]
    cuda = [sample["cuda_peak_bytes"] for sample in samples if sample["cuda_peak_bytes"] is not None]
    return Row(
        case=case,
        num_heads=samples[0]["num_heads"],
        heads_mb=round(samples[0]["heads_bytes"] / 1e6, 1),
        num_iterations=len(wall),
        wall_ms=round(median(wall), 2),
        wall_ms_p10=round(float(np.percentile(wall, 10)), 2),
        wall_ms_p90=round(float(np.percentile(wall, 90)), 2),
        wall_ms_by_round=tuple(round(median(sample["wall_ms"]), 2) for sample in samples),
        cpu_ms=round(median(value for sample in samples for value in sample["cpu_ms"]), 2),
        peak_rss_mb=round(max(sample["peak_rss_bytes"] for sample in samples) / 1e6, 1),
        cuda_peak_mb=round(max(cuda) / 1e6, 1) if cuda else None,
        samples=tuple({key: [round(v, 2) for v in sample[key]] for key in ("wall_ms", "cpu_ms")} for sample in samples),
    )


@dataclass(frozen=True, kw_only=True)
class TrainingReport:
    """One measurement with all that is needed to repeat it."""

    command: str
    commit: str
    date: str
    machine: dict[str, str]
    device: str
    num_threads: int
    versions: dict[str, str]
    model: str
    student_parameters: int
    size_px: int
    channels: tuple[int, ...]
    rounds: int
    num_warmup: int
    rows: tuple[Row, ...]

    @property
    def device_slug(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", self.device.lower()).strip("-")

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2, sort_keys=True) + "\n"

    def peer_of(self, row: Row) -> Row:
        """The peer at the same batch."""
        return next(other for other in self.rows if other.case.loop == PEER and other.case.batch == row.case.batch)


def markdown(report: TrainingReport) -> str:
    """A page with the tables, how they were measured, and what is not in them."""
    has_cuda = any(row.cuda_peak_mb is not None for row in report.rows)
    facts = "\n".join(f"| {key} | {value} |" for key, value in _facts(report).items())
    student = f"{report.student_parameters / 1e6:.1f} M parameters (random weights, widths {_joined(report.channels)})"
    size = f"{report.size_px}x{report.size_px} pixels ({report.size_px // 8}x{report.size_px // 8} latents)"
    return f"""# Training: the pool beside a plain LADD loop, {report.model}'s shape, {report.date}

A student of {student}, {size}, samples in memory,
one micro-batch per iteration. Device: {report.device}.

- **LADD**: one fixed head for each of ten feature levels, the whole latents with the prompt, hinge; no pool.
- **one task**: our stage with a pool for that one task: the same passes through backbone and heads as LADD, so the ratio is
  what drawing, renewing and keeping a pool costs.
- **full**: all three tasks; the ratio holds two more backbone passes of real and fake (crops of half the side) and 20 more
  heads in each iteration.

{_table(report, has_cuda)}

Ratios are of median times at the same batch; in brackets the smallest and largest ratio of {report.rounds} rounds.

## Is it flat?

{_flatness(report, has_cuda)}
{_busy_note(report.machine)}
Each loop and batch ran in {report.rounds} processes of its own, in turns, each with {report.num_warmup} iterations first
that are not counted. In the time of an iteration: drawing samples from memory, student, discriminator, both optimisers,
renewing heads. Not in it: the teacher, reading a cache, text encoders, logs, checkpoints. Before timing, every process
checked that the losses are finite, that the student has changed, and that exactly those heads have changed that judged or
were renewed. Memory is the whole process with its libraries, until the end of the timed iterations.

    {report.command}

| machine | |
|---|---|
{facts}
"""


def _table(report: TrainingReport, has_cuda: bool) -> str:
    memory = "peak RSS MB | GPU MB |" if has_cuda else "peak RSS MB |"
    lines = [
        f"| batch | loop | heads | ms (p10-p90) | processor ms | iterations/s | time / LADD | {memory}",
        "|---|---|---|---|---|---|---|---|" + ("---|" if has_cuda else ""),
    ]
    for row in report.rows:
        cells = [
            str(row.case.batch),
            _name(row.case),
            f"{row.num_heads:,}",
            f"{row.wall_ms:.0f} ({row.wall_ms_p10:.0f}-{row.wall_ms_p90:.0f})",
            f"{row.cpu_ms:.0f}",
            f"{row.per_second:.2f}",
            "1" if row.case.loop == PEER else _ratio(row, report.peer_of(row)),
            f"{row.peak_rss_mb:.0f}",
        ]
        lines.append(f"| {' | '.join([*cells, f'{row.cuda_peak_mb:.0f}'] if row.cuda_peak_mb is not None else cells)} |")
    return "\n".join(lines)


def _flatness(report: TrainingReport, has_cuda: bool) -> str:
    """The largest pool against the smallest, by batch."""
    lines = []
    for batch in dict.fromkeys(row.case.batch for row in report.rows):
        pools = sorted((r for r in report.rows if r.case.loop == "pool" and r.case.batch == batch), key=lambda r: r.num_heads)
        small, large = pools[0], pools[-1]
        if small is large:
            continue
        line = f"- batch {batch}: {large.num_heads:,} heads take {_ratio(large, small)} times the time of {small.num_heads:,}"
        line += f", and {large.peak_rss_mb - small.peak_rss_mb:+.0f} MB of host memory"
        if has_cuda and large.cuda_peak_mb is not None and small.cuda_peak_mb is not None:
            line += f", {large.cuda_peak_mb - small.cuda_peak_mb:+.1f} MB of GPU memory"
        lines.append(line + ".")
    if not lines:
        return "One pool size was measured."
    biggest = max(report.rows, key=lambda row: row.num_heads)
    where = "which is where heads rest" if has_cuda else "which here is the device's own"
    lines.append(
        f"\nThe weights of {biggest.num_heads:,} heads are {biggest.heads_mb:.0f} MB of host memory, {where}; the moments of "
        f"those that have learnt come on top, at most {2 * biggest.heads_mb:.0f} MB."
    )
    return "\n".join(lines)


def _name(case: Case) -> str:
    return {PEER: "LADD", "one-task": "one task", "pool": "full"}[case.loop]


def _ratio(row: Row, other: Row) -> str:
    by_round = [mine / theirs for mine, theirs in zip(row.wall_ms_by_round, other.wall_ms_by_round, strict=True)]
    return f"{row.wall_ms / other.wall_ms:.2f} ({min(by_round):.2f}-{max(by_round):.2f})"


def _facts(report: TrainingReport) -> dict[str, str]:
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    return {**report.machine, "threads": str(report.num_threads), "versions": versions, "commit": report.commit}


def _joined(values: Sequence[int]) -> str:
    return "/".join(map(str, values))


def _busy_note(machine: dict[str, str]) -> str:
    """A warning where something else had the processors."""
    load = float(machine["load_average"].split()[0])
    if load < 0.5 * float(machine["cores"]):
        return ""
    return f"""
**The machine was busy** (load {load:.1f} on {machine["cores"]} cores before the start): times are too long. Ratios suffer less,
since the loops took turns, and processor times least; measure again on an idle machine before quoting any.
"""

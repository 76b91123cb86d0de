"""The result of `lean`, as JSON and as Markdown."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Side:
    """One of the two installations; times and memory are medians over the rounds."""

    version: str
    num_packages: int
    installed_mb: float
    model_mb: float
    """The bundle, or the checkpoint."""
    import_ms: float
    import_pipeline_ms: float
    """With the pipeline class, which both packages load on demand."""
    first_image_s: float
    """From before the process exists to the image in memory."""
    first_image_cpu_s: float
    """Processor time of the process until then, all threads; a busy machine changes it least."""
    peak_rss_mb: float
    """Until the first image."""
    image_ms: float
    """An image after the first, in the same process."""
    packages: dict[str, str]
    samples: tuple[dict[str, Any], ...]
    """Every round's raw figures."""


@dataclass(frozen=True, kw_only=True)
class LeanReport:
    """One measurement with all that is needed to repeat it."""

    command: str
    commit: str
    date: str
    machine: dict[str, str]
    model: str
    size_px: int
    backend: str
    compute_dtype: str
    prompt: str
    seed: int
    steps: int
    num_rounds: int
    psnr_db: float | None
    """The bundle's image against diffusers'; None where they are equal."""
    nitro_rt: Side
    diffusers: Side

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2, sort_keys=True) + "\n"


_ROWS = (
    ("packages", "num_packages", "{:d}"),
    ("installed MB", "installed_mb", "{:.0f}"),
    ("model MB on disk (bundle, checkpoint)", "model_mb", "{:.1f}"),
    ("`import` of the package (loads on demand), ms", "import_ms", "{:.1f}"),
    ("`import` of the pipeline class, ms", "import_pipeline_ms", "{:.0f}"),
    ("process start to first image, s", "first_image_s", "{:.2f}"),
    ("of it processor time, all threads, s", "first_image_cpu_s", "{:.2f}"),
    ("peak RSS to the first image, MB", "peak_rss_mb", "{:.0f}"),
    ("an image after the first, ms", "image_ms", "{:.1f}"),
)


def markdown(report: LeanReport) -> str:
    """A page with the table, how it was measured, and what is not in it."""
    ours, theirs = report.nitro_rt, report.diffusers
    rows = []
    for title, field, form in _ROWS:
        left, right = getattr(ours, field), getattr(theirs, field)
        rows.append(f"| {title} | {form.format(left)} | {form.format(right)} | {_ratio(left, right)} |")
    facts = "\n".join(f"| {key} | {value} |" for key, value in report.machine.items())
    agree = "are equal" if report.psnr_db is None else f"agree to {report.psnr_db:.1f} dB"
    steps = "one step" if report.steps == 1 else f"{report.steps} steps"
    return f"""# Lean: nitro-rt beside diffusers, {report.model}, {report.date}

Same checkpoint, prompt ("{report.prompt}"), seed ({report.seed}), {steps}, {report.size_px}x{report.size_px}.
The two images {agree}. Backend: {report.backend}, computing in {report.compute_dtype}; diffusers in float32.

| | nitro-rt {ours.version} | diffusers {theirs.version} | diffusers / nitro-rt |
|---|---|---|---|
{chr(10).join(rows)}
{_busy_note(report.machine)}
Medians of {report.num_rounds} processes per side, in turns, after one of each that is not counted: files and bytecode are warm,
and what OpenVINO compiled is kept.
nitro-rt: a fresh environment with the wheel of `nitro-rt[cpu]` only. diffusers: the packages that `diffusers[torch]` and
`transformers` need (torch {theirs.packages.get("torch", "?")}), counted by their dependencies. Not in it: building the
bundle, cold files, a GPU.

    {report.command}

| machine | |
|---|---|
{facts}
| commit | {report.commit} |
"""


def _ratio(ours: float, theirs: float) -> str:
    if not ours:
        return "-"
    return f"{theirs / ours:.0f}" if theirs / ours >= 100 else f"{theirs / ours:.1f}"


def _busy_note(machine: dict[str, str]) -> str:
    """A warning where something else had the processors: wall-clock times are then no measure of the two sides."""
    load = float(machine["load_average"].split()[0])
    if load < 0.5 * float(machine["cores"]):
        return ""
    return f"""
**The machine was busy** (load {load:.1f} on {machine["cores"]} cores before the start): wall-clock times are too long, and
by how much differs from round to round. Measure again on an idle machine before quoting them.
"""

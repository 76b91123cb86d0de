"""`nitro-rt bench-compare OLD.json NEW.json`: is the new one slower?

Two runs of the same program differ: by the processes' luck, and by what else the machine did in those minutes. So each stage is
compared over processes (`intervals`), as measured and relative to the yardstick that was timed between the images, and the
wider of the two intervals counts. The whole call is also compared by its processor time, relative to the yardstick's, which
another load disturbs least. It is slower where with 95 % confidence the wall clock says so, or the processor time does and the
wall clock does not rule it out.
"""

from __future__ import annotations

import functools
import json
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from nitro_bench import schema
from nitro_bench.bench_report import KIND, SCHEMA_VERSION, STAGES, BenchReport, Process, Run
from nitro_bench.intervals import MIN_PROCESSES, NUM_BATCHES, Change, batch_logs, welch
from nitro_rt.errors import ConfigError, ModelNotFound

MAX_SLOWDOWN = 0.05
JUDGED_SHARE = 0.10
"""Stages with a smaller share of the call are shown and not judged: their noise is larger than what they cost."""
SAME_MACHINE = ("cpu", "cores")
Values = Callable[[Process], Sequence[float]]
"""One quantity of a process's images, or of its yardstick."""
SLOWER, FASTER, SAME, UNDECIDED, NOT_JUDGED = "slower", "faster", "same", "undecided", "not judged"


@dataclass(frozen=True, kw_only=True)
class Line:
    """One stage of one subject."""

    subject: str
    stage: str
    old_ms: float
    """Median over all images, as measured."""
    new_ms: float
    wall: Change
    """As measured; the interval holds the one relative to the yardstick too."""
    cpu: Change | None
    """Processor time relative to the yardstick's; of the whole call only, and on a processor only."""
    verdict: str


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two reports, stage by stage."""

    lines: tuple[Line, ...]
    notes: tuple[str, ...]
    """What else differs, and what could not be compared."""
    max_slowdown: float

    @property
    def slower(self) -> tuple[Line, ...]:
        return tuple(line for line in self.lines if line.verdict == SLOWER)


def read_report(path: Path) -> BenchReport:
    """A report's JSON. Raises: ModelNotFound; ConfigError for what is no report, or one of another schema version."""
    if not path.is_file():
        raise ModelNotFound(f"there is no file {path}; make one: nitro-rt bench BUNDLE --json {path}")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as exc:
        raise ConfigError(f"{path} is no JSON: {exc}; make it again: nitro-rt bench BUNDLE --json FILE") from exc
    if not isinstance(data, dict) or data.get("kind") != KIND:
        raise ConfigError(f"{path} is no report of nitro-rt bench; make one: nitro-rt bench BUNDLE --json FILE")
    if data.get("schema_version") != SCHEMA_VERSION:
        raise ConfigError(
            f"{path} has schema version {data.get('schema_version')!r}, this nitro-rt reads {SCHEMA_VERSION}; measure again, "
            "or compare with the version that wrote it"
        )
    try:
        return schema.read(BenchReport, data, "report")
    except schema.Misfit as exc:
        raise ConfigError(f"{path}: {exc}; it was edited or cut, measure again") from exc


def compare(old: BenchReport, new: BenchReport, max_slowdown: float = MAX_SLOWDOWN) -> Comparison:
    """Compare what both reports timed.

    Raises: ConfigError for another machine, no common subject, or too few images.
    """
    require_same_machine(old, new)
    olds, news = ({_key(run): run for run in report.runs} for report in (old, new))
    common = [key for key in olds if key in news]
    if not common:
        listed = [", ".join(run.subject.id for run in report.runs) for report in (old, new)]
        raise ConfigError(
            f"the reports have no subject in common: the old one timed {listed[0]}, the new one {listed[1]}; model, backend, "
            "precision, steps, size and batch must agree"
        )
    lines = [line for key in common for line in _lines(olds[key], news[key], max_slowdown, on_cpu=old.device == "cpu")]
    return Comparison(lines=tuple(lines), notes=tuple(_notes(old, new, olds, news)), max_slowdown=max_slowdown)


def require_same_machine(old: BenchReport, new: BenchReport) -> None:
    """Raises: ConfigError naming what differs."""
    places = [
        {name: report.machine.get(name, "?") for name in SAME_MACHINE} | {"device": report.device} for report in (old, new)
    ]
    for name, value in places[0].items():
        if value != places[1][name]:
            raise ConfigError(
                f"the reports are of different machines: {name} is {value!r} in the old and {places[1][name]!r} in the new; "
                "times of two machines say nothing about a change, measure both on one"
            )


def sentences(comparison: Comparison) -> Iterator[str]:
    """A line per stage, the notes, and the verdict."""
    for line in comparison.lines:
        cpu = "" if line.cpu is None else f", processor {interval(line.cpu)}"
        times = f"{line.old_ms:.2f} -> {line.new_ms:.2f} ms"
        yield f"{line.verdict:<11}{line.subject}, {line.stage}: {times}, {interval(line.wall)}{cpu}"
    for note in comparison.notes:
        yield f"note       {note}"
    allowed = f"{comparison.max_slowdown:.0%}"
    if comparison.slower:
        yield f"REGRESSION: {len(comparison.slower)} of {len(comparison.lines)} lines are slower by more than {allowed}"
    elif any(line.verdict == UNDECIDED for line in comparison.lines):
        widest = max(_width(line) for line in comparison.lines if line.verdict == UNDECIDED)
        yield (
            f"no regression was shown, nor ruled out: less than about {math.sqrt(widest) - 1:.0%} cannot be told from this "
            "machine's noise; more processes (--processes), two bundles in turns or an idle machine say more"
        )
    else:
        yield f"no regression: nothing is slower by more than {allowed}"


def _width(line: Line) -> float:
    """Of the narrower of its intervals, as a ratio."""
    return min(look.high / look.low for look in (line.wall, line.cpu) if look is not None)


def interval(change: Change) -> str:
    return f"x{change.ratio:.3f} [{change.low:.3f}, {change.high:.3f}]"


def wider(measured: Change, relative: Change) -> Change:
    """Both readings at once: a machine that was slower, and a yardstick that was unlucky, must not make a regression."""
    return Change(ratio=measured.ratio, low=min(measured.low, relative.low), high=max(measured.high, relative.high))


def verdict_of(wall: Change, cpu: Change | None, max_slowdown: float) -> str:
    """What two looks at the same change say together."""
    limit = 1 + max_slowdown
    looks = [wall] if cpu is None else [wall, cpu]
    if wall.low > limit or (wall.high > limit and any(look.low > limit for look in looks)):
        return SLOWER
    if all(look.high < 1 / limit for look in looks):
        return FASTER
    return SAME if any(look.high < limit for look in looks) else UNDECIDED


def _lines(old: Run, new: Run, max_slowdown: float, *, on_cpu: bool) -> Iterator[Line]:
    for stage in (*(stage for stage in _ordered(old) if stage in new.summary), "total"):
        wall = _change(old, new, functools.partial(_wall_ms, stage=stage), None)
        if on_cpu:
            wall = wider(wall, _change(old, new, functools.partial(_wall_ms, stage=stage), _stick_ms))
        cpu = _change(old, new, _cpu_ms, _stick_cpu_ms) if stage == "total" and on_cpu else None
        share = old.summary[stage].p50 / old.summary["total"].p50
        yield Line(
            subject=new.subject.id,
            stage=stage,
            old_ms=old.summary[stage].p50,
            new_ms=new.summary[stage].p50,
            wall=wall,
            cpu=cpu,
            verdict=verdict_of(wall, cpu, max_slowdown) if share >= JUDGED_SHARE else NOT_JUDGED,
        )


def _ordered(run: Run) -> list[str]:
    timed = set(run.processes[0].stages_ms)
    return [*(stage for stage in STAGES if stage in timed), *sorted(timed - set(STAGES))]


def _wall_ms(process: Process, stage: str) -> Sequence[float]:
    return process.total_ms if stage == "total" else process.stages_ms[stage]


def _cpu_ms(process: Process) -> Sequence[float]:
    return process.cpu_ms


def _stick_ms(process: Process) -> Sequence[float]:
    return process.yardstick_ms


def _stick_cpu_ms(process: Process) -> Sequence[float]:
    return process.yardstick_cpu_ms


def _change(old: Run, new: Run, values_of: Values, sticks_of: Values | None) -> Change:
    """Compare two runs by one quantity, as measured or relative to the yardstick's."""
    by_process = min(len(old.processes), len(new.processes)) >= MIN_PROCESSES
    logs = _process_logs if by_process else _batch_logs
    return welch(logs(old, values_of, sticks_of), logs(new, values_of, sticks_of))


def _process_logs(run: Run, values_of: Values, sticks_of: Values | None) -> list[float]:
    found = [math.log(statistics.median(values_of(process))) for process in run.processes]
    if sticks_of is None:
        return found
    return [log - math.log(statistics.median(sticks_of(p))) for log, p in zip(found, run.processes, strict=True)]


def _batch_logs(run: Run, values_of: Values, sticks_of: Values | None) -> list[float]:
    values = [value for process in run.processes for value in values_of(process)]
    if len(values) < NUM_BATCHES:
        raise ConfigError(f"{run.subject.id} has {len(values)} images, {NUM_BATCHES} are needed; measure with --images")
    sticks = [stick for process in run.processes for stick in (sticks_of(process) if sticks_of else ())]
    if len(sticks) < NUM_BATCHES:
        return batch_logs(values)
    return [value - stick for value, stick in zip(batch_logs(values), batch_logs(sticks), strict=True)]


def _key(run: Run) -> tuple[object, ...]:
    subject = run.subject
    parts = (subject.precisions, subject.compute_dtypes)
    return (
        subject.model,
        subject.backend,
        subject.steps,
        subject.size_px,
        subject.batch,
        *(tuple(sorted(p.items())) for p in parts),
    )


def _notes(
    old: BenchReport, new: BenchReport, olds: dict[tuple[object, ...], Run], news: dict[tuple[object, ...], Run]
) -> Iterator[str]:
    for title, mine, other in (("old", olds, news), ("new", news, olds)):
        for key, run in mine.items():
            if key not in other:
                yield f"only in the {title} report: {run.subject.id}"
    for key in (key for key in olds if key in news):
        left, right = olds[key], news[key]
        if left.subject.digest != right.subject.digest:
            yield f"{right.subject.id}: another bundle ({left.subject.digest[:12]} -> {right.subject.digest[:12]})"
        if min(len(left.processes), len(right.processes)) < MIN_PROCESSES:
            yield (
                f"{right.subject.id}: fewer than {MIN_PROCESSES} processes, so batches of images were compared; what differs "
                "from process to process by chance is not in the intervals"
            )
    for name in sorted(set(old.versions) | set(new.versions)):
        if old.versions.get(name) != new.versions.get(name):
            yield f"{name}: {old.versions.get(name, 'absent')} -> {new.versions.get(name, 'absent')}"
    if old.commit != new.commit:
        yield f"commit: {old.commit} -> {new.commit}"

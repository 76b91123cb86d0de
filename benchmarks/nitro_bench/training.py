"""What training costs: iterations per second and memory by the size of the pool and the batch, beside a plain LADD loop.

    python -m nitro_bench.training --report benchmarks/reports

Every loop trains the same student, of the emoji model's shape with random weights, on random samples in memory, in a process
of its own; the loops take turns. Before an iteration is timed the process checks that losses are finite and that student and
heads, those that judged and no others, have changed.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from nitro_bench.machine import commit, machine
from nitro_bench.training_report import Case, TrainingReport, markdown, row_of
from nitro_rt.errors import BuildError, ConfigError, NitroError

EMOJI_CHANNELS = (64, 128, 176)
MODEL = "nitro-emoji"

Report = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class TrainingBenchConfig:
    """One measurement."""

    batches: tuple[int, ...] = (2, 8, 32)
    """Samples of an iteration."""
    heads_per_cell: tuple[int, ...] = (1, 4, 16)
    """Pool sizes; 3 tasks, 4 noise levels and 10 feature levels make 120 cells."""
    rounds: int = 3
    """Processes for each loop and batch, in turns."""
    seconds: float = 8.0
    """How long each process is timed for, after its warm-up."""
    min_iterations: int = 5
    """Iterations that each process times at least."""
    num_warmup: int = 3
    """Iterations that each process does before; what they change is checked."""
    size_px: int = 128
    """Side of the pictures; the latents' is an eighth."""
    channels: tuple[int, ...] = EMOJI_CHANNELS
    """Widths of the UNet's three levels."""

    def __post_init__(self) -> None:
        if not self.batches or min(self.batches) < 2:
            raise ConfigError(f"batches must be 2 or more (the adversarial loss needs two samples), got {list(self.batches)}")
        if not self.heads_per_cell or min(self.heads_per_cell) < 1:
            raise ConfigError(f"heads per cell must be 1 or more, got {list(self.heads_per_cell)}")
        if self.rounds < 1 or self.min_iterations < 1 or self.num_warmup < 1 or self.seconds < 0:
            raise ConfigError("rounds, min_iterations and num_warmup must be 1 or more, seconds not negative")
        if self.size_px % 64:
            raise ConfigError(f"size_px must be a multiple of 64 (crops of half the side are halved twice), got {self.size_px}")
        if len(self.channels) != 3:
            raise ConfigError(f"channels needs the widths of three levels, got {list(self.channels)}")

    def cases(self) -> list[Case]:
        """Loops by batch: the peer first, then one task, then the pools by size."""
        cases = []
        for batch in self.batches:
            cases.append(Case(loop="ladd", heads_per_cell=1, batch=batch))
            cases.append(Case(loop="one-task", heads_per_cell=4, batch=batch))
            cases += [Case(loop="pool", heads_per_cell=size, batch=batch) for size in self.heads_per_cell]
        return cases


def measure(config: TrainingBenchConfig, report: Report = print) -> TrainingReport:
    """Check and time every loop at every batch.

    Raises: BuildError if a process fails or its loop does not train what it should.
    """
    before = machine()
    cases = config.cases()
    samples: dict[Case, list[dict[str, Any]]] = {case: [] for case in cases}
    for round_ in range(1, config.rounds + 1):
        for case in cases:
            found = _run(config, case)
            samples[case].append(found)
            middle = sorted(found["wall_ms"])[len(found["wall_ms"]) // 2]
            report(f"round {round_} of {config.rounds}: {case}: {middle:.0f} ms of {len(found['wall_ms'])}")
    first = samples[cases[0]][0]
    return TrainingReport(
        command=_command(config),
        commit=commit(),
        date=time.strftime("%Y-%m-%d"),
        machine=before,
        device=first["device"],
        num_threads=first["num_threads"],
        versions=first["versions"],
        model=MODEL if config.channels == EMOJI_CHANNELS else "other",
        student_parameters=first["student_parameters"],
        size_px=config.size_px,
        channels=config.channels,
        rounds=config.rounds,
        num_warmup=config.num_warmup,
        rows=tuple(row_of(case, found) for case, found in samples.items()),
    )


def _run(config: TrainingBenchConfig, case: Case) -> dict[str, Any]:
    request = {
        "loop": case.loop,
        "tasks": ["global-conditional"] if case.loop == "one-task" else [],
        "heads_per_cell": case.heads_per_cell,
        "batch": case.batch,
        "size_px": config.size_px,
        "model": {"channels": config.channels},
        "num_warmup": config.num_warmup,
        "seconds": config.seconds,
        "min_iterations": config.min_iterations,
    }
    command = [sys.executable, "-m", "nitro_bench._train", json.dumps(request)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no output"]
        raise BuildError(f"{case} ended with {done.returncode}: {last[0]}")
    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer


def _command(config: TrainingBenchConfig) -> str:
    """What was run."""
    parts = ["python -m nitro_bench.training"]
    parts += [f"--batches {_joined(config.batches)}", f"--heads-per-cell {_joined(config.heads_per_cell)}"]
    parts += [f"--rounds {config.rounds}", f"--seconds {config.seconds:g}", f"--size {config.size_px}"]
    return " ".join([*parts, f"--channels {_joined(config.channels)}"])


def _joined(values: Sequence[int]) -> str:
    return ",".join(map(str, values))


class _Numbers(click.ParamType):
    """Whole numbers with commas between."""

    name = "n,n,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(int(part) for part in value.split(","))
        except ValueError:
            self.fail(f"{value!r} is no list of whole numbers", param, ctx)


@click.command()
@click.option("--batches", type=_Numbers(), default=_joined(TrainingBenchConfig.batches), show_default=True)
@click.option("--heads-per-cell", type=_Numbers(), default=_joined(TrainingBenchConfig.heads_per_cell), show_default=True)
@click.option("--rounds", default=TrainingBenchConfig.rounds, show_default=True, help="Processes per loop and batch, in turns.")
@click.option("--seconds", default=TrainingBenchConfig.seconds, show_default=True, help="Timed in each process.")
@click.option("--size", "size_px", default=TrainingBenchConfig.size_px, show_default=True, help="Side of the pictures.")
@click.option("--channels", type=_Numbers(), default=_joined(TrainingBenchConfig.channels), show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the raw figures here too.")
@click.option("--report", "report_folder", type=click.Path(path_type=Path), help="Write Markdown and JSON into this folder.")
def main(
    batches: tuple[int, ...],
    heads_per_cell: tuple[int, ...],
    rounds: int,
    seconds: float,
    size_px: int,
    channels: tuple[int, ...],
    json_file: Path | None,
    report_folder: Path | None,
) -> None:
    """Measure what a training iteration costs, by the size of the pool, beside a plain LADD loop."""
    try:
        config = TrainingBenchConfig(
            batches=batches, heads_per_cell=heads_per_cell, rounds=rounds, seconds=seconds, size_px=size_px, channels=channels
        )
        result = measure(config, lambda line: click.echo(line, err=True))
    except NitroError as exc:
        click.echo(f"error: {exc}", err=True)
        sys.exit(1)
    click.echo(markdown(result))
    if json_file is not None:
        json_file.write_text(result.to_json(), encoding="utf-8")
    if report_folder is not None:
        report_folder.mkdir(parents=True, exist_ok=True)
        stem = f"{result.model}-training_{result.device_slug}_{result.date[:4]}{result.date[5:7]}"
        (report_folder / f"{stem}.md").write_text(markdown(result), encoding="utf-8")
        (report_folder / f"{stem}.json").write_text(result.to_json(), encoding="utf-8")
        click.echo(f"written: {report_folder / stem}.md and .json")


if __name__ == "__main__":
    main()

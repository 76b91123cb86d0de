"""What export, quantisation and build cost at SDXL's size, how near their graphs are, and how fast, beside the peers.

    python -m nitro_bench.export --work DIR --report benchmarks/reports

Checkpoints are `nitro_bench.synthetic`'s. Every measurement runs in a child process of its own, so memory is given back and
its peak is its own, and leaves a file under DIR/results: one that is there is not repeated, so a run of hours can be made
in pieces (`--only`), stopped at any moment and taken up again. Latencies go in turns: every side once, then every side again.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import click

from nitro_bench.export_plan import OPTIMUM, ExportBenchConfig, Measurement, measurements
from nitro_bench.export_report import ExportReport, markdown, multiplies_natively
from nitro_bench.machine import commit, machine
from nitro_rt.errors import NitroError

WANT_OF_MEMORY = (signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS)
"""What ends a process that is refused memory: the system, or a library that does not look at what it was given."""

Report = Callable[[str], None]


def run(config: ExportBenchConfig, *, only: Sequence[str] = (), retry: bool = False, report: Report = print) -> None:
    """Make the measurements that are not there yet.

    Args:
        only: patterns of names (`full/latency@512/*`); none means all. What one of them needs is not made for it.
        retry: make those again that failed.
    """
    for measurement in measurements(config):
        if only and not any(fnmatch(measurement.name, pattern) for pattern in only):
            continue
        found = stored(config, measurement.name)
        if found is not None and not (retry and "failed" in found):
            continue
        if measurement.child == OPTIMUM and config.optimum_python is None:
            report(f"{measurement.name}: left out, it needs --optimum-python")
            continue
        lacking = [need for need in measurement.needs if not _is_whole(stored(config, need))]
        if lacking:
            report(f"{measurement.name}: left out, it needs {lacking[0]}")
            continue
        report(f"{measurement.name}: running")
        result = _measured(config, measurement)
        _store(config, measurement.name, result)
        report(f"{measurement.name}: {result.get('failed') or _summary(result)}")


def stored(config: ExportBenchConfig, name: str) -> dict[str, Any] | None:
    """What a measurement gave, or `failed` with the reason; None if it was not made."""
    path = _path(config, name)
    if not path.is_file():
        return None
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def collected(config: ExportBenchConfig) -> ExportReport:
    """All results that are there."""
    planned = measurements(config)
    results = {m.name: found for m in planned if (found := stored(config, m.name)) is not None}
    return ExportReport(
        command="python -m nitro_bench.export --work DIR --report benchmarks/reports",
        commit=commit(),
        date=time.strftime("%Y-%m-%d"),
        machine=machine(),
        sizes=config.sizes,
        weight_bits=config.weight_bits,
        num_prompts=config.num_prompts,
        missing=tuple(m.name for m in planned if m.name not in results),
        results=results,
    )


def _measured(config: ExportBenchConfig, measurement: Measurement) -> dict[str, Any]:
    """Run the child. A child that fails is a result, too: peers may not fit, or refuse the model."""
    if measurement.out is not None:
        _remove(measurement.out)
        measurement.out.parent.mkdir(parents=True, exist_ok=True)
    command = [*_interpreter(config, measurement.child), json.dumps(measurement.request)]
    when = {"date": time.strftime("%Y-%m-%d %H:%M"), "commit": commit(), "load_average": f"{os.getloadavg()[0]:.1f}"}
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=config.limit_s)
    except subprocess.TimeoutExpired:
        return when | {"failed": f"ran past {config.limit_s:.0f} s"}
    if done.returncode:
        return when | {"failed": _without_paths(config, _reason(config, measurement, done))[:400]}
    answer: dict[str, Any] = json.loads(_without_paths(config, done.stdout.strip().splitlines()[-1]))
    return when | answer


def _reason(config: ExportBenchConfig, measurement: Measurement, done: subprocess.CompletedProcess[str]) -> str:
    """Why a child failed: its last words, or the signal that ended it."""
    said = (done.stderr.strip().splitlines() or ["no output"])[-1]
    if done.returncode > 0:
        return f"ended with {done.returncode}: {said}"
    ended = signal.Signals(-done.returncode)
    if ended not in WANT_OF_MEMORY:
        return f"ended by {ended.name}"
    limit = f" It may have {config.limit_gib:g} GiB of its own." if measurement.child == OPTIMUM else ""
    return f"ended by {ended.name}, most likely for want of memory.{limit}"


def _interpreter(config: ExportBenchConfig, child: str) -> list[str]:
    if child == OPTIMUM:
        return [str(config.optimum_python), "-I", str(Path(__file__).with_name(f"{child}.py"))]
    return [sys.executable, "-m", f"nitro_bench.{child}"]


def _is_whole(found: dict[str, Any] | None) -> bool:
    return found is not None and "failed" not in found


def _summary(result: dict[str, Any]) -> str:
    if "wall_s" in result:
        return f"{', '.join(f'{value:.2f}' for value in result['wall_s'])} s, {result['sqnr_db']:.1f} dB"
    if "image_psnr_db" in result:
        return (
            f"denoise {result['denoise_sqnr_db']} dB, decode {result['decode_sqnr_db']} dB, images {result['image_psnr_db']} dB"
        )
    return f"{result['seconds']:.1f} s, processor {result['cpu_seconds']:.1f} s, {result['peak_rss_bytes'] / 2**30:.2f} GiB"


def _without_paths(config: ExportBenchConfig, text: str) -> str:
    return text.replace(f"{config.work}/", "").replace(str(Path.home()), "~")


def _path(config: ExportBenchConfig, name: str) -> Path:
    return config.work / "results" / f"{name}.json"


def _store(config: ExportBenchConfig, name: str, result: dict[str, Any]) -> None:
    path = _path(config, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    hidden = path.with_name(f".{path.name}.partial")
    hidden.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    os.replace(hidden, path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


class _Names(click.ParamType):
    """Words with commas between."""

    name = "a,b,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        return value if isinstance(value, tuple) else tuple(part.strip() for part in value.split(",") if part.strip())


@click.command()
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Folder of checkpoints, graphs and results.")
@click.option("--sizes", type=_Names(), default=",".join(ExportBenchConfig.sizes), show_default=True)
@click.option("--latency-px", type=_Names(), default="512,1024", show_default=True)
@click.option("--rounds", default=ExportBenchConfig.rounds, show_default=True, help="Processes per side, in turns.")
@click.option("--calls", default=ExportBenchConfig.num_calls, show_default=True, help="Timed in each process.")
@click.option("--prompts", default=ExportBenchConfig.num_prompts, show_default=True, help="Of the calibration.")
@click.option("--weight-bits", type=click.IntRange(7, 8), help="Of INT8; default: 8 with AMX or VNNI, else 7.")
@click.option("--optimum-python", type=click.Path(path_type=Path), help="Interpreter of optimum's environment.")
@click.option("--limit-s", default=ExportBenchConfig.limit_s, show_default=True, help="Of any one process.")
@click.option("--only", multiple=True, help="Pattern of measurements to make; repeatable.")
@click.option("--retry", is_flag=True, help="Make failed measurements again.")
@click.option("--list", "list_only", is_flag=True, help="Say what there is, and measure nothing.")
@click.option("--report", "report_folder", type=click.Path(path_type=Path), help="Write Markdown and JSON into this folder.")
def main(
    work: Path,
    sizes: tuple[str, ...],
    latency_px: tuple[str, ...],
    rounds: int,
    calls: int,
    prompts: int,
    weight_bits: int | None,
    optimum_python: Path | None,
    limit_s: float,
    only: tuple[str, ...],
    retry: bool,
    list_only: bool,
    report_folder: Path | None,
) -> None:
    """Measure export, quantisation, build, quality and latency at SDXL's size, in pieces that are kept."""
    features = machine()["cpu_features"]
    try:
        config = ExportBenchConfig(
            work=work.resolve(),
            sizes=sizes,
            latency_px=tuple(int(px) for px in latency_px),
            rounds=rounds,
            num_calls=calls,
            num_prompts=prompts,
            weight_bits=weight_bits or (8 if multiplies_natively(features) else 7),
            bf16_sizes=sizes if "bf16" in features else ExportBenchConfig.bf16_sizes,
            optimum_python=optimum_python and optimum_python.absolute(),
            limit_s=limit_s,
        )
        if list_only:
            for measurement in measurements(config):
                found = stored(config, measurement.name)
                state = "to do" if found is None else found.get("failed") or _summary(found)
                click.echo(f"{measurement.name}: {state}")
            return
        run(config, only=only, retry=retry, report=lambda line: click.echo(line, err=True))
        result = collected(config)
    except NitroError as exc:
        click.echo(f"error: {exc}", err=True)
        sys.exit(1)
    if report_folder is not None:
        report_folder.mkdir(parents=True, exist_ok=True)
        stem = f"sdxl-export_cpu_{result.date[:4]}{result.date[5:7]}"
        (report_folder / f"{stem}.md").write_text(markdown(result), encoding="utf-8")
        (report_folder / f"{stem}.json").write_text(result.to_json(), encoding="utf-8")
        click.echo(f"written: {report_folder / stem}.md and .json")


if __name__ == "__main__":
    main()

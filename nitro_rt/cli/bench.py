"""`nitro-rt bench`."""

from __future__ import annotations

import shlex
from pathlib import Path

import click
from click.core import ParameterSource

from nitro_rt.cli.interrupt import tidy_when_ended
from nitro_rt.cli.output import needs_extra, progress
from nitro_rt.errors import ConfigError


def numbers(text: str) -> tuple[int, ...]:
    """Whole numbers between commas."""
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError as exc:
        raise click.BadParameter(f"{text!r} is not a list of whole numbers, such as 1,2,4") from exc


@click.command(name="bench")
@click.argument("bundles", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="BUNDLE...")
@click.option("--peers", metavar="NAME,...", default="", help="Time these beside the bundles; an unknown name lists all.")
@click.option("--size", type=int, help="Edge in pixels, of those that each bundle has.  [default: its first]")
@click.option("--steps", type=numbers, metavar="N,...", default="", help="Of those that each bundle has.  [default: all]")
@click.option("--batch", type=int, help="Images per call.  [default: the bundle's]")
@click.option("--images", type=int, help="Calls that are timed per subject.  [default: 100, or what fits into 5 minutes]")
@click.option("--processes", type=int, help="Fresh processes per subject.  [default: 5, or what starts in 100 s]")
@click.option(
    "--concurrency", type=numbers, metavar="N,...", default="1,2,4", show_default=True, help="Threads that call one pipeline."
)
@click.option("--checkpoint", type=click.Path(path_type=Path), help="The diffusers folder that peers draw with.")
@click.option("--predict", metavar="CARD,...", default="", help="The floor on these GPUs, from their data sheets.")
@click.option("--timeout", "timeout_s", type=float, default=3600.0, show_default=True, help="Seconds for a command to a side.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the result here, replacing what is there.")
@click.option(
    "--report", "report_folder", type=click.Path(path_type=Path), help="Write JSON, Markdown and HTML into this folder."
)
@click.option("--name", default="", help="Of the report's files.  [default: the model's name]")
@click.option("--force", is_flag=True, help="Replace a report of the same name.")
@click.option("--dry-run", is_flag=True, help="Check the bundles' files and say what would be timed.")
def command(
    bundles: tuple[Path, ...],
    peers: str,
    size: int | None,
    steps: tuple[int, ...],
    batch: int | None,
    images: int | None,
    processes: int | None,
    concurrency: tuple[int, ...],
    checkpoint: Path | None,
    predict: str,
    timeout_s: float,
    json_file: Path | None,
    report_folder: Path | None,
    name: str,
    force: bool,
    dry_run: bool,
) -> None:
    """Verify what each BUNDLE draws, then time it: latencies, start, memory, throughput, roofline, peers.

    A bundle whose pictures miss their quality limits is not timed. --report makes NAME_DEVICE_YYYYMM.json, .md and .html.
    """
    if force and report_folder is None:
        raise ConfigError("--force replaces a report, and none is written; say where to: --report DIR")
    if checkpoint is not None and not peers:
        raise ConfigError("--checkpoint is what peers draw with, and none was asked for; name them: --peers diffusers")
    with needs_extra("bench"), tidy_when_ended():
        from nitro_bench.bench import measure
        from nitro_bench.bench_config import BenchConfig
        from nitro_bench.bench_markdown import markdown
        from nitro_bench.checking import plan
        from nitro_bench.publish import ReportFolder, require_place, write_text

        config = BenchConfig(
            bundles=bundles,
            peers=_names(peers),
            size=size,
            steps=steps,
            batch=batch,
            images=images,
            processes=processes,
            concurrency=concurrency,
            checkpoint=checkpoint,
            predict=_names(predict),
            timeout_s=timeout_s,
            name=name,
            command=_typed(),
        )
        folder = None if report_folder is None else ReportFolder(report_folder, force=force)
        if json_file is not None:
            require_place(json_file)
        if dry_run:
            for line in plan(config, before_timing=folder.require_free if folder else None):
                click.echo(line)
            return
        with progress("timing") as report:
            result = measure(config, report, before_timing=folder.require_free if folder else None)
        click.echo(markdown(result))
        try:
            if json_file is not None:
                write_text(json_file, result.to_json())
        finally:  # what took hours is written where it still can be
            for path in folder.publish(result) if folder is not None else ():
                click.echo(f"written: {path}", err=True)


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def _typed() -> str:
    """What was asked for, without folders of this machine: the last part of every path stays."""
    context = click.get_current_context()
    words = ["nitro-rt", "bench"]
    for parameter in context.command.params:
        value = context.params[parameter.name or ""]
        if context.get_parameter_source(parameter.name or "") is not ParameterSource.COMMANDLINE:
            continue
        texts = [
            item.resolve().name if isinstance(item, Path) else str(item)
            for item in (value if isinstance(value, tuple) else (value,))
        ]
        if isinstance(parameter, click.Argument):
            words += texts
        elif isinstance(value, bool):
            words.append(parameter.opts[0])
        else:
            words += [parameter.opts[0], ",".join(texts)]
    return shlex.join(words)

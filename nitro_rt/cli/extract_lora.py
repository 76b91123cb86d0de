"""`nitro-rt extract-lora`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from nitro_rt.cli.build import parse_counts
from nitro_rt.cli.output import json_option, needs_extra, print_json, stage_progress

if TYPE_CHECKING:
    from nitro_training.likeness import Likeness
    from nitro_training.lora import LoraReport

PATH = click.Path(path_type=Path)


@click.command(name="extract-lora")
@click.option("--student", type=PATH, required=True, metavar="PATH", help="The trained checkpoint.")
@click.option("--base", type=PATH, required=True, metavar="PATH", help="What it was trained from.")
@click.option("--rank", type=int, required=True, help="Rank of every layer.")
@click.option("-o", "--out", type=PATH, required=True, metavar="FILE", help="A new .safetensors file.")
@click.option("--report-ranks", callback=parse_counts, metavar="R[,R...]", help="Lower ranks to report on, too.")
@click.option("--dtype", type=click.Choice(["fp32", "fp16", "bf16"]), default="fp16", show_default=True, help="Of the file.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="Where to decompose.")
@click.option("--prompts", type=PATH, metavar="FILE", help="Compare pictures of these prompts, one a line (on the CPU).")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the decomposition and of the pictures' noise.")
@click.option("--shift", type=int, help="Timestep shift, 1 to 1000; the student's own if not given.")
@click.option("--force", is_flag=True, help="Replace the file at --out.")
@click.option("--dry-run", is_flag=True, help="Check the two and the place of the result, and write nothing.")
@json_option
def command(
    student: Path,
    base: Path,
    rank: int,
    out: Path,
    report_ranks: tuple[int, ...] | None,
    dtype: str,
    device: Literal["cpu", "cuda"],
    prompts: Path | None,
    seed: int,
    shift: int | None,
    force: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Write a student's UNet as a LoRA for checkpoints of its base.

    The file loads with diffusers' load_lora_weights. The table says what each rank loses. Each PATH is a diffusers checkpoint,
    its unet folder, or a .safetensors file.
    """
    with needs_extra("train"):
        from nitro_training.lora import extract_lora

        with stage_progress() as progress:
            report = extract_lora(
                student, base, out, rank=rank, report_ranks=report_ranks or (), dtype=dtype, device=device, prompts=prompts,
                seed=seed, shift=shift, force=force, dry_run=dry_run, report=progress,
            )  # fmt: skip
    if report is None:
        click.echo(f"the two fit; {out} would be written", err=as_json)
    elif as_json:
        print_json(dataclasses.asdict(report))
    else:
        _print_report(report)
        click.echo(report.out)


def _print_report(report: LoraReport) -> None:
    unchanged = f", {report.num_layers_unchanged} more are unchanged" if report.num_layers_unchanged else ""
    click.echo(f"{report.num_layers} layers{unchanged}; left out: {report.num_left_out} biases and norms,")
    click.echo(f"which are {report.left_out_error:.1%} of the difference (Frobenius norm)")
    if report.other_parts_that_differ:
        click.echo(f"the LoRA is of the UNet; these differ, too: {', '.join(report.other_parts_that_differ)}")
    row = "{:>5}  {:>8}  {:>11}  {:>11}  {:>10}  {:>7}  {}"
    click.echo(row.format("rank", "MB", "layers' err", "total err", "pixel diff", "PSNR dB", "worst layer"))
    click.echo(row.format("base", "0", "1", "1", *_likeness(report.base_likeness), ""))
    for error in report.ranks:
        worst = " ".join(f"{layer.layer} ({layer.relative_error:.3f})" for layer in error.worst_layers[:1])
        sizes = f"{error.num_bytes / 1e6:.1f}", f"{error.layers_error:.4f}", f"{error.total_error:.4f}"
        click.echo(row.format(error.rank, *sizes, *_likeness(error.likeness), worst))
    click.echo(row.format("full", "", "0", f"{report.left_out_error:.4f}", *_likeness(report.full_likeness), ""))


def _likeness(found: Likeness | None) -> tuple[str, str]:
    if found is None:
        return "-", "-"
    return f"{found.mean_abs_difference:.2f}", "same" if found.psnr_db is None else f"{found.psnr_db:.2f}"

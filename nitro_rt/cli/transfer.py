"""`nitro-rt transfer`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click

from nitro_rt.cli.output import json_option, needs_extra, print_facts, print_json, stage_progress

UNET = click.Path(path_type=Path)


@click.command(name="transfer")
@click.option("--custom", type=UNET, required=True, metavar="PATH", help="The checkpoint that is to draw in few steps.")
@click.option("--nitro", type=UNET, required=True, metavar="PATH", help="The one that can, trained from the same base.")
@click.option("--base", type=UNET, required=True, metavar="PATH", help="What both were made from.")
@click.option("-o", "--out", type=UNET, required=True, metavar="PATH", help="A new .safetensors file or checkpoint folder.")
@click.option("--scale", type=float, default=1.0, show_default=True, help="How much of nitro's difference to add.")
@click.option("--shift", type=int, help="Timestep shift of the result, 1 to 1000; nitro's own if not given.")
@click.option("--force", is_flag=True, help="Replace the file or checkpoint at --out.")
@click.option("--dry-run", is_flag=True, help="Check the three and the place of the result, and write nothing.")
@json_option
def command(
    custom: Path, nitro: Path, base: Path, out: Path, scale: float, shift: int | None, force: bool, dry_run: bool, as_json: bool
) -> None:
    """Give another checkpoint of the same base one-to-four-step drawing.

    W_new = W_custom + scale * (W_nitro - W_base), over the UNet. Each PATH is a diffusers checkpoint, its unet folder, or a
    .safetensors file.
    """
    with needs_extra("train"):
        from nitro_training.transfer import transfer

        with stage_progress() as report:
            result = transfer(
                custom, nitro, base, out, scale=scale, shift=shift, force=force, dry_run=dry_run, report=report
            )  # fmt: skip
    if result is None:
        click.echo(f"the three fit; {out} would be written", err=as_json)
    elif as_json:
        print_json(dataclasses.asdict(result))
    else:
        print_facts(
            [
                ("tensors", result.num_tensors),
                ("of which nitro's own", result.num_from_nitro),
                ("of which custom's own", result.num_from_custom),
                ("|custom - base| / |base|", f"{result.custom_distance:.4g}"),
                ("|nitro - base| / |base|", f"{result.nitro_distance:.4g}"),
                ("timestep shift", "unknown" if result.shifted_timestep is None else result.shifted_timestep),
            ]
        )
        click.echo(result.out)

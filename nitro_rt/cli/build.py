"""`nitro-rt build`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nitro_rt.cli.interrupt import interruptible
from nitro_rt.cli.output import json_option, needs_extra, print_json, progress

if TYPE_CHECKING:
    from nitro_engines import BuildResult

CANNOT_STOP = (
    "the step at work cannot be interrupted, so the build stops after it; Ctrl-C again ends it at once: nothing half-written "
    "stays, the next build clears up"
)


def parse_counts(_: click.Context, __: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    """1,2,4 -> (1, 2, 4)."""
    try:
        return None if value is None else tuple(int(part) for part in value.split(","))
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a comma list of whole numbers such as 1,2,4") from None


def parse_names(_: click.Context, __: click.Parameter, value: str | None) -> tuple[str, ...] | None:
    """sm86,sm89 -> ("sm86", "sm89")."""
    if value is None:
        return None
    names = tuple(part.strip() for part in value.split(","))
    if not all(names):
        raise click.BadParameter(f"{value!r} is not a comma list of names such as sm86,sm89")
    return names


# The defaults are nitro_engines.BuildRequest's, which this module must not import to show its help: an option that is not
# given is not passed on, and a test compares the defaults shown here with the request's.
@click.command(name="build")
@click.option("--steps", callback=parse_counts, show_default="1", metavar="N[,N...]", help="Step counts to build, each 1 to 4.")
@click.option(
    "--model",
    metavar="NAME|PATH|HUB_ID",
    show_default="nitro-emoji",
    help="nitro-emoji, nitrosd-realism, nitrosd-vibrant, a checkpoint folder, a hub id that is cached here, or a .safetensors "
    "file (a UNet alone, or ComfyUI's whole checkpoint).",
)
@click.option("--base", metavar="FOLDER|HUB_ID", help="The checkpoint that a single file belongs to: tokenizers and the like.")
@click.option(
    "--decoder",
    metavar="kl|tiny|PATH",
    help="kl: the checkpoint's own VAE must be that; tiny: TAESDXL; or a diffusers VAE. The checkpoint's own if not given.",
)
@click.option(
    "--lora", "loras", multiple=True, metavar="FILE[:SCALE]", help="Fuse a LoRA, at scale 1 if not given; repeatable."
)
@click.option(
    "--precision",
    type=click.Choice(["fp32", "fp16", "bf16", "int8", "fp8", "auto"]),
    show_default="fp32",
    help="Number type of the graphs; int8 and fp8 are calibrated; auto: the fastest on this CPU that passes the quality gate.",
)
@click.option(
    "--backend",
    type=click.Choice(["openvino", "onnxruntime", "tensorrt", "tensorrt-rtx"]),
    show_default="openvino",
    help="What runs the engines.",
)
@click.option(
    "--provider",
    type=click.Choice(["cpu", "cuda", "tensorrt"]),
    help="What ONNX Runtime runs on, with --backend onnxruntime; cpu if not given.",
)
@click.option(
    "--target",
    "targets",
    callback=parse_names,
    metavar="SM[,SM...]",
    help="GPUs to build for with tensorrt-rtx: sm86,sm89,sm120.",
)
@click.option(
    "--size",
    "sizes_px",
    callback=parse_counts,
    metavar="PIXELS[,...]",
    help="Edges of the images that the bundle draws, first the one that it draws unasked; the model's own if not given.",
)
@click.option("--batch", type=int, show_default="1", help="Largest number of images per call.")
@click.option("--shift", type=int, help="Timestep shift, 1 to 1000; the checkpoint's own if not given.")
@click.option(
    "--gate-prompts",
    type=int,
    show_default="4",
    help="Pictures per step count that the bundle is compared with the checkpoint in float32 by, 1 to 16.",
)
@click.option("--allow-quality-loss", is_flag=True, help="Publish a bundle that misses its quality limits, and record that.")
@click.option(
    "--refit", is_flag=True, help="Engines of TensorRT that take new weights, such as a LoRA's, when they are loaded."
)
@click.option("--rebuild", is_flag=True, help="Compile what is cached, too, and say whether the same bytes come out.")
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR", help="The bundle's folder.")
@click.option("--dry-run", is_flag=True, help="Say what would be done, and do nothing.")
@click.option("--explain", is_flag=True, help="Say which field of the engine key differs from the nearest build before.")
@json_option
def command(*, dry_run: bool, explain: bool, as_json: bool, **options: Any) -> None:
    """Build an engine bundle from a checkpoint.

    Steps that are cached are not done again; the bundle appears whole or not at all.
    """
    with needs_extra("cpu,export"):
        import nitro_engines

        request = nitro_engines.BuildRequest(**{name: value for name, value in options.items() if value is not None})
        if dry_run or explain:
            plan = nitro_engines.plan(request)
            if as_json and dry_run:
                print_json(plan.as_dict())
            else:
                click.echo("\n".join(plan.lines(explain=explain)), err=as_json)
        if dry_run:
            return
        with interruptible(CANNOT_STOP), progress("building") as report:
            result = nitro_engines.build(request, report)
    _print_result(result, as_json)


def _print_result(result: BuildResult, as_json: bool) -> None:
    if as_json:
        facts = {"stages": result.stages, "seconds": result.seconds, "published": result.published}
        print_json({"out": result.out, "name": result.manifest.name, "engine_key": result.manifest.engine_key} | facts)
    else:
        click.echo(result.out)

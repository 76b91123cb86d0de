"""`nitro-rt inspect`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from nitro_rt.cli.output import json_option, print_facts, print_json

if TYPE_CHECKING:
    from nitro_rt.bundle import Bundle
    from nitro_rt.manifest import Engine, TensorSpec


@click.command(name="inspect")
@click.argument("bundle", type=click.Path(path_type=Path))
@json_option
def command(bundle: Path, as_json: bool) -> None:
    """Show what is in the bundle at BUNDLE. Its backend need not be here."""
    from nitro_rt.bundle import open_bundle

    opened = open_bundle(bundle)
    if as_json:
        print_json(dataclasses.asdict(opened.manifest) | {"digest": opened.digest})
    else:
        print_facts(_facts(opened))


def _facts(bundle: Bundle) -> Iterator[tuple[str, object]]:
    from nitro_rt.quantisation import quantised_operators

    manifest = bundle.manifest
    plan = manifest.memory_plan
    yield "bundle", f"{manifest.name}, sha256 {bundle.digest}"
    yield "model", f"{manifest.source.name} ({manifest.source.origin}), licence {manifest.source.licence}"
    yield "checkpoint", manifest.source.checkpoint_sha256
    yield "images", f"{', '.join(f'{size}x{size}' for size in manifest.sizes_px)} pixels, at most {manifest.batch} per call"
    for num_steps, schedule in sorted(manifest.schedule.steps.items()):
        times = ", ".join(f"{t} -> {told}" for t, told in zip(schedule.timesteps, schedule.shifted_timesteps, strict=True))
        yield f"{num_steps} step{'s' * (num_steps > 1)}", f"shift {manifest.schedule.shift}, timesteps {times}"
    for stage, engine in bundle.engines():
        yield stage, _engine(engine)
        yield "", f"in   {_tensors(engine.inputs)}"
        yield "", f"out  {_tensors(engine.outputs)}"
    yield "target", _pairs(manifest.target)
    yield "built with", _pairs(manifest.toolchain)
    yield "engine key", manifest.engine_key
    operators = quantised_operators(bundle)
    if operators is None:
        yield "quantised", "no"
    else:
        recipe = manifest.quantisation or {}
        yield "quantised", _pairs({name: str(value) for name, value in recipe.items() if name not in ("layers", "kept")})
        yield "operators", operators.sentence()
    yield "needs", f"{_mib(plan.disk_bytes)} on disk, {_mib(plan.weight_bytes)} of weights, {_mib(plan.io_bytes)} of buffers"


def _engine(engine: Engine) -> str:
    size = sum(file.num_bytes for file in engine.files)
    options = f", {_pairs(engine.options)}" if engine.options else ""
    return f"{engine.backend}, asked for {engine.precision}, computes in {engine.compute_dtype}, {_mib(size)}{options}"


def _tensors(specs: tuple[TensorSpec, ...]) -> str:
    return ", ".join(f"{spec.name} {spec.dtype} {list(spec.shape)}" for spec in specs)


def _pairs(values: dict[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in sorted(values.items()))


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.2f} MiB"

"""`nitro-rt doctor`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from nitro_rt.cli.output import json_option, print_facts, print_json

if TYPE_CHECKING:
    from nitro_rt.doctor import Examination


@click.command(name="doctor")
@json_option
def command(as_json: bool) -> None:
    """Say what this machine has, and what can be built and run on it."""
    from nitro_rt.doctor import examine

    examination = examine()
    if as_json:
        print_json(dataclasses.asdict(examination))
    else:
        print_facts(_facts(examination))


def _facts(found: Examination) -> Iterator[tuple[str, object]]:
    from nitro_rt.reasons import gib

    yield "python", found.python
    yield "system", found.system
    yield "cpu", f"{found.cpu.name}, {found.cpu.num_cores} cores, {' '.join(found.cpu.features) or 'no known features'}"
    driver = found.driver
    if driver.cuda_version:
        yield "driver", f"NVIDIA {driver.version or 'of unknown version'}, runs CUDA {driver.cuda_version}"
    for gpu in driver.gpus:
        free = "" if gpu.free_bytes is None else f", {gib(gpu.free_bytes)} free"
        yield f"gpu {gpu.ordinal}", f"{gpu}, {gib(gpu.memory_bytes)}{free}"
    if not driver.gpus:
        yield "gpu", f"none: {driver.reason}"
    yield "cache", found.cache
    for package, version in found.versions.items():
        yield package, version or "not installed"
    yield "providers", ", ".join(found.providers) or "none: no ONNX Runtime"
    for backend, answer in found.builds.items():
        yield f"build {backend}", answer
    for backend, answer in found.runs.items():
        yield f"run {backend}", answer

"""`nitro-rt generate`."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from nitro_rt.cli.output import json_option, print_json
from nitro_rt.errors import ConfigError

if TYPE_CHECKING:
    from nitro_rt.pipeline import Pipeline
    from nitro_rt.result import Result

NAME_LENGTH = 60


@click.command(name="generate")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("prompts", nargs=-1, required=True, metavar="PROMPT...")
@click.option("--seed", type=int, help="0 to 2**64 - 1, for each prompt; a fresh one each if not given.")
@click.option("--steps", type=int, help="A step count of the bundle; the smallest if not given.")
@click.option("--size", "size_px", type=int, metavar="PIXELS", help="A size of the bundle; the first if not given.")
@click.option("-o", "--out", metavar="PNG|DIR", help="A .png file, or a folder.")
@json_option
def command(
    bundle: Path,
    prompts: tuple[str, ...],
    seed: int | None,
    steps: int | None,
    size_px: int | None,
    out: str | None,
    as_json: bool,
) -> None:
    """Draw an image for each PROMPT with the bundle at BUNDLE.

    \b
    -o apple.png   one prompt: this file; several: apple-1.png, apple-2.png, ...; replaced if there
    -o pictures    a folder, made if needed: pictures/a-red-apple-7.png
    without -o     a-red-apple-7.png in the current folder
    Names made from prompts never replace a file: a number is added.

    The image of a prompt depends on its seed only, not on the other prompts. Each PNG holds prompt, seed, steps and the
    bundle's digest in its text chunks.
    """
    from nitro_rt.pipeline import ComputeTypeDiffers, Pipeline
    from nitro_rt.tokenizer import PromptTruncated

    targets = Targets(out, len(prompts))
    drawn, told = [], set()
    with warnings.catch_warnings():
        for category in (ComputeTypeDiffers, PromptTruncated):
            warnings.simplefilter("ignore", category)  # they stand in the result, and are printed once, in one line
        with Pipeline.load(bundle, size=size_px) as pipe:  # no other size in memory
            for result in _draw(pipe, prompts, seed, steps, size_px):
                for warning in result.warnings:
                    if warning not in told:
                        click.echo(f"nitro-rt: warning: {warning}", err=True)
                        told.add(warning)
                for index in range(len(result.images)):
                    record = _save(result, index, targets)
                    drawn.append(record)
                    if not as_json:
                        click.echo(f"{record['path']}  seed {record['seed']}, steps {record['steps']}, {_time(result)}")
    if as_json:
        print_json(drawn)


def _draw(pipe: Pipeline, prompts: Sequence[str], seed: int | None, steps: int | None, size_px: int | None) -> Iterator[Result]:
    """As many prompts per call as the bundle takes, each with a seed of its own."""
    batch = pipe.bundle.manifest.batch
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        seeds = [int.from_bytes(os.urandom(4), "little") if seed is None else seed for _ in part]
        yield pipe(part, seed=seeds, steps=steps, size=size_px)


def _save(result: Result, index: int, targets: Targets) -> dict[str, object]:
    text = result.png_text(index)
    path = result.save(targets.next(text["prompt"], text["seed"]), index)
    return {
        "path": str(path),
        "prompt": text["prompt"],
        "seed": int(text["seed"]),
        "steps": result.steps,
        "size_px": result.size_px,
        "bundle": result.bundle_digest,
        "timings_ms": {name: round(ms, 3) for name, ms in result.timings_ms.items()},
        "warnings": list(result.warnings),
    }


def _time(result: Result) -> str:
    number = f" for {len(result.images)} images" if len(result.images) > 1 else ""
    return f"{result.timings_ms['total']:.0f} ms{number}"


class Targets:
    """Where the images go, decided and checked before anything is drawn."""

    def __init__(self, out: str | None, num_images: int) -> None:
        """Raises: ConfigError if `out` is neither a folder nor a PNG, or the folder cannot be written."""
        path = Path(out or ".")
        is_folder = path.is_dir() or not path.suffix or (out or "").endswith(os.sep)
        if not is_folder and path.suffix.lower() != ".png":
            raise ConfigError(f"-o {out} does not end in .png; images are written as PNG, or into a folder")
        self._file = None if is_folder else path
        self._folder = path if is_folder else path.parent
        self._num_images, self._num_named = num_images, 0
        _require_writable(self._folder)

    def next(self, prompt: str, seed: str) -> Path:
        self._num_named += 1
        _make(self._folder)
        if self._file is None:
            return self._free_name(f"{_slug(prompt)}-{seed}")
        if self._num_images == 1:
            return self._file
        return self._file.with_name(f"{self._file.stem}-{self._num_named}{self._file.suffix}")

    def _free_name(self, stem: str) -> Path:
        path, number = self._folder / f"{stem}.png", 1
        while path.exists():
            number += 1
            path = self._folder / f"{stem}-{number}.png"
        return path


def _require_writable(folder: Path) -> None:
    """Refuse a folder that cannot be written or made; nothing is made yet, because the bundle may be wrong."""
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise ConfigError(f"the folder {folder} cannot be made: {nearest} is a file; choose another place with -o")
    if not os.access(nearest, os.W_OK):
        raise ConfigError(f"the folder {nearest} cannot be written; choose another place with -o")


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise ConfigError(f"the folder {folder} cannot be made: {exc.strerror}; choose another place with -o") from exc


def _slug(prompt: str) -> str:
    """A file name of the prompt's letters and digits."""
    return re.sub(r"\W+", "-", prompt.lower())[:NAME_LENGTH].strip("-_") or "image"

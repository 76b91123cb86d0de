"""How lean the runtime is, beside diffusers doing the same: packages, megabytes, import, first image, memory.

    python -m nitro_bench.lean BUNDLE --checkpoint DIR

The runtime runs in a fresh virtual environment that holds only the wheel of nitro-rt[cpu]; diffusers runs in the current
one. Both draw the same prompt, seed and steps from the same checkpoint in a process of their own, in turns. The two images
are compared before any figure is believed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np
from PIL import Image

from nitro_bench import environment
from nitro_bench.lean_report import LeanReport, Side, markdown
from nitro_bench.machine import commit, machine
from nitro_rt import manifest
from nitro_rt.errors import BuildError, ConfigError, EngineMismatch, ModelNotFound, NitroError
from nitro_rt.manifest import BundleManifest

FORBIDDEN = ("torch", "diffusers", "transformers", "onnx")
"""What the lean environment may neither hold nor load."""
DIFFUSERS_NEEDS = ("diffusers[torch]", "transformers")
"""What its documentation tells a user of SDXL to install."""
PSNR_FLOOR_DB = {"float32": 45.0, "float16": 35.0, "bfloat16": 28.0}
"""How near the bundle's image must be to diffusers' in float32, by what the backend computes in."""

Report = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class LeanConfig:
    """One measurement."""

    bundle: Path
    checkpoint: Path
    """The folder that the bundle was built from."""
    prompt: str = "a red apple"
    seed: int = 7
    steps: int = 1
    num_rounds: int = 5
    """Processes per side, in turns; one more of each comes first and is not counted (file cache, bytecode)."""
    num_more_images: int = 5
    """Images after the first, for the time of a warm one."""
    wheel: Path | None = None
    """The wheel to install; None builds the repository's."""

    def __post_init__(self) -> None:
        if self.num_rounds < 1 or self.num_more_images < 1:
            raise ConfigError(f"rounds and more images must be 1 or more, got {self.num_rounds} and {self.num_more_images}")
        if not (self.checkpoint / "model_index.json").is_file():
            raise ModelNotFound(f"{self.checkpoint} holds no model_index.json; name the diffusers folder of the checkpoint")


def measure(config: LeanConfig, report: Report = print) -> LeanReport:
    """Install, compare, time.

    Raises: EngineMismatch if the bundle lacks the step count; BuildError if the environment is not lean, a process
        fails, or the images differ.
    """
    bundle = _read_bundle(config.bundle, config.steps)
    before = machine()
    with tempfile.TemporaryDirectory(prefix="nitro-lean-") as scratch:
        folder = Path(scratch)
        report("installing the wheel into a fresh environment")
        wheel = config.wheel or environment.build_wheel(folder)
        python = environment.make_venv(folder / "venv", wheel, "cpu")
        lean = environment.installed_in(environment.site_packages(python))
        _require_lean(lean.versions, "holds")
        heavy = environment.closure(DIFFUSERS_NEEDS)

        request = _request(config, bundle)
        sides = {
            "nitro_rt": (str(python), request | {"side": "nitro_rt", "png": str(folder / "nitro_rt.png")}),
            "diffusers": (sys.executable, request | {"side": "diffusers", "png": str(folder / "diffusers.png")}),
        }
        samples: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
        for round_ in range(config.num_rounds + 1):
            for name, (interpreter, asked) in sides.items():
                samples[name].append(_draw(interpreter, asked))
                report(f"round {round_} of {config.num_rounds}: {name} first image {samples[name][-1]['first_image_s']:.2f} s")
            if round_ == 0:
                _require_lean(samples["nitro_rt"][0]["modules"], "loads")
                psnr = _compare(folder / "nitro_rt.png", folder / "diffusers.png", bundle.denoise[config.steps].compute_dtype)
                report("the two images are equal" if psnr == float("inf") else f"the two images agree to {psnr:.1f} dB")
    return LeanReport(
        command=_command(config),
        commit=commit(),
        date=time.strftime("%Y-%m-%d"),
        machine=before,
        model=bundle.source.name,
        size_px=bundle.sizes_px[0],
        backend=bundle.denoise[config.steps].backend,
        compute_dtype=bundle.denoise[config.steps].compute_dtype,
        prompt=config.prompt,
        seed=config.seed,
        steps=config.steps,
        num_rounds=config.num_rounds,
        psnr_db=None if psnr == float("inf") else round(psnr, 2),
        nitro_rt=_side(lean, samples["nitro_rt"][1:], _folder_bytes(config.bundle)),
        diffusers=_side(heavy, samples["diffusers"][1:], _folder_bytes(config.checkpoint)),
    )


def psnr_db(image: np.ndarray, reference: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two uint8 images of equal shape; infinite where they are equal.

    Raises: BuildError for different shapes, or a uniform reference, with which any dark image would agree.
    """
    if image.shape != reference.shape:
        raise BuildError(f"the bundle draws {image.shape}, diffusers {reference.shape}; build the bundle for the same size")
    if reference.min() == reference.max():
        raise BuildError("diffusers' image is of one colour, nothing can be compared with it; the checkpoint is broken")
    mse = float(np.mean(np.square(image.astype(np.float64) - reference.astype(np.float64))))
    return float("inf") if mse == 0 else float(10 * np.log10(255**2 / mse))


def _compare(ours: Path, theirs: Path, compute_dtype: str) -> float:
    psnr = psnr_db(np.asarray(Image.open(ours)), np.asarray(Image.open(theirs)))
    floor = PSNR_FLOOR_DB[compute_dtype]
    if psnr < floor:
        raise BuildError(
            f"the bundle's image is {psnr:.1f} dB from diffusers', {compute_dtype} must reach {floor:.0f}; "
            "nothing was timed: is the bundle built from this checkpoint?"
        )
    return psnr


def _read_bundle(folder: Path, steps: int) -> BundleManifest:
    path = folder / manifest.BUNDLE_FILE
    if not path.is_file():
        raise ModelNotFound(f"{folder} is not a bundle: no {manifest.BUNDLE_FILE}; make one with nitro-rt build")
    bundle = manifest.from_json(BundleManifest, path.read_text(encoding="utf-8"), where=str(path))
    if steps not in bundle.denoise:
        built = ", ".join(map(str, sorted(bundle.denoise)))
        raise EngineMismatch(f"{folder} was built for {built} steps, not {steps}; build it with --steps {steps}")
    return bundle


def _request(config: LeanConfig, bundle: BundleManifest) -> dict[str, Any]:
    return {
        "bundle": str(config.bundle.resolve()),
        "checkpoint": str(config.checkpoint.resolve()),
        "prompt": config.prompt,
        "seed": config.seed,
        "steps": config.steps,
        "shift": bundle.schedule.shift,
        "size_px": bundle.sizes_px[0],
        "num_more_images": config.num_more_images,
    }


def _draw(interpreter: str, request: dict[str, Any]) -> dict[str, Any]:
    """Run one child. Adds `first_image_s`: from before the process exists to the image in memory."""
    # -I: no PYTHONPATH, no user site, and not this folder on the path either.
    command = [interpreter, "-I", str(Path(__file__).with_name("_draw.py")), json.dumps(request)]
    start_s = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no output"]
        raise BuildError(f"drawing with {request['side']} ended with {done.returncode}: {last[0]}")
    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer | {"first_image_s": answer["first_image_at_s"] - start_s}


def _require_lean(names: Any, verb: str) -> None:
    found = [name for name in FORBIDDEN if name in names]
    if found:
        raise BuildError(f"the lean environment {verb} {', '.join(found)}; nothing was timed")


def _side(installed: environment.Installation, samples: list[dict[str, Any]], model_bytes: int) -> Side:
    return Side(
        version=samples[0]["version"],
        num_packages=installed.num_packages,
        installed_mb=round(installed.num_bytes / 1e6, 1),
        model_mb=round(model_bytes / 1e6, 1),
        import_ms=_median(samples, "import_ms"),
        import_pipeline_ms=_median(samples, "import_pipeline_ms"),
        first_image_s=round(median(sample["first_image_s"] for sample in samples), 3),
        first_image_cpu_s=round(median(sample["first_image_cpu_s"] for sample in samples), 3),
        peak_rss_mb=round(median(sample["peak_rss_bytes"] for sample in samples) / 1e6, 1),
        image_ms=round(median(value for sample in samples for value in sample["image_ms"]), 1),
        packages=installed.versions,
        samples=tuple({key: value for key, value in sample.items() if key != "modules"} for sample in samples),
    )


def _median(samples: list[dict[str, Any]], key: str) -> float:
    return round(median(sample[key] for sample in samples), 1)


def _folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _command(config: LeanConfig) -> str:
    """What was run, without paths of this machine."""
    names = {name: getattr(config, name) for name in ("prompt", "seed", "steps")}
    options = " ".join(f"--{name} {json.dumps(value)}" for name, value in names.items())
    command = f"python -m nitro_bench.lean {config.bundle.name} --checkpoint {config.checkpoint.name}"
    return f"{command} {options} --rounds {config.num_rounds}"


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--checkpoint", type=click.Path(path_type=Path), required=True, help="The diffusers folder it was built from.")
@click.option("--prompt", default=LeanConfig.prompt, show_default=True)
@click.option("--seed", default=LeanConfig.seed, show_default=True)
@click.option("--steps", default=LeanConfig.steps, show_default=True)
@click.option("--rounds", default=LeanConfig.num_rounds, show_default=True, help="Processes per side, in turns.")
@click.option("--wheel", type=click.Path(path_type=Path), help="Install this wheel; default: build the repository's.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the raw figures here too.")
@click.option("--report", "report_folder", type=click.Path(path_type=Path), help="Write Markdown and JSON into this folder.")
def main(
    bundle: Path,
    checkpoint: Path,
    prompt: str,
    seed: int,
    steps: int,
    rounds: int,
    wheel: Path | None,
    json_file: Path | None,
    report_folder: Path | None,
) -> None:
    """Measure how lean the runtime is beside diffusers, drawing BUNDLE's first image."""
    try:
        config = LeanConfig(
            bundle=bundle, checkpoint=checkpoint, prompt=prompt, seed=seed, steps=steps, num_rounds=rounds, wheel=wheel
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
        stem = f"{result.model}-lean_{result.backend}-cpu_{result.date[:4]}{result.date[5:7]}"
        (report_folder / f"{stem}.md").write_text(markdown(result), encoding="utf-8")
        (report_folder / f"{stem}.json").write_text(result.to_json(), encoding="utf-8")
        click.echo(f"written: {report_folder / stem}.md and .json")


if __name__ == "__main__":
    main()

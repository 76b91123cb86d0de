"""Child process of `export`: one of nitro-rt's own jobs, with time and peak memory of each of its parts.

Prints one line of JSON; the request is the JSON in its argument.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nitro_bench._export_meter import Meter, disk_usage


def checkpoint(request: dict[str, Any], meter: Meter) -> Path:
    from nitro_bench.synthetic import make_sdxl

    meter.mark("imports")
    return make_sdxl(Path(request["out"]), size=request["size"], report=meter.mark)


def export(request: dict[str, Any], meter: Meter) -> Path:
    from nitro_export import export_checkpoint

    meter.mark("imports")
    out = Path(request["out"])
    options = {name: request[name] for name in ("precision", "size_px")}
    export_checkpoint(Path(request["checkpoint"]), out, steps=(1,), report=_one_line(meter, request), **options)
    return out


def calibrate(request: dict[str, Any], meter: Meter) -> Path:
    """The parent draws at `size_px`, and the recipe is written."""
    from nitro_export import read_checkpoint
    from nitro_export.parent import Parent
    from nitro_export.quantise import calibrate

    meter.mark("imports")
    checkpoint = read_checkpoint(Path(request["checkpoint"]))
    parent = Parent(checkpoint, size_px=request["size_px"])
    options = {name: request[name] for name in ("precision", "symmetric", "weight_bits", "num_prompts")}
    shift = checkpoint.run["shifted_timestep"]
    recipe = calibrate(parent, steps=(1,), shift=shift, report=_one_line(meter, request), **options)
    out = Path(request["out"])
    out.mkdir(parents=True, exist_ok=True)
    (out / "recipe.json").write_text(json.dumps(recipe.as_dict()), encoding="utf-8")
    return out


def quantise(request: dict[str, Any], meter: Meter) -> Path:
    """A float graphs folder with a recipe."""
    from nitro_export.quantise import QuantisationRecipe, quantise_graphs

    meter.mark("imports")
    out = Path(request["out"])
    recipe = QuantisationRecipe.from_dict(json.loads((Path(request["recipe"]) / "recipe.json").read_text(encoding="utf-8")))
    quantise_graphs(Path(request["graphs"]), out, recipe, report=_one_line(meter, request))
    return out


def build(request: dict[str, Any], meter: Meter) -> Path:
    from nitro_engines import EngineCache, build_bundle

    meter.mark("imports")
    out, targets = Path(request["out"]), tuple(request["targets"])
    # A cache of its own: what an earlier build left would make this one cost nothing.
    with tempfile.TemporaryDirectory(prefix="cache-", dir=out.parent) as cache:
        build_bundle(
            Path(request["graphs"]),
            out,
            backend=request["backend"],
            targets=targets,
            cache=EngineCache(Path(cache)),
            report=_one_line(meter, request),
        )
    return out


JOBS: dict[str, Callable[[dict[str, Any], Meter], Path]] = {
    "checkpoint": checkpoint,
    "export": export,
    "calibrate": calibrate,
    "quantise": quantise,
    "build": build,
}


def _one_line(meter: Meter, request: dict[str, Any]) -> Callable[[str], None]:
    """Each line that a job reports ends a span; where it writes is nobody's business."""
    return lambda line: meter.mark(line.replace(request["out"], "the output"))


def main() -> None:
    request = json.loads(sys.argv[1])
    meter = Meter()
    out = JOBS[request["job"]](request, meter)
    meter.mark("the rest")
    print(json.dumps(meter.summary() | disk_usage(out)))


if __name__ == "__main__":
    main()

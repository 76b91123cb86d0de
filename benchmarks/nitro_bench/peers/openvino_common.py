"""What the two OpenVINO peers have in common: the export and the options of the CPU plugin. Standard library and openvino."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nitro_bench.peers.adapter import CannotRun
from nitro_bench.peers.conversion import Conversion, converted
from nitro_bench.peers.transformers4 import stored_dtype

EXPORT = Path(__file__).resolve().parent / "export_openvino.py"
COMPUTE_DTYPES = {"f32": "float32", "bf16": "bfloat16"}
"""OpenVINO's name of a type -> the benchmark's."""


def compute_dtype(options: Mapping[str, str]) -> str:
    """The type that decides how near the pictures can be: with INT8 weights that, though the arithmetic is in floats."""
    return "int8" if options.get("weights") == "int8" else COMPUTE_DTYPES[options.get("precision", "f32")]


def export(request: Mapping[str, Any]) -> Conversion:
    """The checkpoint as OpenVINO models, by optimum-intel. Raises: CannotRun if its environment is not made."""
    options, model = request["options"], Path(request["model"])
    python = Path(options["export_python"])
    if not python.is_file():
        raise CannotRun("the environment of optimum-intel, which exports for it, is not made; make peers")
    # float16 storage loses nothing where the checkpoint is stored in it, and is what optimum-intel's page advises.
    weights = options.get("weights") or ("fp16" if stored_dtype(model) == "F16" else "fp32")
    return converted(Path(options["models"]), python, EXPORT, model, {"weights": weights}, Path(options["export_pins"]))


def properties(options: Mapping[str, str]) -> dict[str, Any]:
    """Of `compile_model`. Raises: CannotRun if the CPU cannot compute in the type that is asked for."""
    import openvino

    precision = options.get("precision", "f32")
    if precision == "bf16":
        able = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if "BF16" not in able:
            raise CannotRun(f"this CPU does not compute in bfloat16, OpenVINO lists {', '.join(able)}")
    found: dict[str, Any] = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
    return found | ({"INFERENCE_NUM_THREADS": int(options["threads"])} if "threads" in options else {})

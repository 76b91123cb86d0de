"""Whether a network, a plan and an engine compute in the type that was asked for.

TensorRT takes its types from the graph and says nothing where they are not those that were wanted: a float32 graph becomes a
float32 engine of twice the size (roboflow/rf-detr#1453). So it is asked three times: before the build from the parsed
network, after it from the plan's size, and where there is a GPU from the engine's inspector.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from nitro_rt.errors import BuildError

MIN_SHARE = 0.9
"""Of the multiplications of a network, how many must be in the type that was asked for. (All of ours are.)"""
MIN_RATIO, MAX_RATIO = 0.75, 1.5
"""A plan's bytes to those of its graph's weights, code aside. Measured with TensorRT-RTX 1.7: 1.00 to 1.01, in any type."""
BYTES_PER_LAYER, BYTES_PER_PLAN = 12 << 10, 1 << 20
"""What a plan may hold beside weights, for each layer of the network and for itself. Measured: 5 to 10 KiB for each."""

_MULTIPLIES = re.compile(r"gemm|conv|matmul|matrix.?multiply|mha|attention", re.IGNORECASE)
_WORDS = {"bfloat16": r"bf16|bfloat", "float16": r"half|fp16|float16", "float32": r"fp32|float32|float\b"}
"""How the inspector calls a type; it has changed its words between releases. The first that fits: BFloat16 holds Float16."""


def check_network(counts: Mapping[str, int], compute_dtype: str, name: str) -> None:
    """Before the build.

    Args:
        counts: type -> how many convolutions and matrix products of the parsed network take it as their input.
        name: the graph's, for the message.
    Raises: BuildError if too few compute in `compute_dtype`.
    """
    total = sum(counts.values())
    if total and counts.get(compute_dtype, 0) < MIN_SHARE * total:
        found = ", ".join(f"{count} in {dtype}" for dtype, count in sorted(counts.items()))
        raise BuildError(
            f"{name} should compute in {compute_dtype}, but of its {total} convolutions and matrix products TensorRT "
            f"would compute {found}; export again"
        )


def check_plan_size(num_bytes: int, weight_bytes: int, num_layers: int, compute_dtype: str, name: str) -> None:
    """After the build, without a GPU: weights of twice the width are seen wherever they outweigh the plan's code.

    Args:
        num_bytes: of the plan.
        weight_bytes: of the graph, in the types that it has them in.
        num_layers: of the parsed network.
    Raises: BuildError.
    """
    beside = BYTES_PER_PLAN + BYTES_PER_LAYER * num_layers
    least, most = int(MIN_RATIO * weight_bytes), int(MAX_RATIO * weight_bytes) + beside
    if not least <= num_bytes <= most:
        what = "too large: its weights are stored in a wider type" if num_bytes > most else "too small: it lacks weights"
        raise BuildError(
            f"the plan of {name} has {num_bytes >> 10} KiB, {what}. The graph's weights have {weight_bytes >> 10} KiB for "
            f"{compute_dtype}, so it should have from {least >> 10} to {most >> 10} KiB; report this graph"
        )


def check_inspection(text: str, compute_dtype: str, name: str) -> str:
    """After the build, on a GPU.

    Args: text: `EngineInspector.get_engine_information` as JSON, of a plan built with detailed verbosity.
    Returns: what there is to say if the inspector's answer tells nothing; empty otherwise.
    Raises: BuildError if too few multiplications are in `compute_dtype`.
    """
    layers = [layer for layer in json.loads(text).get("Layers", []) if isinstance(layer, dict)]
    dtypes = [_dtype_of(layer) for layer in layers if _multiplies(layer)]
    known = [dtype for dtype in dtypes if dtype is not None]
    if not known:
        return f"{name}: the inspector names no multiplication, so the built precision was checked by types and size only"
    right = known.count(compute_dtype)
    if right < MIN_SHARE * len(known):
        counted = ", ".join(f"{known.count(dtype)} in {dtype}" for dtype in sorted(set(known)))
        raise BuildError(
            f"the engine of {name} should compute in {compute_dtype}, but its inspector lists of {len(known)} multiplications "
            f"{counted}; export again"
        )
    return ""


def _multiplies(layer: Mapping[str, Any]) -> bool:
    return bool(_MULTIPLIES.search(f"{layer.get('LayerType', '')} {layer.get('ParameterType', '')}"))


def _dtype_of(layer: Mapping[str, Any]) -> str | None:
    """The number type of a layer's first input; None where it is no float of ours (8 bits, or words that are not known)."""
    inputs = layer.get("Inputs") or [{}]
    said = str(inputs[0].get("Format/Datatype", "")) if isinstance(inputs[0], dict) else ""
    return next((dtype for dtype, words in _WORDS.items() if re.search(words, said, re.IGNORECASE)), None)

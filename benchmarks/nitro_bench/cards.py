"""Data-sheet figures of GPUs that are not at hand: what a roofline predicts from.

Matrix (tensor core) rates are dense, without the doubling for structured sparsity, and with accumulation in FP32 where the
maker tells both: GeForce cards halve their FP16 rate then, and neither TensorRT nor anybody sums thousands of products in FP16.

The sheets of the L4, the H200 and the RTX 5090 were not at hand: their figures were compared with public pages that quote them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from nitro_bench.ceilings import Ceiling
from nitro_rt.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Card:
    """One GPU as its maker describes it."""

    name: str
    token: str
    """What stands in its driver's name, between spaces."""
    tera_per_s: Mapping[str, float]
    """What is multiplied -> 10**12 operations a second. float32 is TF32's rate where the card has it: what TensorRT uses."""
    gigabytes_per_s: float
    """Memory bandwidth."""
    source: str


CARDS: dict[str, Card] = {
    "h100": Card(
        name="NVIDIA H100 SXM5 80 GB",
        token="H100",
        tera_per_s={"float32": 494.7, "float16": 989.4, "bfloat16": 989.4, "fp8": 1978.9, "int8": 1978.9},
        gigabytes_per_s=3350,
        source="NVIDIA H100 Tensor Core GPU data sheet and Hopper architecture white paper (2022); TF32 for float32",
    ),
    "h200": Card(
        name="NVIDIA H200 SXM 141 GB",
        token="H200",
        tera_per_s={"float32": 494.7, "float16": 989.4, "bfloat16": 989.4, "fp8": 1978.9, "int8": 1978.9},
        gigabytes_per_s=4800,
        source="NVIDIA H200 Tensor Core GPU data sheet (2023): the H100's rates (989, 1979 and 3958 with sparsity), 4.8 TB/s; "
        "TF32 for float32",
    ),
    "a100": Card(
        name="NVIDIA A100 SXM4 80 GB",
        token="A100-SXM4-80GB",
        tera_per_s={"float32": 156, "float16": 312, "bfloat16": 312, "int8": 624},
        gigabytes_per_s=2039,
        source="NVIDIA A100 Tensor Core GPU data sheet (2021); TF32 for float32",
    ),
    "l40s": Card(
        name="NVIDIA L40S",
        token="L40S",
        tera_per_s={"float32": 183, "float16": 362.05, "bfloat16": 362.05, "fp8": 733, "int8": 733},
        gigabytes_per_s=864,
        source="NVIDIA L40S data sheet (2023), its figures without sparsity; TF32 for float32",
    ),
    "l4": Card(
        name="NVIDIA L4",
        token="L4",
        tera_per_s={"float32": 60, "float16": 121, "bfloat16": 121, "fp8": 242.5, "int8": 242.5},
        gigabytes_per_s=300,
        source="NVIDIA L4 data sheet (2023), half of its figures with sparsity (120, 242 and 485); TF32 for float32",
    ),
    "rtx4090": Card(
        name="NVIDIA GeForce RTX 4090",
        token="RTX 4090",
        tera_per_s={"float32": 82.6, "float16": 165.2, "bfloat16": 165.2, "fp8": 330.3, "int8": 660.6},
        gigabytes_per_s=1008,
        source="NVIDIA Ada GPU architecture white paper V2.01 (2023), appendix A, FP32 accumulation; TF32 for float32",
    ),
    "rtx5090": Card(
        name="NVIDIA GeForce RTX 5090",
        token="RTX 5090",
        tera_per_s={"float32": 104.8, "float16": 209.5, "bfloat16": 209.5, "fp8": 419, "int8": 838},
        gigabytes_per_s=1792,
        source="NVIDIA RTX Blackwell GPU architecture white paper (2025), FP32 accumulation, at 2407 MHz, which cards pass: "
        "products in bfloat16 at up to 240 TFLOP/s were reported; TF32 for float32",
    ),
}
"""Name, as `--predict` takes it -> card."""


def ceilings_of_gpu(name: str) -> tuple[Ceiling, ...]:
    """The data-sheet figures of a GPU by its driver's name ("NVIDIA H100 80GB HBM3"); empty for one that is not listed."""
    card = next((card for card in CARDS.values() if f" {card.token} " in f" {name} "), None)
    if card is None:
        return ()
    rates = {dtype: tera * 1e12 for dtype, tera in card.tera_per_s.items()} | {"copy": card.gigabytes_per_s * 1e9}
    return tuple(Ceiling(kind=kind, per_s=per_s, by=f"data sheet of {card.name}") for kind, per_s in rates.items())


def card_of(name: str) -> Card:
    """Raises: ConfigError naming the cards there are."""
    if name not in CARDS:
        raise ConfigError(f"--predict {name!r} is not known; available: {', '.join(CARDS)}")
    return CARDS[name]

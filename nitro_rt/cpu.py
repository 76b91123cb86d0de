"""This machine's CPU, as far as it decides what an engine computes in."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path

_DECIDING = (
    "avx2",
    "avx_vnni",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_int8",
    "amx_bf16",
    "amx_fp16",
    "asimd",
    "asimdhp",
    "bf16",
    "i8mm",
    "sve",
)
"""Instruction sets that choose kernels and number types, as Linux names them."""
DOT_PRODUCTS = {"avx_vnni", "avx512_vnni", "amx_int8", "i8mm", "asimd"}
"""CPUs with one of these add 8-bit products up in 32 bits. Others (AVX2 alone) saturate at 16 bits on the way."""


def cpu_target(cpuinfo: Path = Path("/proc/cpuinfo")) -> dict[str, str]:
    """Device, architecture and deciding features. The model's name is left out: equal features give equal engines."""
    flags = _fields(cpuinfo)
    present = set((flags.get("flags") or flags.get("Features") or "").split())
    return {
        "device": "cpu",
        "architecture": platform.machine(),
        "features": " ".join(feature for feature in _DECIDING if feature in present),
    }


def has_dot_products(target: Mapping[str, str]) -> bool:
    """Whether the CPU of `cpu_target` multiplies and adds bytes in one instruction, exactly."""
    return bool(DOT_PRODUCTS & set(target["features"].split()))


def saturates(target: Mapping[str, str]) -> bool:
    """Whether sums of products of bytes saturate on the CPU of `cpu_target`; False where the system tells no features."""
    return bool(target["features"]) and not has_dot_products(target)


def cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """For people: the CPU's model name, or the architecture where the system does not tell."""
    return _fields(cpuinfo).get("model name") or platform.processor() or platform.machine()


def _fields(cpuinfo: Path) -> dict[str, str]:
    """The first processor's lines; empty where there is no such file."""
    try:
        first = cpuinfo.read_text(encoding="utf-8", errors="replace").partition("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}

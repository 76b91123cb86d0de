"""The building machine's CPU, as far as it decides what an engine computes in."""

from __future__ import annotations

import platform
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


def cpu_target(cpuinfo: Path = Path("/proc/cpuinfo")) -> dict[str, str]:
    """Device, architecture and deciding features. The model's name is left out: equal features give equal engines."""
    flags = _fields(cpuinfo)
    present = set((flags.get("flags") or flags.get("Features") or "").split())
    return {
        "device": "cpu",
        "architecture": platform.machine(),
        "features": " ".join(feature for feature in _DECIDING if feature in present),
    }


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

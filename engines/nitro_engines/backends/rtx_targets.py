"""The GPU architectures that TensorRT-RTX compiles for."""

from __future__ import annotations

from nitro_rt.errors import ConfigError

CAPABILITIES = {"sm75": (7, 5), "sm80": (8, 0), "sm86": (8, 6), "sm89": (8, 9), "sm120": (12, 0), "sm121": (12, 1)}
"""RTX cards from Turing to Blackwell. Data-centre Hopper and Blackwell (sm90, sm100) are TensorRT proper's."""

FP8_SINCE = (8, 9)


def capabilities(targets: tuple[str, ...]) -> dict[str, tuple[int, int]]:
    """Compute capability by target name, in ascending order.

    Raises: ConfigError for no target or one that TensorRT-RTX does not have.
    """
    known = ", ".join(CAPABILITIES)
    if not targets:
        raise ConfigError(
            f"--backend tensorrt-rtx needs the GPUs to build for: --target sm89 or --target sm86,sm120; available: {known}"
        )
    for target in targets:
        if target not in CAPABILITIES:
            raise ConfigError(f"--target {target} is not one that TensorRT-RTX compiles for; available: {known}")
    return {name: capability for name, capability in CAPABILITIES.items() if name in targets}


def check_precision(targets: tuple[str, ...], precision: str) -> None:
    """What the compiler would refuse after minutes of work. Raises: ConfigError naming the targets that lack the type."""
    lacking = [target for target in targets if precision == "fp8" and CAPABILITIES.get(target, FP8_SINCE) < FP8_SINCE]
    if lacking:
        raise ConfigError(
            f"--precision fp8 needs a GPU with 8-bit floats, sm89 or later; {', '.join(lacking)} has none: "
            "say --precision fp16 or int8, or leave it out of --target"
        )

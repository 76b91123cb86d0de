"""The GPU architectures that TensorRT-RTX compiles for."""

from __future__ import annotations

from nitro_rt.errors import ConfigError

CAPABILITIES = {"sm75": (7, 5), "sm80": (8, 0), "sm86": (8, 6), "sm89": (8, 9), "sm120": (12, 0), "sm121": (12, 1)}
"""RTX cards from Turing to Blackwell. Data-centre Hopper and Blackwell (sm90, sm100) are TensorRT proper's."""


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

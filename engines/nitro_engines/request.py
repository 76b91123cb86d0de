"""What a user asks to be built, and the same with every open choice made."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nitro_engines.models import DEFAULT_MODEL, ModelSource
from nitro_rt.errors import ConfigError
from nitro_rt.schedule import MAX_STEPS

if TYPE_CHECKING:
    from nitro_export import Checkpoint

AUTO = "auto"
PRECISIONS = ("fp32", "fp16", "bf16", "int8", "fp8", AUTO)
MAX_BATCH = 64
MAX_SHIFT = 1000
MAX_GATE_PROMPTS = 16


@dataclass(frozen=True, kw_only=True)
class BuildRequest:
    """The options of `nitro-rt build`. None means: decided from the checkpoint, see `resolved`."""

    model: str = DEFAULT_MODEL
    """A known name, a checkpoint folder, a hub id, or a .safetensors file."""
    base: str | None = None
    """Folder or hub id of the checkpoint that a single file belongs to; None for a whole checkpoint."""
    decoder: str | None = None
    """kl, tiny, or the path of a diffusers VAE; None: the checkpoint's own, of whatever kind."""
    loras: tuple[str, ...] = ()
    """`FILE` or `FILE:SCALE`, fused into the weights before export."""
    steps: tuple[int, ...] = (1,)
    """Step counts that one bundle serves, each from 1 to 4; kept sorted, without repeats."""
    precision: str = "fp32"
    """fp32, fp16 or bf16: the type of the graphs; int8 or fp8: of their quantised operators; auto: the fastest that passes."""
    backend: str = "openvino"
    """openvino, onnxruntime, tensorrt or tensorrt-rtx. The default runs everywhere; tensorrt builds for the GPU of this
    machine."""
    provider: str | None = None
    """What ONNX Runtime runs on: cpu, cuda or tensorrt; None: cpu. For no other backend."""
    targets: tuple[str, ...] = ()
    """GPU architectures, `sm89`; only for tensorrt-rtx, which builds for another machine."""
    sizes_px: tuple[int, ...] = ()
    """Sides of the images that one bundle draws, first the one that it draws unasked, without repeats; empty: the
    checkpoint's own."""
    refit: bool = False
    """Engines of tensorrt and tensorrt-rtx that take new weights when they are loaded (`nitro_engines.lora_refit`)."""
    batch: int = 1
    """Images per call that the engines have room for."""
    shift: int | None = None
    """shifted_timestep, 1 to 1000; None: from the checkpoint."""
    gate_prompts: int = 4
    """Pictures per step count that the bundle is compared with its float32 parent by, before it is published."""
    allow_quality_loss: bool = False
    """Publish a bundle that misses its quality limits, and say so in its manifest."""
    rebuild: bool = False
    """Compile engines that are cached, too, and report whether the same bytes come out."""
    out: Path | None = None
    """The bundle's folder; None: engines/<model>-<steps>step."""

    def __post_init__(self) -> None:
        """Raises: ConfigError for the first option that is wrong."""
        object.__setattr__(self, "steps", _steps(self.steps))
        object.__setattr__(self, "targets", tuple(dict.fromkeys(self.targets)))
        object.__setattr__(self, "loras", tuple(self.loras))
        object.__setattr__(self, "sizes_px", tuple(dict.fromkeys(self.sizes_px)))
        if self.precision not in PRECISIONS:
            raise ConfigError(f"--precision {self.precision!r} is unknown; available: {', '.join(PRECISIONS)}")
        if not 1 <= self.batch <= MAX_BATCH:
            raise ConfigError(f"--batch must be from 1 to {MAX_BATCH}, got {self.batch}")
        if any(size_px < 1 for size_px in self.sizes_px):
            raise ConfigError(f"--size must be positive, got {', '.join(map(str, self.sizes_px))}")
        if self.precision == AUTO and len(self.sizes_px) > 1:
            raise ConfigError(
                "--precision auto measures the engines of one size; name one --size, or a precision: int8 or fp16 for all of "
                f"{', '.join(map(str, self.sizes_px))}"
            )
        if not 1 <= self.gate_prompts <= MAX_GATE_PROMPTS:
            raise ConfigError(f"--gate-prompts must be from 1 to {MAX_GATE_PROMPTS}, got {self.gate_prompts}")
        if self.shift is not None and not 1 <= self.shift <= MAX_SHIFT:
            raise ConfigError(f"--shift must be from 1 to {MAX_SHIFT}, got {self.shift}")

    def resolved(self, source: ModelSource, checkpoint: Checkpoint) -> BuildRequest:
        """This request with sizes, shift and output folder decided.

        Raises: ConfigError if a size does not suit the model, or if nothing says the shift.
        """
        sizes_px, multiple = self.sizes_px or (checkpoint.native_size_px,), checkpoint.size_multiple
        unsuited = [size_px for size_px in sizes_px if size_px % multiple]
        if unsuited:
            raise ConfigError(f"--size must be a multiple of {multiple} pixels for {source.name}, got {unsuited[0]}")
        return dataclasses.replace(
            self,
            sizes_px=sizes_px,
            shift=self._shift(source, checkpoint.run),
            out=Path(self.out or default_out(source.name, self.steps)),
        )

    def _shift(self, source: ModelSource, run: dict[str, Any]) -> int:
        if self.shift is not None:
            return self.shift
        shift = run.get("shifted_timestep", source.shift)
        if shift is None:
            raise ConfigError(
                f"--model {self.model} does not say its timestep shift: its run.json lacks shifted_timestep; "
                "say --shift (250 for NitroSD-Realism, 500 for NitroSD-Vibrant, 1000 for a model without shift)"
            )
        if not isinstance(shift, int) or isinstance(shift, bool) or not 1 <= shift <= MAX_SHIFT:
            raise ConfigError(
                f"{source.name}: run.json has shifted_timestep {shift!r}, it must be from 1 to {MAX_SHIFT}; say --shift"
            )
        return shift


def default_out(name: str, steps: tuple[int, ...]) -> Path:
    """engines/nitro-emoji-1step, engines/nitro-emoji-1-2-4step."""
    return Path("engines") / f"{name}-{'-'.join(map(str, steps))}step"


def _steps(steps: tuple[int, ...]) -> tuple[int, ...]:
    unique = tuple(sorted(set(steps)))
    if not unique or not all(1 <= count <= MAX_STEPS for count in unique):
        raise ConfigError(f"--steps must be one or more of 1 to {MAX_STEPS}, got {', '.join(map(str, steps)) or 'none'}")
    return unique

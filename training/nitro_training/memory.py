"""How much memory a run needs on each device, for one device and for several, and who has it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from nitro_training.costs import Activations, Costs
from nitro_training.recipe import StudentRecipe

GIB = 2**30
LAYOUTS = (("single", 1), ("DDP", 2), ("DDP", 4), ("DDP", 8), ("FSDP", 2), ("FSDP", 4), ("FSDP", 8))
_FP32, _BF16 = 4, 2


@dataclass(frozen=True, kw_only=True)
class Device:
    """An accelerator."""

    name: str
    memory_bytes: int


REFERENCE_DEVICES = tuple(Device(name=f"{gib} GiB", memory_bytes=gib * GIB) for gib in (24, 40, 80, 141))
"""For whom a plan also says whether it fits."""


@dataclass(frozen=True, kw_only=True)
class Reserve:
    """What no count sees: the CUDA context and library workspaces, and what the allocator cannot hand out again."""

    fixed_bytes: int = 2 * GIB
    share: float = 0.1
    """Of what comes and goes within a step."""


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes on one of the devices."""

    layout: str
    """`single`, `DDP` (everything on every device) or `FSDP` (weights and moments cut among the devices)."""
    num_devices: int
    held: Mapping[str, int]
    """What stays over a step."""
    micro_batch: int
    """What a micro-batch needs at its peak."""
    optimizer_step: int
    """What the optimiser's step needs at its peak; the two never meet."""
    reserve: int

    @property
    def total(self) -> int:
        return sum(self.held.values()) + max(self.micro_batch, self.optimizer_step) + self.reserve

    @property
    def where(self) -> str:
        return "1 device" if self.num_devices == 1 else f"each of {self.num_devices} devices ({self.layout})"


def memory_plan(
    recipe: StudentRecipe, costs: Costs, layout: str, num_devices: int, reserve: Reserve | None = None
) -> MemoryPlan:
    """The memory of one device.

    Args:
        layout: `single`, `DDP` or `FSDP`.
    """
    config, parameters, reserve = recipe.student, costs.parameters, reserve or Reserve()
    frozen = _BF16 if config.precision == "bf16" else _FP32
    whole, share = _FP32 * parameters.student, num_devices if layout == "FSDP" else 1
    weights = whole // share
    held = {
        "master weights": weights,
        "AdamW moments": 2 * weights,
        # FSDP cuts gradients only when it averages them, which is in the last micro-batch.
        "gradients": whole if config.accumulation > 1 else weights,
        "DDP's buckets": whole if layout == "DDP" else 0,
        "FSDP's open blocks": _FP32 * parameters.open_blocks if layout == "FSDP" else 0,
        "EMA": weights if config.ema_decay else 0,
        "backbone": frozen * parameters.backbone,
        "teacher, text, VAE": frozen * (parameters.teacher + parameters.text_encoders + parameters.vae),
        # Drawn heads stay, with their gradients, until the step ends; at most the whole pool.
        "drawn heads": 2 * _FP32 * min(parameters.pool, config.accumulation * parameters.drawn_heads),
    }
    peak = activations(recipe, costs).peak
    return MemoryPlan(
        layout=layout,
        num_devices=num_devices,
        held=held,
        micro_batch=peak,
        optimizer_step=weights,  # torch's AdamW takes all tensors at once on CUDA: its denominators are one more copy
        reserve=reserve.fixed_bytes + round(reserve.share * max(peak, weights)),
    )


def activations(recipe: StudentRecipe, costs: Costs) -> Activations:
    """Those of the recipe's own choice."""
    return costs.recomputed if recipe.student.recompute else costs.kept


def host_bytes(costs: Costs) -> int:
    """The pool with its moments, on the host of each process."""
    return 3 * _FP32 * costs.parameters.pool


def state_bytes(recipe: StudentRecipe, costs: Costs) -> int:
    """A whole state on the disk: student, moments, average, pool."""
    copies = 4 if recipe.student.ema_decay else 3
    return copies * _FP32 * costs.parameters.student + host_bytes(costs)


def cache_bytes(recipe: StudentRecipe, costs: Costs) -> int:
    """The teacher's samples on the disk, where they are cached: float16 latents."""
    return recipe.teacher.cache_samples * 4 * costs.side**2 * 2


def find_devices() -> tuple[Device, ...]:
    """The CUDA devices of this machine."""
    if not torch.cuda.is_available():
        return ()
    properties = (torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count()))
    return tuple(Device(name=one.name, memory_bytes=one.total_memory) for one in properties)


def verdict(plans: Sequence[MemoryPlan], devices: Sequence[Device]) -> str:
    """`go: ...` or `no-go: ...` for the devices found, with what decides it."""
    if not devices:
        needs = ", ".join(f"{in_gib(one.total)} on {one.where}" for one in plans if one.layout != "DDP")
        return f"no-go: no CUDA device found; needs {needs}"
    smallest = min(devices, key=lambda device: device.memory_bytes)
    usable = [one for one in plans if one.num_devices <= len(devices)]
    fitting = [one for one in usable if one.total <= smallest.memory_bytes]
    found = f"{len(devices)} x {smallest.name} with {in_gib(smallest.memory_bytes)} found"
    if fitting:
        best = max(fitting, key=lambda one: (one.num_devices, one.layout == "DDP"))
        return f"go: needs {in_gib(best.total)} on {best.where}; {found}"
    least = min(usable, key=lambda one: one.total)
    return f"no-go: needs {in_gib(least.total)} on {least.where}; {found}"


def in_gib(count: int) -> str:
    return f"{count / GIB:.1f} GiB"

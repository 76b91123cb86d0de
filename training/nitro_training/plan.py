"""What a run of a student recipe would be: parameters, FLOPs, memory, and whether the devices found can hold it.

Everything is measured on meta tensors: no weights are read and nothing is allocated, so it runs anywhere.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nitro_training.costs import Costs, as_mapping, measure
from nitro_training.memory import (
    GIB,
    LAYOUTS,
    REFERENCE_DEVICES,
    Device,
    MemoryPlan,
    cache_bytes,
    find_devices,
    host_bytes,
    in_gib,
    memory_plan,
    state_bytes,
    verdict,
)
from nitro_training.model import LATENT_PX
from nitro_training.recipe import StudentRecipe
from nitro_training.sdxl_config import read_configs


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """Everything that a dry run says."""

    recipe: StudentRecipe
    configs: str
    """Where the networks' shapes are from."""
    costs: Costs
    memory: tuple[MemoryPlan, ...]
    devices: tuple[Device, ...]
    """Those found."""
    verdict: str
    """`go: ...` or `no-go: ...`."""

    @property
    def is_go(self) -> bool:
        return self.verdict.startswith("go:")


def plan(recipe: StudentRecipe, devices: Sequence[Device] | None = None) -> TrainingPlan:
    """Plan a run.

    Args:
        devices: as if these were here; None looks for CUDA devices.
    Raises: ConfigError if the recipe's crops or feature levels do not fit the model, TrainingError if the checkpoint's
        folder is there but damaged.
    """
    found = tuple(find_devices() if devices is None else devices)
    configs = read_configs(Path(recipe.teacher.checkpoint))
    costs = measure(recipe, configs)
    memory = tuple(memory_plan(recipe, costs, layout, count) for layout, count in LAYOUTS)
    return TrainingPlan(
        recipe=recipe, configs=configs.source, costs=costs, memory=memory, devices=found, verdict=verdict(memory, found)
    )


def to_json(found: TrainingPlan) -> str:
    """The plan for a program; sizes in bytes."""
    data = dataclasses.asdict(found)
    for row, one in zip(data["memory"], found.memory, strict=True):
        row["total"] = one.total
    return json.dumps(data | {"is_go": found.is_go}, indent=2)


def render(found: TrainingPlan) -> str:
    """The plan in plain lines."""
    name, size = found.recipe.run.name, found.costs.side * LATENT_PX
    sections = (
        [f"{name}: a student at {size}x{size}; shapes: {found.configs}"],
        _parameters(found.costs),
        _flops(found),
        _activations(found),
        _memory(found),
        [found.verdict],
    )
    return "\n\n".join("\n".join(section) for section in sections)


def _parameters(costs: Costs) -> list[str]:
    counts = dict(as_mapping(costs.parameters))
    heads = f"{counts.pop('num heads')} heads in the pool, {counts.pop('num drawn')} drawn per micro-batch"
    return ["parameters in millions", *(_row(name, f"{count / 1e6:.1f}") for name, count in counts.items()), f"  {heads}"]


def _flops(found: TrainingPlan) -> list[str]:
    config, costs = found.recipe.student, found.costs
    cached = f"\n  the teacher's samples, once: {costs.flops_of_cache / 1e18:.2f} EFLOP" if costs.flops_of_cache else ""
    days = costs.flops_per_step * config.num_steps / 1e14 / 86400
    return [
        f"TFLOP per micro-batch of {config.batch} (two per multiply-add; matrix products, convolutions, attention)",
        *(_row(name, f"{count / 1e12:.2f}") for name, count in as_mapping(costs.flops).items()),
        _row("total", f"{costs.flops.total / 1e12:.2f}"),
        f"  one optimiser step, {config.accumulation} micro-batches: {costs.flops_per_step / 1e15:.2f} PFLOP on each device",
        f"  all {config.num_steps} steps: {days:.1f} days at every 100 TFLOP/s that a device sustains{cached}",
    ]


def _activations(found: TrainingPlan) -> list[str]:
    config, costs = found.recipe.student, found.costs
    rows = {name: (count,) for name, count in as_mapping(costs.recomputed).items()}
    kept = as_mapping(costs.kept)
    return [
        f"GiB that a micro-batch keeps for its backward pass (student.recompute = {str(config.recompute).lower()})",
        _row("", "false", "true"),
        *(_row(name, _gib(kept[name]), _gib(count)) for name, (count,) in rows.items()),
        _row("peak", _gib(costs.kept.peak), _gib(costs.recomputed.peak)),
    ]


def _memory(found: TrainingPlan) -> list[str]:
    plans = found.memory
    names = [name for name in plans[0].held if any(one.held[name] for one in plans)]
    smallest = min(found.devices, key=lambda device: device.memory_bytes, default=None)
    asked = (smallest, *REFERENCE_DEVICES) if smallest else REFERENCE_DEVICES
    return [
        "GiB on each device",
        _row("", *("1" if one.num_devices == 1 else f"{one.layout} {one.num_devices}" for one in plans)),
        *(_row(name, *(_gib(one.held[name]) for one in plans)) for name in names),
        _row("micro-batch's peak", *(_gib(one.micro_batch) for one in plans)),
        _row("or optimiser's step", *(_gib(one.optimizer_step) for one in plans)),
        _row("reserve", *(_gib(one.reserve) for one in plans)),
        _row("total", *(_gib(one.total) for one in plans)),
        *(_row(f"on {one.name}", *("go" if p.total <= one.memory_bytes else "no" for p in plans)) for one in asked),
        f"  beside it, on the host of each process: {in_gib(host_bytes(found.costs))} for the pool with its moments",
        f"  on the disk: {in_gib(2 * state_bytes(found.recipe, found.costs))} for the run's state and the next one, "
        f"{in_gib(cache_bytes(found.recipe, found.costs))} for cached samples",
    ]


def _row(name: str, *values: str) -> str:
    return f"  {name:<24}" + "".join(f"{value:>9}" for value in values)


def _gib(count: int) -> str:
    return f"{count / GIB:.2f}"

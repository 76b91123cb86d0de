"""The floor of each stage: what its counted work takes at the machine's ceilings, and how near the measured time comes.

A stage can be no faster than its operations at the rate of their type, nor than its weights, inputs and outputs through memory:
`floor_ms` is the larger of the two. `operator_floor_ms` goes operator by operator with each one's own operands and result: what
perfect kernels reach when everything between the products is fused into them and nothing stays in a cache from one to the next.
On a small model caches do hold operands, so that figure can be beaten; the first cannot.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from nitro_bench.cards import Card
from nitro_bench.ceilings import Ceiling
from nitro_bench.flops import NotCountable, Work, work_of_file
from nitro_rt.bundle import Bundle
from nitro_rt.manifest import Engine

QUANTISED = ("int8", "fp8")
Number = TypeVar("Number", int, float)


@dataclass(frozen=True, kw_only=True)
class Floor:
    """One stage at some ceilings."""

    floor_ms: float | None
    """None where `note` says why not."""
    operator_floor_ms: float | None
    bound: str
    """What `floor_ms` is made of: `compute` or `memory`."""
    note: str


@dataclass(frozen=True, kw_only=True)
class StageWork:
    """One stage of one image call: its work, its floor here, and what was measured."""

    stage: str
    """text, denoise, decode; device for all three, where a GPU times them as one."""
    runs: int
    """Times that the graph runs for a call: the denoiser's number of steps. All counts below are for the whole call."""
    flops: int | None
    """None where `note` says why it cannot be counted."""
    flops_by_dtype: dict[str, int]
    """What is multiplied, as this machine computes it."""
    io_bytes: int | None
    operator_bytes: int | None
    floor_ms: float | None
    operator_floor_ms: float | None
    bound: str
    measured_ms: float | None
    """Median; None where a device tells only the whole."""
    achieved_share: float | None
    """`floor_ms` over `measured_ms`: 1 would be perfect."""
    note: str


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The floor of a call on a card that is not here."""

    card: str
    source: str
    floor_ms: dict[str, float | None]
    """Stage -> milliseconds."""
    operator_floor_ms: dict[str, float | None]
    total_ms: float | None
    """Sum of the floors."""
    operator_total_ms: float | None
    note: str


def count_stages(bundle: Bundle, num_steps: int) -> dict[str, Work | str]:
    """Stage -> its work, once through the graph, or why it cannot be counted. `bundle` holds one size."""
    manifest = bundle.manifest
    engines = {"text": manifest.text, "denoise": manifest.denoise[num_steps], "decode": manifest.decode}
    return {stage: _count(bundle, engine) for stage, engine in engines.items()}


def dtypes_of(works: Mapping[str, Work | str], compute_dtypes: Mapping[str, str]) -> set[str]:
    """The types whose ceilings are needed."""
    return {
        executed(operator.dtype, compute_dtypes.get(stage, ""))
        for stage, work in works.items()
        if isinstance(work, Work)
        for operator in work.operators
    }


def executed(graph_dtype: str, compute_dtype: str) -> str:
    """What an operator is computed in: quantised ones as the graph says, the rest as the stage's engine does here."""
    return graph_dtype if graph_dtype in QUANTISED or not compute_dtype else compute_dtype


def stage_works(
    works: Mapping[str, Work | str],
    num_steps: int,
    ceilings: Iterable[Ceiling],
    compute_dtypes: Mapping[str, str],
    measured_ms: Mapping[str, float],
) -> tuple[StageWork, ...]:
    """Every stage beside its floor.

    Args:
        compute_dtypes: stage -> what its engine computes in here.
        measured_ms: stage -> median.
    """
    rates = {ceiling.kind: ceiling.per_s for ceiling in ceilings}
    found = [
        _stage_work(stage, work, _runs(stage, num_steps), rates, compute_dtypes.get(stage, ""), measured_ms.get(stage))
        for stage, work in works.items()
    ]
    if "device" in measured_ms:
        found.append(_whole(found, measured_ms["device"]))
    return tuple(found)


def _runs(stage: str, num_steps: int) -> int:
    return num_steps if stage == "denoise" else 1


def _whole(parts: Sequence[StageWork], measured_ms: float) -> StageWork:
    """All stages as one, for a device that times them so; its floor is the sum of theirs."""
    floor_ms = _sum(part.floor_ms for part in parts)
    by_dtype: dict[str, int] = {}
    for part in parts:
        for dtype, flops in part.flops_by_dtype.items():
            by_dtype[dtype] = by_dtype.get(dtype, 0) + flops
    return StageWork(
        stage="device",
        runs=1,
        flops=_sum(part.flops for part in parts),
        flops_by_dtype=by_dtype,
        io_bytes=_sum(part.io_bytes for part in parts),
        operator_bytes=_sum(part.operator_bytes for part in parts),
        floor_ms=floor_ms,
        operator_floor_ms=_sum(part.operator_floor_ms for part in parts),
        bound="" if floor_ms is None else "sum",
        measured_ms=measured_ms,
        achieved_share=None if floor_ms is None else floor_ms / measured_ms,
        note="; ".join(dict.fromkeys(part.note for part in parts if part.note)),
    )


def predict(works: Mapping[str, Work | str], num_steps: int, card: Card) -> Prediction:
    """The floors on `card`, in the types that the graphs themselves have."""
    rates: dict[str, float | None] = {dtype: tera * 1e12 for dtype, tera in card.tera_per_s.items()}
    rates["copy"] = card.gigabytes_per_s * 1e9
    floors = {stage: _floor(work, _runs(stage, num_steps), rates, "") for stage, work in works.items()}
    return Prediction(
        card=card.name,
        source=card.source,
        floor_ms={stage: floor.floor_ms for stage, floor in floors.items()},
        operator_floor_ms={stage: floor.operator_floor_ms for stage, floor in floors.items()},
        total_ms=_sum(floor.floor_ms for floor in floors.values()),
        operator_total_ms=_sum(floor.operator_floor_ms for floor in floors.values()),
        note="; ".join(dict.fromkeys(floor.note for floor in floors.values() if floor.note)),
    )


def _count(bundle: Bundle, engine: Engine) -> Work | str:
    path: Path = bundle.path(engine.files[0])
    if path.suffix != ".onnx":
        return f"the engine is a {engine.backend} plan ({path.suffix}), and the graph it was made from is not in the bundle"
    try:
        return work_of_file(path)
    except ModuleNotFoundError as exc:
        return f"counting reads ONNX, and the package {exc.name} is not installed; pip install 'nitro-rt[export]'"
    except NotCountable as exc:
        return str(exc)


def _stage_work(
    stage: str, work: Work | str, runs: int, rates: Mapping[str, float | None], compute_dtype: str, measured_ms: float | None
) -> StageWork:
    floor = _floor(work, runs, rates, compute_dtype)
    by_dtype: dict[str, int] = {}
    if isinstance(work, Work):
        for dtype, flops in work.flops_by("dtype").items():
            name = executed(dtype, compute_dtype)
            by_dtype[name] = by_dtype.get(name, 0) + runs * flops
    return StageWork(
        stage=stage,
        runs=runs,
        flops=runs * work.flops if isinstance(work, Work) else None,
        flops_by_dtype=by_dtype,
        io_bytes=runs * work.io_bytes if isinstance(work, Work) else None,
        operator_bytes=runs * work.operator_bytes if isinstance(work, Work) else None,
        floor_ms=floor.floor_ms,
        operator_floor_ms=floor.operator_floor_ms,
        bound=floor.bound,
        measured_ms=measured_ms,
        achieved_share=None if floor.floor_ms is None or measured_ms is None else floor.floor_ms / measured_ms,
        note=floor.note,
    )


def _floor(work: Work | str, runs: int, rates: Mapping[str, float | None], compute_dtype: str) -> Floor:
    if isinstance(work, str):
        return Floor(floor_ms=None, operator_floor_ms=None, bound="", note=work)
    bandwidth = rates.get("copy")
    dtypes = {operator.dtype: executed(operator.dtype, compute_dtype) for operator in work.operators}
    missing = sorted({name for name in dtypes.values() if not rates.get(name)})
    if missing or not bandwidth:
        lacking = ", ".join(missing) or "memory"
        return Floor(floor_ms=None, operator_floor_ms=None, bound="", note=f"no ceiling is known for {lacking}")

    def seconds(flops: int, dtype: str) -> float:
        return flops / (rates[dtypes[dtype]] or 1.0)

    compute_s = sum(seconds(operator.flops, operator.dtype) for operator in work.operators)
    memory_s = work.io_bytes / bandwidth
    each_s = [max(seconds(op.flops, op.dtype), op.num_bytes / bandwidth) for op in work.operators]
    return Floor(
        floor_ms=1e3 * runs * max(compute_s, memory_s),
        operator_floor_ms=1e3 * runs * max(sum(each_s), memory_s),
        bound="compute" if compute_s >= memory_s else "memory",
        note="",
    )


def _sum(values: Iterable[Number | None]) -> Number | None:
    """None as soon as one is missing."""
    total: Number | None = None
    for value in values:
        if value is None:
            return None
        total = value if total is None else total + value
    return total


def sentences(works: Iterable[StageWork]) -> Iterator[str]:
    """One line per stage, for people."""
    for work in works:
        measured = "not timed alone" if work.measured_ms is None else f"measured {work.measured_ms:.2f} ms"
        if work.flops is None or work.floor_ms is None:
            yield f"{work.stage}: {measured}; no floor: {work.note}"
            continue
        share = "" if work.achieved_share is None else f": {work.achieved_share:.0%} of what the machine can do"
        yield f"{work.stage}: {work.flops / 1e9:.2f} GFLOP, floor {work.floor_ms:.2f} ms ({work.bound}), {measured}{share}"

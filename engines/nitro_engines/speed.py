"""The speed gate: is a quantised stage faster than its float parent on this machine? Measured in turn, A B A B.

A stage is chosen in its quantised form only where the whole 95 % interval of the ratio lies below 1. What shares the machine
slows both calls of a pair, so ratios of pairs are steadier than ratios of medians.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nitro_engines.cache import EngineCache
from nitro_engines.files import Report, foreign_errors, runtime_sha256, source_sha256
from nitro_engines.keys import key_of
from nitro_rt.cpu import cpu_name, cpu_target
from nitro_rt.errors import BundleError, ConfigError
from nitro_rt.manifest import SCHEMA_VERSION, Engine, SpeedResult, TensorSpec, from_json
from nitro_rt.providers import GPU_PROVIDERS, PROVIDERS
from nitro_rt.session import Session, SessionFactory

MIN_PAIRS, MAX_PAIRS = 6, 25
"""Six is the fewest whose extremes hold the median with 95 % confidence."""
MAX_SECONDS = 60.0
"""Per stage, once there are `MIN_PAIRS`: a full-size stage takes longer than all of this for one call."""
FLOAT_PRECISIONS = {"openvino": "fp16", "onnxruntime": "fp32"}
"""Backend -> its fastest float precision on a CPU. OpenVINO computes float16 graphs in what the CPU has; ONNX Runtime puts
casts around every operator of one."""
QUANTISED_FOR_AUTO = "int8"
"""CPUs have no arithmetic in FP8."""

Engines = Mapping[str, Engine]


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """Times of two calls, pair by pair."""

    first_ms: float
    """Median of the first."""
    second_ms: float
    value: float
    """First to second: median of the pairs' ratios."""
    low: float
    high: float
    num_pairs: int


def require_measurable(backend: str, provider: str | None = None) -> None:
    """Raises: ConfigError for engines that cannot be timed where they are built, or not on a CPU."""
    if _is_measurable(backend, provider):
        return
    if backend not in FLOAT_PRECISIONS:
        raise ConfigError(
            f"--precision auto times engines on this machine, and {backend} engines do not run here; choose one: --precision "
            f"fp16 or --precision int8, or a backend that runs here: {', '.join(FLOAT_PRECISIONS)}"
        )
    raise ConfigError(
        f"--precision auto times engines on this machine's CPU, and --provider {provider} runs them on a GPU; choose one: "
        "--precision fp16 or --precision int8. To find the faster one, build both and time them with nitro-rt bench"
    )


def not_measured(precision: str, backend: str, provider: str | None = None) -> str:
    """One line for people about a build of a quantised precision that was named, not chosen by its speed."""
    is_here = _is_measurable(backend, provider)
    rival = FLOAT_PRECISIONS[backend] if is_here else "fp16"
    auto = "--precision auto takes it only where it is; or " if is_here and precision == QUANTISED_FOR_AUTO else ""
    return (
        f"speed: whether {precision} is faster than {rival} was not measured; {auto}build --precision {rival}, too, and time "
        "both with nitro-rt bench"
    )


def _is_measurable(backend: str, provider: str | None) -> bool:
    # An unknown provider is refused by the backend, in its own words.
    on_gpu = backend == "onnxruntime" and PROVIDERS.get(provider or "cpu") in GPU_PROVIDERS
    return backend in FLOAT_PRECISIONS and not on_gpu


@dataclass(frozen=True, kw_only=True)
class SpeedRecord:
    """What the cache keeps."""

    schema_version: int
    results: tuple[SpeedResult, ...]


def compare_stages(
    quantised: Engines, parents: Engines, cache: EngineCache, report: Report, open_session: SessionFactory | None = None
) -> tuple[SpeedResult, ...]:
    """Time the denoiser of the fewest steps (the others differ in constants only) and the decoder; once, then from the cache.

    Args:
        quantised, parents: engines by stage, of one backend, with their files in `cache`.
    Returns: one result per stage, whose `chosen` is the faster's precision.
    """
    keys = [{stage: engine.key for stage, engine in engines.items()} for engines in (quantised, parents)]
    code = [source_sha256(Path(__file__)), runtime_sha256()]
    key = key_of({"engines": keys, "cpu": cpu_name(), "machine": cpu_target(), "code": code})
    with cache.making(key, "this comparison of speed", report) as work:
        results = _known(cache, key)
        if results is None:
            results = _timed(quantised, parents, cache, open_session)
            record = SpeedRecord(schema_version=SCHEMA_VERSION, results=results)
            cache.store_record("speeds", key, dataclasses.asdict(record), work)
    for result in results:
        report(sentence(result))
    return results


def _known(cache: EngineCache, key: str) -> tuple[SpeedResult, ...] | None:
    record = cache.find_record("speeds", key)
    try:
        return None if record is None else from_json(SpeedRecord, json.dumps(record), where=key).results
    except BundleError:
        return None  # damaged: measured again


def _timed(
    quantised: Engines, parents: Engines, cache: EngineCache, open_session: SessionFactory | None
) -> tuple[SpeedResult, ...]:
    first = min((stage for stage in parents if stage.startswith("denoise/")), key=lambda stage: int(stage.partition("/")[2]))
    results = []
    for stage in (first, "decode"):
        left, right = quantised[stage], parents[stage]
        factory = open_session or _factory(left.backend)
        with foreign_errors(f"timing {stage}", cache.root), ExitStack() as sessions:
            first_call, second_call = (_call(stage, engine, cache, factory, sessions) for engine in (left, right))
            ratio = time_pairs(first_call, second_call)
        results.append(_result(stage, left, right, ratio))
    return tuple(results)


def sentence(result: SpeedResult) -> str:
    """One line for people."""
    return (
        f"speed, {result.stage}: {result.precision} {result.milliseconds:.1f} ms, {result.parent_precision} "
        f"{result.parent_milliseconds:.1f} ms, ratio {result.ratio:.2f} [{result.ratio_low:.2f}, {result.ratio_high:.2f}] over "
        f"{result.num_pairs} pairs: {result.chosen} is chosen, {result.reason}"
    )


def time_pairs(first: Callable[[], None], second: Callable[[], None], clock: Callable[[], float] = time.perf_counter) -> Ratio:
    """Call both in turn, once to warm up and then in pairs, until the time is used up."""
    first()
    second()
    pairs: list[tuple[float, float]] = []
    started = clock()
    while len(pairs) < MIN_PAIRS or (len(pairs) < MAX_PAIRS and clock() - started < MAX_SECONDS):
        pairs.append((_seconds(first, clock), _seconds(second, clock)))
    low, high = median_interval([left / right for left, right in pairs])
    return Ratio(
        first_ms=statistics.median(left for left, _ in pairs) * 1e3,
        second_ms=statistics.median(right for _, right in pairs) * 1e3,
        value=statistics.median(left / right for left, right in pairs),
        low=low,
        high=high,
        num_pairs=len(pairs),
    )


def median_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """A distribution-free interval of the median: the innermost two order statistics that hold it with `level`.

    Source: David & Nagaraja 2003, Order Statistics, section 7.1: the number of values below the median is binomial.
    """
    count, ordered = len(values), sorted(values)
    outside, skipped = 0.0, 0
    for place in range(count // 2):
        outside += 2 * math.comb(count, place) / 2**count
        if outside > 1 - level:
            break
        skipped = place
    return ordered[skipped], ordered[count - 1 - skipped]


def combinations(results: Sequence[SpeedResult]) -> Iterator[tuple[str, ...]]:
    """Which stages to take quantised, fastest first, as far as they are faster: all of them, then fewer, then none."""
    faster = [result for result in results if result.chosen == result.precision]
    saved = sorted(faster, key=lambda result: result.milliseconds - result.parent_milliseconds)
    for kept in range(len(saved), 0, -1):
        yield tuple(result.stage for result in saved[:kept])
    yield ()


def final_results(results: Sequence[SpeedResult], stages: Sequence[str]) -> tuple[SpeedResult, ...]:
    """The results for the manifest, where only `stages` are taken quantised in the end."""
    return tuple(
        result
        if result.stage in stages or result.chosen == result.parent_precision
        else dataclasses.replace(
            result, chosen=result.parent_precision, reason=f"{result.precision} is faster, but misses the quality limits"
        )
        for result in results
    )


def _result(stage: str, quantised: Engine, parent: Engine, ratio: Ratio) -> SpeedResult:
    is_faster = ratio.high < 1
    return SpeedResult(
        stage=stage,
        precision=quantised.precision,
        parent_precision=parent.precision,
        milliseconds=round(ratio.first_ms, 3),
        parent_milliseconds=round(ratio.second_ms, 3),
        ratio=round(ratio.value, 4),
        ratio_low=round(ratio.low, 4),
        ratio_high=round(ratio.high, 4),
        num_pairs=ratio.num_pairs,
        device=cpu_name(),
        chosen=quantised.precision if is_faster else parent.precision,
        reason="it is faster" if is_faster else f"{quantised.precision} is not faster here",
    )


def _call(
    stage: str, engine: Engine, cache: EngineCache, open_session: SessionFactory, sessions: ExitStack
) -> Callable[[], None]:
    session: Session = open_session(stage, engine, tuple(cache.path(reference) for reference in engine.files))
    random = np.random.default_rng(0)
    buffers = {spec.name: _filled(spec, random) for spec in (*engine.inputs, *engine.outputs)}

    def close(owned: Mapping[str, object]) -> None:  # the caller owns the buffers while the session is open
        session.close()

    sessions.callback(close, buffers)
    session.bind(buffers)
    return session.execute


def _filled(spec: TensorSpec, random: np.random.Generator) -> np.ndarray[Any, Any]:
    """Normal values, which latents, embeddings and noise are near to; zeros for indices."""
    if np.issubdtype(np.dtype(spec.dtype), np.floating):
        return random.standard_normal(spec.shape).astype(spec.dtype)
    return np.zeros(spec.shape, spec.dtype)


def _factory(backend: str) -> SessionFactory:
    require_measurable(backend)
    if backend == "openvino":
        from nitro_rt.openvino_session import OpenVinoSession

        return OpenVinoSession
    from nitro_rt.onnxruntime_session import OnnxRuntimeSession

    return OnnxRuntimeSession


def _seconds(call: Callable[[], None], clock: Callable[[], float]) -> float:
    started = clock()
    call()
    return clock() - started

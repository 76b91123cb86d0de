"""The speed gate, with engines whose speed is made up, and one real comparison of two float precisions."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nitro_export
from nitro_engines import BuildRequest, build, plan
from nitro_engines.backends import load_backend
from nitro_engines.bundle import bundle_from_graphs, engines_from_graphs
from nitro_engines.cache import EngineCache
from nitro_engines.gate import QualityMissed
from nitro_engines.graphs import read_graphs
from nitro_engines.speed import (
    MAX_PAIRS,
    MAX_SECONDS,
    MIN_PAIRS,
    combinations,
    compare_stages,
    median_interval,
    not_measured,
    time_pairs,
)
from nitro_rt.bundle import open_bundle
from nitro_rt.errors import BundleError, ConfigError
from nitro_rt.manifest import BUNDLE_FILE, EXPORT_FILE, Engine, SpeedResult, to_json
from nitro_rt.verify import verify_bundle


class Clock:
    """Time passes where a fake session runs, and nowhere else."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def call(self, *seconds: float) -> Callable[[], None]:
        """A call that takes these times in turn."""
        count = 0

        def run() -> None:
            nonlocal count
            self.now += seconds[count % len(seconds)]
            count += 1

        return run


def test_pairs_are_timed_in_turn() -> None:
    clock = Clock()
    found = time_pairs(clock.call(0.5), clock.call(1.0), clock)
    assert found.num_pairs == MAX_PAIRS and found.value == found.low == found.high == 0.5
    assert (found.first_ms, found.second_ms) == (500.0, 1000.0)


def test_what_slows_both_leaves_the_ratio() -> None:
    clock = Clock()
    found = time_pairs(clock.call(0.5, 0.5, 5.0), clock.call(1.0, 1.0, 10.0), clock)
    assert found.value == found.low == found.high == 0.5


def test_the_time_is_bounded() -> None:
    clock = Clock()
    found = time_pairs(clock.call(MAX_SECONDS), clock.call(MAX_SECONDS), clock)
    assert found.num_pairs == MIN_PAIRS and clock.now == (MIN_PAIRS + 1) * 2 * MAX_SECONDS


@pytest.mark.parametrize(("count", "skipped"), [(6, 0), (8, 0), (9, 1), (15, 3), (25, 7)])
def test_the_interval_of_a_median(count: int, skipped: int) -> None:
    """The order statistics of textbook tables; and it holds the median as often as it says."""
    values = [float(value) for value in range(count)]
    assert median_interval(values[::-1]) == (skipped, count - 1 - skipped)
    intervals = [median_interval(draw) for draw in np.random.default_rng(0).standard_normal((2000, count)).tolist()]
    assert np.mean([low <= 0 <= high for low, high in intervals]) > 0.94


def fake_sessions(monkeypatch: pytest.MonkeyPatch, seconds: dict[tuple[str, str], float]) -> list[tuple[str, str]]:
    """Sessions that take the seconds of their (stage, precision); the clock of the speed gate is theirs."""
    clock, opened = Clock(), []

    class FakeSession:
        compute_dtype = "float32"

        def __init__(self, stage: str, engine: Engine, paths: tuple[Path, ...]) -> None:
            assert all(path.is_file() for path in paths)
            self.key = (stage, engine.precision)
            opened.append(self.key)

        def bind(self, buffers: dict[str, Any]) -> None:
            assert all(np.isfinite(buffer).all() for buffer in buffers.values())

        def execute(self) -> None:
            clock.now += seconds[self.key]

        def close(self) -> None: ...

    monkeypatch.setattr("nitro_engines.speed._factory", lambda backend: FakeSession)
    monkeypatch.setattr("nitro_engines.speed.time_pairs", lambda first, second: time_pairs(first, second, clock))
    return opened


def as_precision(graphs: Path, precision: str) -> Path:
    """The folder under another precision's name: hand-made graphs stand in for quantised ones."""
    manifest = dataclasses.replace(read_graphs(graphs), precision=precision)
    (graphs / EXPORT_FILE).write_text(to_json(manifest), encoding="utf-8")
    return graphs


@pytest.fixture
def folders(make_graphs: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Float graphs, and "int8" ones of the same checkpoint, which nothing looks into here."""
    monkeypatch.setattr("nitro_engines.engines._check_graph", lambda *_: None)
    float_ones, quantised = make_graphs("float", steps=(1, 2)), as_precision(make_graphs("int8", steps=(1, 2)), "int8")
    return float_ones, quantised


FASTER_DENOISER = {("denoise/1", "int8"): 1.0, ("denoise/1", "fp32"): 2.0, ("decode", "int8"): 1.0, ("decode", "fp32"): 0.9}


def test_a_stage_that_is_not_faster_is_said_and_not_chosen(
    folders: tuple[Path, Path], cache: EngineCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, lines = fake_sessions(monkeypatch, FASTER_DENOISER), []
    parents, quantised = (engines_from_graphs(folder, load_backend("onnxruntime"), cache) for folder in folders)
    denoise, decode = compare_stages(quantised, parents, cache, lines.append)
    assert (denoise.stage, denoise.chosen, denoise.ratio, denoise.reason) == ("denoise/1", "int8", 0.5, "it is faster")
    assert (decode.chosen, decode.ratio_low > 1, decode.reason) == ("fp32", True, "int8 is not faster here")
    assert lines[1].startswith("speed, decode: int8 1000.0 ms, fp32 900.0 ms, ratio 1.11 [1.11, 1.11] over ")
    assert lines[1].endswith("pairs: fp32 is chosen, int8 is not faster here")
    again = compare_stages(quantised, parents, cache, lines.append)
    assert again == (denoise, decode) and len(opened) == 4 and len(lines) == 4  # from the cache, and said again
    monkeypatch.setattr("nitro_engines.speed.runtime_sha256", lambda: "0" * 64)
    compare_stages(quantised, parents, cache, lines.append)
    assert len(opened) == 8


def test_an_interval_that_holds_one_chooses_the_parent(
    folders: tuple[Path, Path], cache: EngineCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    calls = iter([clock.call(0.8, 0.9, 1.2), clock.call(1.0)] * 2)
    fake_sessions(monkeypatch, {})
    monkeypatch.setattr("nitro_engines.speed.time_pairs", lambda *_: time_pairs(next(calls), next(calls), clock))
    parents, quantised = (engines_from_graphs(folder, load_backend("onnxruntime"), cache) for folder in folders)
    result = compare_stages(quantised, parents, cache, print)[0]
    assert result.ratio < 1 <= result.ratio_high and result.chosen == "fp32"


def speed_result(stage: str, milliseconds: float, parent: float) -> SpeedResult:
    return SpeedResult(
        stage=stage,
        precision="int8",
        parent_precision="fp32",
        milliseconds=milliseconds,
        parent_milliseconds=parent,
        ratio=milliseconds / parent,
        ratio_low=milliseconds / parent,
        ratio_high=milliseconds / parent,
        num_pairs=6,
        device="here",
        chosen="int8" if milliseconds < parent else "fp32",
        reason="",
    )


def test_the_fastest_combination_comes_first() -> None:
    denoise, decode = speed_result("denoise/1", 50, 90), speed_result("decode", 100, 190)
    assert list(combinations([denoise, decode])) == [("decode", "denoise/1"), ("decode",), ()]
    assert list(combinations([denoise, speed_result("decode", 100, 90)])) == [("denoise/1",), ()]


def test_a_bundle_of_two_precisions(folders: tuple[Path, Path], cache: EngineCache, tmp_path: Path) -> None:
    floats, quantised = folders
    denoisers = {f"denoise/{count}": quantised for count in (1, 2)}
    speed = (speed_result("denoise/1", 1, 2),)
    backend = load_backend("onnxruntime")
    mixed = bundle_from_graphs(floats, tmp_path / "out", backend, cache, stages_from=denoisers, speed_gate=speed).manifest
    assert (mixed.text.precision, mixed.denoise[1].precision, mixed.denoise[2].precision, mixed.decode.precision) == (
        "fp32",
        "int8",
        "int8",
        "fp32",
    )
    assert mixed.engine_key_fields["precision"]["denoise/2"] == "int8" and mixed.speed_gate == speed
    assert open_bundle(tmp_path / "out").manifest == mixed
    assert all(check.status in ("ok", "skipped") for check in verify_bundle(tmp_path / "out"))
    assert mixed.engine_key != bundle_from_graphs(floats, tmp_path / "plain", backend, cache).manifest.engine_key


def test_graphs_of_another_checkpoint_make_no_bundle_together(
    make_graphs: Callable[..., Path], cache: EngineCache, tmp_path: Path
) -> None:
    floats, other = make_graphs("float"), make_graphs("other", seed=3)
    with pytest.raises(BundleError, match="differ in source"):
        bundle_from_graphs(floats, tmp_path / "out", load_backend("onnxruntime"), cache, stages_from={"decode": other})


@pytest.mark.parametrize("job", [build, plan])
def test_auto_needs_engines_that_run_here(job: Callable[..., Any], checkpoint: Path, cache: EngineCache) -> None:
    request = BuildRequest(model=str(checkpoint), precision="auto", backend="tensorrt-rtx", targets=("sm89",))
    with pytest.raises(
        ConfigError, match="--precision auto times engines on this machine.*--precision fp16 or --precision int8"
    ):
        job(request, cache=cache)


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
@pytest.mark.parametrize("job", [build, plan])
def test_auto_refuses_gpu_providers_before_any_work(
    job: Callable[..., Any], checkpoint: Path, cache: EngineCache, provider: str
) -> None:
    request = BuildRequest(model=str(checkpoint), precision="auto", backend="onnxruntime", provider=provider)
    with pytest.raises(ConfigError, match=f"--provider {provider} runs them on a GPU.*--precision fp16.*with nitro-rt bench"):
        job(request, cache=cache)
    assert not cache.root.exists()


@pytest.mark.parametrize(
    ("precision", "backend", "provider", "rival", "auto"),
    [
        ("int8", "openvino", None, "fp16", True),
        ("int8", "onnxruntime", "cpu", "fp32", True),
        ("fp8", "openvino", None, "fp16", False),
        ("int8", "onnxruntime", "cuda", "fp16", False),
        ("int8", "tensorrt", None, "fp16", False),
    ],
)
def test_a_precision_that_was_named_is_said_not_to_be_timed(
    precision: str, backend: str, provider: str | None, rival: str, auto: bool
) -> None:
    line = not_measured(precision, backend, provider)
    assert line.startswith(f"speed: whether {precision} is faster than {rival} was not measured; ")
    assert line.endswith(f"build --precision {rival}, too, and time both with nitro-rt bench")
    assert ("--precision auto takes it only where it is" in line) == auto


@pytest.fixture
def auto(folders: tuple[Path, Path], checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BuildRequest:
    """A request for auto whose graphs are the hand-made ones and whose gate refuses nothing."""
    module = sys.modules["nitro_engines.build"]
    monkeypatch.setattr(module, "_graphs", lambda prepared, *_: (folders[prepared.quantisation is not None], False))
    monkeypatch.setattr(module, "_gate", lambda *_: None)
    monkeypatch.setattr(module, "require_room", lambda *_: None)
    assert nitro_export.toolchain()
    return BuildRequest(model=str(checkpoint), precision="auto", backend="onnxruntime", out=tmp_path / "out")


def test_auto_takes_what_is_faster(auto: BuildRequest, cache: EngineCache, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_sessions(monkeypatch, FASTER_DENOISER)
    lines: list[str] = []
    manifest = build(auto, lines.append, cache).manifest
    assert {engine.precision for engine in manifest.denoise.values()} == {"int8"} and manifest.decode.precision == "fp32"
    assert [result.chosen for result in manifest.speed_gate] == ["int8", "fp32"]
    assert "trying denoise in int8, decode in fp32" in lines
    before = (auto.out / BUNDLE_FILE).read_bytes()  # type: ignore[operator]
    assert not build(auto, cache=cache).published and (auto.out / BUNDLE_FILE).read_bytes() == before  # type: ignore[operator]


def test_auto_leaves_what_misses_its_limits(auto: BuildRequest, cache: EngineCache, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_sessions(monkeypatch, FASTER_DENOISER | {("decode", "fp32"): 4.0})

    class StrictGate:
        def references(self, *_: Any) -> tuple[Any, ...]:
            return ()

        def judged(self, bundle: Any, *_: Any) -> Any:
            if bundle.denoise[1].precision == "int8":
                raise QualityMissed("the denoiser is too coarse")
            return bundle

    monkeypatch.setattr(sys.modules["nitro_engines.build"], "_gate", lambda *_: StrictGate())
    lines: list[str] = []
    manifest = build(auto, lines.append, cache).manifest
    assert manifest.denoise[1].precision == "fp32" and manifest.decode.precision == "int8"
    assert manifest.speed_gate[0].reason == "int8 is faster, but misses the quality limits"
    assert "not chosen: the denoiser is too coarse" in lines


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_two_float_precisions_for_real(name: str, make_graphs: Callable[..., Path], cache: EngineCache) -> None:
    """Real sessions over real buffers: the figures are real, whichever wins."""
    backend = load_backend(name)
    halves, singles = (engines_from_graphs(make_graphs(p, precision=p), backend, cache) for p in ("fp16", "fp32"))
    results = compare_stages(halves, singles, cache, print)
    assert [result.stage for result in results] == ["denoise/1", "decode"]
    for result in results:
        assert 0 < result.ratio_low <= result.ratio <= result.ratio_high and result.num_pairs == MAX_PAIRS
        assert result.chosen == ("fp16" if result.ratio_high < 1 else "fp32") and result.device

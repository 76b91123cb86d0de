"""The benchmark of training: the peer does the work it is compared for, and nothing is timed that does not train."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from nitro_bench import _train, training
from nitro_bench.training import TrainingBenchConfig
from nitro_bench.training_report import Case, TrainingReport, markdown, row_of
from nitro_rt.errors import ConfigError, TrainingError
from nitro_training.backbone import UNetFeatures
from nitro_training.engine import Engine
from nitro_training.pool import HeadPool

MODEL = {"channels": [16, 32, 32], "text_widths": [16, 16]}
REQUEST = {
    "loop": "pool", "tasks": [], "heads_per_cell": 1, "batch": 2, "size_px": 64, "model": {**MODEL},
    "num_warmup": 1, "seconds": 0.0, "min_iterations": 1,
}  # fmt: skip
ONE_TASK = {**REQUEST, "tasks": ["global-conditional"], "heads_per_cell": 2}
LADD = {**REQUEST, "loop": "ladd"}


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine()


@pytest.mark.parametrize(("request_", "num_heads", "num_passes"), [(LADD, 10, 2), (ONE_TASK, 80, 2), (REQUEST, 120, 6)])
def test_the_loops_do_the_passes_that_the_report_says(
    request_: dict[str, Any], num_heads: int, num_passes: int, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LADD and one task: real and fake once; three tasks: three times."""
    passes: list[tuple[int, ...]] = []
    forward = UNetFeatures.forward

    def spy(self: UNetFeatures, latents: torch.Tensor, *rest: torch.Tensor) -> tuple[torch.Tensor, ...]:
        passes.append(tuple(latents.shape))
        return forward(self, latents, *rest)

    monkeypatch.setattr(UNetFeatures, "forward", spy)
    loop, heads, _ = _train.build(request_, engine)
    loop.step(0)
    assert len(heads) == num_heads and len(passes) == num_passes
    assert sum(shape[-1] == 8 for shape in passes) == 2, "the whole latents, real and fake; the others are crops"


def test_the_peer_trains_student_and_every_head_and_leaves_the_backbone(engine: Engine) -> None:
    loop, heads, pool = _train.build(LADD, engine)
    backbone = loop.backbone  # type: ignore[attr-defined]
    before = [copy.deepcopy(module.state_dict()) for module in (loop.unet, *heads, backbone)]
    losses = loop.step(0)
    assert pool is None and losses["d_loss"] == pytest.approx(2.0, abs=0.5) and losses["g_grad_norm"] > 0
    changed = [
        any(not torch.equal(value, old[key]) for key, value in module.state_dict().items())
        for module, old in zip((loop.unet, *heads, backbone), before, strict=True)
    ]
    assert changed == [True] * 11 + [False]
    assert all(parameter.grad is None for head in heads for parameter in head.parameters()), "the student's loss leaves none"


@pytest.mark.parametrize("request_", [LADD, REQUEST], ids=["ladd", "pool"])
def test_a_child_checks_and_times(request_: dict[str, Any]) -> None:
    found = _train.measure({**request_, "min_iterations": 2})
    assert len(found["wall_ms"]) == len(found["cpu_ms"]) == 2 and min(found["wall_ms"]) > 0
    assert found["peak_rss_bytes"] > 50e6 and found["num_heads"] in (10, 120)


def test_nothing_is_timed_that_does_not_train() -> None:
    before = [1.0, 2.0, 3.0], 7.0
    _train.require_trained(before, [1.5, 2.5, 3.5], 7.5, None)
    with pytest.raises(TrainingError, match="the student did not change"):
        _train.require_trained(before, [1.5, 2.5, 3.5], 7.0, None)
    with pytest.raises(TrainingError, match="2 heads changed in the warm-up, 3 should have"):
        _train.require_trained(before, [1.5, 2.0, 3.5], 7.5, None)
    with pytest.raises(TrainingError, match="g_loss is nan"):
        _train.require_finite({"d_loss": 1.0, "g_loss": float("nan")})


def test_heads_that_did_not_judge_may_not_change(engine: Engine) -> None:
    loop, heads, pool = _train.build(REQUEST, engine)
    assert isinstance(pool, HeadPool)
    before = [_train.fingerprint(head) for head in heads], _train.fingerprint(loop.unet)
    loop.step(0)
    _train.require_trained(before, [_train.fingerprint(head) for head in heads], _train.fingerprint(loop.unet), pool)
    bystander = int((pool.updates + pool.births).argmin())
    with torch.no_grad():
        next(heads[bystander].parameters()).add_(1.0)
    with pytest.raises(TrainingError, match="heads changed in the warm-up"):
        _train.require_trained(before, [_train.fingerprint(head) for head in heads], _train.fingerprint(loop.unet), pool)


def made_sample(wall_ms: list[float], num_heads: int, rss: float) -> dict[str, Any]:
    return {
        "wall_ms": wall_ms, "cpu_ms": [2 * value for value in wall_ms], "peak_rss_bytes": rss, "cuda_peak_bytes": None,
        "num_heads": num_heads, "heads_bytes": 1e6 * num_heads,
    }  # fmt: skip


def made_report(load_average: str = "0.10 0.10 0.10") -> TrainingReport:
    rows = (
        row_of(Case(loop="ladd", heads_per_cell=1, batch=2), [made_sample([100.0] * 3, 10, 3e8), made_sample([50.0], 10, 3e8)]),
        row_of(
            Case(loop="pool", heads_per_cell=1, batch=2), [made_sample([200.0] * 3, 120, 4e8), made_sample([150.0], 120, 4e8)]
        ),
        row_of(
            Case(loop="pool", heads_per_cell=4, batch=2), [made_sample([220.0] * 3, 480, 5e8), made_sample([150.0], 480, 6e8)]
        ),
    )
    return TrainingReport(
        command="python -m nitro_bench.training --batches 2", commit="abc", date="2025-01-31",
        machine={"cpu": "some", "cores": "2", "load_average": load_average}, device="NVIDIA H200", num_threads=2,
        versions={"torch": "2"}, model="tiny", student_parameters=10**6, size_px=64, channels=(1, 2, 3), rounds=2, num_warmup=1,
        rows=rows,
    )  # fmt: skip


def test_percentiles_and_rounds() -> None:
    row = row_of(Case(loop="ladd", heads_per_cell=1, batch=2), [made_sample([float(i) for i in range(11)], 10, 3e8)])
    assert (row.wall_ms, row.wall_ms_p10, row.wall_ms_p90, row.cpu_ms) == (5.0, 1.0, 9.0, 10.0)
    assert row.wall_ms_by_round == (5.0,) and row.num_iterations == 11


def test_the_report_shows_ratios_and_flatness() -> None:
    page = markdown(made_report())
    assert "| 2 | full | 480 | 220 (171-220) | 440 | 4.55 | 2.20 (2.20-3.00) | 600 |" in page
    assert "batch 2: 480 heads take 1.10 (1.00-1.10) times the time of 120, and +200 MB of host memory." in page
    assert "weights of 480 heads are 480 MB" in page and "abc" in page and "busy" not in page
    assert "The machine was busy" in markdown(made_report("1.50 0.10 0.10"))
    assert made_report().device_slug == "nvidia-h200"
    assert json.loads(made_report().to_json())["rows"][1]["case"]["loop"] == "pool"


def test_every_loop_runs_at_every_batch() -> None:
    cases = TrainingBenchConfig().cases()
    assert len(cases) == len(set(cases)) == 3 * 5
    assert [case.loop for case in cases[:5]] == ["ladd", "one-task", "pool", "pool", "pool"]


def test_wrong_sizes_are_refused() -> None:
    with pytest.raises(ConfigError, match="needs two samples"):
        TrainingBenchConfig(batches=(1,))
    with pytest.raises(ConfigError, match="multiple of 64"):
        TrainingBenchConfig(size_px=96)
    answer = CliRunner().invoke(training.main, ["--batches", "1"])
    assert answer.exit_code == 1 and answer.output.startswith("error: batches") and answer.output.count("\n") == 1


@pytest.mark.slow
def test_the_whole_measurement_at_a_tiny_size(tmp_path: Path) -> None:
    arguments = ["--batches", "2", "--heads-per-cell", "1,2", "--rounds", "2", "--seconds", "0", "--size", "64"]
    answer = CliRunner().invoke(training.main, [*arguments, "--channels", "16,32,32", "--report", str(tmp_path)])
    assert answer.exit_code == 0, answer.output
    (written,) = tmp_path.glob("other-training_*.json")
    result = json.loads(written.read_text())
    assert [row["num_heads"] for row in result["rows"]] == [10, 160, 120, 240]
    assert all(row["num_iterations"] == 10 for row in result["rows"])

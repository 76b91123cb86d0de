from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import bench_reports
import numpy as np
import pytest

from nitro_bench.bench_report import ENGINE_STAGES, BenchReport, Process, Run
from nitro_bench.compare import FASTER, NOT_JUDGED, SAME, SLOWER, UNDECIDED, compare, read_report, sentences, verdict_of
from nitro_bench.intervals import MAX_LOOKS, Change, paired, welch
from nitro_rt.errors import ConfigError, ModelNotFound

RECORDED = Path(__file__).parent / "data" / "recorded_noise.json"
"""Milliseconds of 20 processes that drew the same picture of nitro-emoji while six others wanted each core."""


def simulated(seed: int, scale: float = 1.0, **options: Any) -> BenchReport:
    return bench_reports.report([bench_reports.run(np.random.default_rng(seed), scale=scale, **options)])


def verdicts(old: BenchReport, new: BenchReport) -> dict[str, str]:
    return {line.stage: line.verdict for line in compare(old, new).lines}


def test_a_planted_ten_percent_is_caught_and_named() -> None:
    found = compare(simulated(1), simulated(2, scale=1.1))
    assert {line.stage for line in found.slower} == {"denoise", "decode", "total"}
    assert {line.verdict for line in found.lines if line.stage in ("tokenize", "noise", "queue")} == {NOT_JUDGED}
    lines = list(sentences(found))
    assert any(line.startswith("slower     emoji-1step, 1 step, 128 px, total: ") for line in lines)
    assert lines[-1] == "REGRESSION: 3 of 8 lines are slower by more than 5%"


def test_the_same_program_passes_twenty_times() -> None:
    for seed in range(20):
        found = compare(simulated(100 + seed), simulated(200 + seed))
        assert not found.slower, seed
        assert {line.stage: line.verdict for line in found.lines}["total"] == SAME
    assert list(sentences(found))[-1] == "no regression: nothing is slower by more than 5%"


def test_every_one_of_twenty_planted_slow_downs_is_caught() -> None:
    assert all(verdicts(simulated(seed), simulated(1000 + seed, scale=1.1))["total"] == SLOWER for seed in range(20))


def test_another_load_on_the_machine_is_no_regression() -> None:
    # Everything takes 40 % longer, the yardstick too.
    assert verdicts(simulated(1), simulated(2, scale=1.4, yardstick=1.4))["total"] == SAME
    # And a program that is slower on a machine that was less busy is found all the same.
    assert verdicts(simulated(1, yardstick=1.4), simulated(2, scale=1.0))["total"] == SLOWER


def test_faster_and_one_slow_stage() -> None:
    assert verdicts(simulated(1), simulated(2, scale=0.8))["total"] == FASTER
    run = simulated(1).runs[0]
    slow = dataclasses.replace(run, processes=tuple(_slower_stage(process, "decode", 1.15) for process in run.processes))
    found = compare(bench_reports.report([run]), bench_reports.report([_summed(slow)]))
    assert [line.stage for line in found.slower] == ["decode", "total"]


def _slower_stage(process: Process, stage: str, factor: float) -> Process:
    stages = dict(process.stages_ms) | {stage: tuple(factor * value for value in process.stages_ms[stage])}
    added = [new - old for new, old in zip(stages[stage], process.stages_ms[stage], strict=True)]
    total = tuple(value + more for value, more in zip(process.total_ms, added, strict=True))
    return dataclasses.replace(process, stages_ms=stages, total_ms=total)


def _summed(run: Run) -> Run:
    from nitro_bench.timing import summaries

    return dataclasses.replace(run, summary=summaries(run.processes))


def test_noise_that_hides_a_slow_down_is_told_and_is_no_regression() -> None:
    found = compare(simulated(1, noise=0.8), simulated(2, noise=0.8))
    assert {line.stage: line.verdict for line in found.lines}["total"] == UNDECIDED
    assert "nor ruled out" in list(sentences(found))[-1]


def test_a_few_processes_are_compared_by_batches_and_it_is_said() -> None:
    old, new = (simulated(seed, scale=scale, num_processes=2) for seed, scale in ((1, 1.0), (2, 1.3)))
    found = compare(old, new)
    assert {line.stage: line.verdict for line in found.lines}["total"] == SLOWER
    assert any("fewer than 3 processes" in note for note in found.notes)
    with pytest.raises(ConfigError, match="has 5 images, 6 are needed"):
        compare(simulated(1, num_processes=1, num_images=5), simulated(2, num_processes=1, num_images=5))


def recorded_processes() -> list[dict[str, list[float]]]:
    return list(json.loads(RECORDED.read_text(encoding="utf-8")))


def recorded_report(processes: list[dict[str, list[float]]], factor: float = 1.0) -> BenchReport:
    """The recorded times of whole images in a report's form; the decoder stands for all of it."""
    run = simulated(1, num_processes=len(processes)).runs[0]
    made = [
        dataclasses.replace(
            process,
            total_ms=tuple(factor * ms for ms in recorded["wall_ms"]),
            cpu_ms=tuple(factor * ms for ms in recorded["cpu_ms"]),
            stages_ms={stage: tuple(0.3 * factor * ms for ms in recorded["wall_ms"]) for stage in ENGINE_STAGES},
            yardstick_ms=tuple(recorded["yardstick_ms"]),
            yardstick_cpu_ms=tuple(recorded["yardstick_cpu_ms"]),
        )
        for process, recorded in zip(run.processes, processes, strict=True)
    ]
    return bench_reports.report([_summed(dataclasses.replace(run, processes=tuple(made)))])


def test_recorded_noise_twenty_times_the_same_program() -> None:
    rng, processes = np.random.default_rng(0), recorded_processes()
    for _ in range(20):
        order = rng.permutation(len(processes))
        halves = [[processes[index] for index in part] for part in np.array_split(order, 2)]
        assert not compare(recorded_report(halves[0]), recorded_report(halves[1])).slower


def test_recorded_noise_with_a_planted_slow_down() -> None:
    processes = recorded_processes()
    old, new = processes[::2], processes[1::2]
    assert not compare(recorded_report(old), recorded_report(new)).slower
    found = compare(recorded_report(old), recorded_report(new, factor=1.1))
    assert {line.stage: line.verdict for line in found.lines}["total"] == SLOWER


def write(report: BenchReport, path: Path, **changes: Any) -> Path:
    path.write_text(json.dumps(json.loads(report.to_json()) | changes), encoding="utf-8")
    return path


def test_reports_are_read_back(tmp_path: Path) -> None:
    report = simulated(1)
    assert read_report(write(report, tmp_path / "a.json")).runs[0].subject == report.runs[0].subject


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema_version": 2}, "has schema version 2, this nitro-rt reads 1; measure again, or compare with the version"),
        ({"kind": "something"}, "is no report of nitro-rt bench"),
        ({"runs": 7}, "report.runs must be a list, found '7'; it was edited or cut"),
    ],
)
def test_what_is_no_report_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_report(write(simulated(1), tmp_path / "a.json", **changes))


def test_files_that_are_not_there_or_no_json_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="there is no file"):
        read_report(tmp_path / "absent.json")
    (tmp_path / "cut.json").write_text('{"kind": ')
    with pytest.raises(ConfigError, match="is no JSON"):
        read_report(tmp_path / "cut.json")


def test_another_machine_is_refused_by_name() -> None:
    old = simulated(1)
    new = dataclasses.replace(simulated(2), machine=bench_reports.MACHINE | {"cores": "4"})
    with pytest.raises(ConfigError, match="of different machines: cores is '8' in the old and '4' in the new"):
        compare(old, new)
    with pytest.raises(ConfigError, match="device is 'cpu' in the old and 'NVIDIA H100"):
        compare(old, dataclasses.replace(simulated(2), device="NVIDIA H100"))


def test_nothing_in_common_is_refused_and_what_differs_is_noted() -> None:
    with pytest.raises(ConfigError, match="no subject in common: the old one timed emoji-1step, 1 step, 128 px, the new one"):
        compare(simulated(1), simulated(2, precision="int8"))
    rng = np.random.default_rng(5)
    both = bench_reports.report([bench_reports.run(rng), bench_reports.run(rng, "more", precision="int8")])
    changed = dataclasses.replace(simulated(1), commit="fedcba987654", versions={"openvino": "2027.0"})
    notes = "\n".join(compare(changed, both).notes)
    assert "only in the new report: more, 1 step, 128 px" in notes
    assert "commit: fedcba987654 -> 0123456789ab" in notes
    assert "openvino: 2027.0 -> 2026.4.1" in notes and "nitro-rt: absent -> 0.1.0" in notes


def change(ratio: float, low: float, high: float) -> Change:
    return Change(ratio=ratio, low=low, high=high)


@pytest.mark.parametrize(
    ("wall", "cpu", "verdict"),
    [
        (change(1.1, 1.06, 1.14), None, SLOWER),
        (change(1.1, 1.06, 1.14), change(1.0, 0.98, 1.02), SLOWER),  # it waits
        (change(1.1, 0.9, 1.3), change(1.1, 1.06, 1.14), SLOWER),  # a busy machine: its clock says nothing
        (change(1.0, 0.98, 1.02), change(1.1, 1.06, 1.14), SAME),  # more work in the same time
        (change(1.0, 0.9, 1.1), change(1.0, 0.98, 1.02), SAME),
        (change(1.06, 1.01, 1.11), None, UNDECIDED),
        (change(0.9, 0.88, 0.92), change(0.9, 0.85, 0.95), FASTER),
        (change(0.9, 0.88, 0.92), change(1.0, 0.95, 1.04), SAME),
    ],
)
def test_two_looks_make_one_verdict(wall: Change, cpu: Change | None, verdict: str) -> None:
    assert verdict_of(wall, cpu, 0.05) == verdict


def test_welch_s_interval_is_that_of_the_textbook() -> None:
    # Two samples of 5: means 0 and 0.1, variances 0.01 and 0.04: t is 1.943 at 5.88 degrees, rounded down to 5: 2.015.
    old, new = np.array([-1, -1, 0, 1, 1]) * 0.1, np.array([-1, -1, 0, 1, 1]) * 0.2 + 0.1
    found = welch(old.tolist(), new.tolist())
    assert found.ratio == pytest.approx(np.exp(0.1))
    assert found.low == pytest.approx(np.exp(0.1 - 2.015 * 0.1)) and found.high == pytest.approx(np.exp(0.1 + 2.015 * 0.1))


def test_intervals_hold_the_truth_often_enough() -> None:
    rng, above, below = np.random.default_rng(7), 0, 0
    for _ in range(1000):
        found = welch(rng.normal(0, 0.03, 5).tolist(), rng.normal(0.05, 0.05, 5).tolist())
        above, below = above + (found.low > np.exp(0.05)), below + (found.high < np.exp(0.05))
    assert max(above, below) <= 70  # 5 % of 1000 and three standard deviations
    assert paired([0.1, 0.1, 0.1]).low == pytest.approx(np.exp(0.1))


def test_looking_again_at_more_pairs_does_not_make_an_error_likelier() -> None:
    rng, wrong = np.random.default_rng(3), 0
    for _ in range(1000):
        units = rng.normal(0.05, 0.03, 6 * MAX_LOOKS).tolist()
        wrong += any(paired(units[: 6 * (look + 1)]).low > np.exp(0.05) for look in range(MAX_LOOKS))
    assert wrong <= 70  # 5 % of 1000 and three standard deviations

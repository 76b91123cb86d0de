"""`nitro-rt bench` and `nitro-rt bench-compare` as a user calls them."""

from __future__ import annotations

import json
import time
from pathlib import Path

import bench_reports
import numpy as np
import pytest

from nitro_bench.bench_config import BenchConfig
from nitro_bench.bench_report import BenchReport
from nitro_bench.compare import Comparison
from nitro_rt.cli import main
from nitro_rt.errors import ConfigError


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[BenchConfig]:
    """What was asked for; the answer is a simulated report."""
    configs: list[BenchConfig] = []

    def measure(config: BenchConfig, report: object, before_timing: object = None) -> BenchReport:
        if callable(before_timing):
            before_timing("nitro-emoji", "cpu")
        configs.append(config)
        return bench_reports.report([bench_reports.run(np.random.default_rng(0))])

    monkeypatch.setattr("nitro_bench.bench.measure", measure)
    return configs


def test_options_reach_the_benchmark(measured: list[BenchConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = "a b --peers diffusers --size 512 --steps 1,4 --batch 2 --images 50 --processes 3 --concurrency 1,8"
    out, more = tmp_path / "out.json", ["--predict", "h100,l4", "--timeout", "60"]
    assert main(["bench", *words.split(), "--checkpoint", str(tmp_path), *more, "--json", str(out)]) == 0
    (config,) = measured
    assert (config.bundles, config.peers, config.size, config.steps) == ((Path("a"), Path("b")), ("diffusers",), 512, (1, 4))
    assert (config.batch, config.images, config.processes, config.concurrency) == (2, 50, 3, (1, 8))
    assert (config.predict, config.checkpoint, config.timeout_s) == (("h100", "l4"), tmp_path, 60.0)
    assert (
        config.command
        == f"nitro-rt bench {words} --checkpoint {tmp_path.name} --predict h100,l4 --timeout 60.0 --json out.json"
    )
    assert capsys.readouterr().out.startswith("# Benchmark: nitro-emoji")
    assert json.loads(out.read_text())["kind"] == "nitro-rt bench"


def test_defaults_are_those_of_the_config(measured: list[BenchConfig]) -> None:
    assert main(["bench", "a"]) == 0
    plain = BenchConfig(bundles=(Path("a"),), command="nitro-rt bench a")
    assert measured == [plain]


def test_a_dry_run_times_nothing(
    measured: list[BenchConfig], little_bundle: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    words = [
        "bench",
        str(little_bundle),
        "--peers",
        "diffusers-cuda",
        "--checkpoint",
        str(tmp_path),
        "--images",
        "7",
        "--dry-run",
    ]
    assert main(words) == 0 and not measured
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "little, 1 step, 32 px: reference, batch 2, verified by 1 pictures of its parent"
    assert lines[1] == f"little, 1 step, 32 px: peers draw with {tmp_path}"
    assert lines[-2].startswith("diffusers-cuda: diffusers on a GPU, eager, float16, its environment is ")
    assert lines[-1] == "images: 7, in up to 5 processes each"
    assert main(["bench", "absent", "--dry-run"]) == 1


def test_a_report_folder_is_written_once(
    measured: list[BenchConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("time.strftime", lambda form: "2026-11-25")
    assert main(["bench", "a", "--report", str(tmp_path)]) == 0
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".md", ".html"}
    assert main(["bench", "a", "--report", str(tmp_path)]) == 1
    assert "is there already; --force replaces it" in capsys.readouterr().err
    assert len(measured) == 1  # it was refused before anything was timed
    assert main(["bench", "a", "--report", str(tmp_path), "--force"]) == 0


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["bench"], 2, "Missing argument"),
        (["bench", "a", "--steps", "x"], 2, "'x' is not a list of whole numbers"),
        (["bench", "a", "--peers", "nobody"], 1, "there is no peer 'nobody'; available: "),
        (["bench", "a", "--predict", "h1000"], 1, "'h1000' is not known; available: h100"),
        (["bench", "a", "--force"], 1, "--force replaces a report, and none is written"),
        (["bench", "a", "--checkpoint", "b"], 1, "--checkpoint is what peers draw with, and none was asked for"),
        (["bench", "a", "--json", "no/such/folder.json"], 1, "nothing can be written into no/such: No such file or directory"),
        (["bench", "a", "--json", "/"], 1, "/ is a folder; name a file in it, such as /bench.json"),
        (["bench", "absent"], 1, "no bundle at absent"),
        (["bench-compare", "a.json"], 2, "Missing argument"),
        (["bench-compare", "a.json", "b.json"], 1, "there is no file a.json"),
        (["bench-compare", "a", "b", "--max-slowdown", "much"], 2, "'much' is no share"),
        (["bench-compare", "a", "b", "--max-slowdown", "0%"], 2, "is not between 0% and 100%"),
    ],
)
def test_wrong_usage(words: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == code
    assert message in capsys.readouterr().err


def test_a_taken_name_is_refused_by_a_dry_run_too(
    little_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["bench", str(little_bundle), "--dry-run", "--report", str(tmp_path / "reports")]
    assert main(words) == 0 and not (tmp_path / "reports").exists()
    (tmp_path / "reports").mkdir()
    (tmp_path / "reports" / f"tiny_cpu_{time.strftime('%Y%m')}.md").write_text("")
    assert main(words) == 1
    assert "is there already; --force replaces it" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_timed(
    measured: list[BenchConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert main(["bench", "a", "--report", str(tmp_path / "file" / "reports")]) == 1 and not measured
    assert "nothing can be written into" in capsys.readouterr().err


def test_a_report_is_written_although_the_json_fails(
    measured: list[BenchConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, text: str) -> None:
        raise ConfigError(f"{path} cannot be written: No space left on device; choose another place")

    published: list[BenchReport] = []
    monkeypatch.setattr("nitro_bench.publish.write_text", full)
    monkeypatch.setattr("nitro_bench.publish.ReportFolder.publish", lambda self, report: published.append(report) or ())
    assert main(["bench", "a", "--json", str(tmp_path / "a.json"), "--report", str(tmp_path / "reports")]) == 1
    assert [report.name for report in published] == ["nitro-emoji"]


def write(path: Path, seed: int, scale: float = 1.0) -> str:
    path.write_text(bench_reports.report([bench_reports.run(np.random.default_rng(seed), scale=scale)]).to_json())
    return str(path)


def test_comparing_answers_with_its_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, same, slow = (write(tmp_path / f"{seed}.json", seed, scale) for seed, scale in ((1, 1.0), (2, 1.0), (3, 1.1)))
    assert main(["bench-compare", old, same]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "no regression: nothing is slower by more than 5%"
    assert main(["bench-compare", old, slow]) == 1
    assert "REGRESSION" in capsys.readouterr().out
    assert main(["bench-compare", old, slow, "--max-slowdown", "20%"]) == 0
    capsys.readouterr()
    assert main(["bench-compare", old, slow, "--json"]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert answer["regression"] and {line["stage"] for line in answer["lines"]} >= {"total", "decode"}


def test_two_folders_are_timed_in_turns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def compare_bundles(old: Path, new: Path, max_slowdown: float, report: object) -> Comparison:
        asked.append((old, new, max_slowdown))
        return Comparison(lines=(), notes=(), max_slowdown=max_slowdown)

    monkeypatch.setattr("nitro_bench.side_by_side.compare_bundles", compare_bundles)
    assert main(["bench-compare", str(tmp_path), str(tmp_path), "--max-slowdown", "0.1"]) == 0
    assert asked == [(tmp_path, tmp_path, 0.1)]
    (tmp_path / "a.json").write_text("{}")
    assert main(["bench-compare", str(tmp_path), str(tmp_path / "a.json")]) == 1
    assert "one is a folder, one is not" in capsys.readouterr().err

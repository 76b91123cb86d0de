"""The benchmark of export: pieces are kept, failures are results, and nothing wrong is timed."""

from __future__ import annotations

import dataclasses
import json
import resource
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nitro_bench import _export_latency, export, export_plan
from nitro_bench._export_meter import Meter, disk_usage
from nitro_bench._export_sides import sqnr_db
from nitro_bench.export import collected, run, stored
from nitro_bench.export_plan import OPTIMUM, ExportBenchConfig, Measurement, measurements
from nitro_bench.export_report import markdown, ratios, stages
from nitro_rt.errors import BuildError, ConfigError

COST = {"seconds": 2.0, "cpu_seconds": 3.0, "peak_rss_bytes": 2**30, "num_bytes": 10, "num_bytes_unshared": 4, "marks": []}


@pytest.fixture
def config(tmp_path: Path) -> ExportBenchConfig:
    return ExportBenchConfig(work=tmp_path / "work", sizes=("half",), optimum_python=Path(sys.executable))


def use(monkeypatch: pytest.MonkeyPatch, planned: list[Measurement], script: str) -> None:
    """Let the children of `planned` be a script that has the request as its argument."""
    monkeypatch.setattr(export, "measurements", lambda config: planned)
    monkeypatch.setattr(export, "_interpreter", lambda config, child: [sys.executable, "-c", script])


def one(name: str, config: ExportBenchConfig, **changes: Any) -> Measurement:
    return Measurement(name=name, child="child", request={"out": str(config.work / name)}, **changes)


def test_what_a_measurement_needs_comes_before_it(config: ExportBenchConfig) -> None:
    seen: set[str] = set()
    for measurement in measurements(config):
        assert set(measurement.needs) <= seen, measurement.name
        assert measurement.name not in seen
        seen.add(measurement.name)


def test_sides_take_turns_and_every_child_is_there(config: ExportBenchConfig) -> None:
    names = [m.name.split("/")[-2:] for m in measurements(config) if m.name.startswith("half/latency@512/decode")]
    first, second = names[: len(names) // 2], names[len(names) // 2 :]
    assert [side for side, _ in first] == [side for side, _ in second] and len(first) == 7
    folder = Path(export_plan.__file__).parent
    assert all((folder / f"{m.child}.py").is_file() for m in measurements(config))


@pytest.mark.parametrize("wrong", [{"sizes": ("huge",)}, {"sizes": ()}, {"rounds": 0}, {"weight_bits": 4}])
def test_wrong_options_are_refused(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="must be"):
        ExportBenchConfig(work=tmp_path, **wrong)


def test_a_result_is_kept_and_not_made_again(config: ExportBenchConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    log = config.work / "log"
    script = f"open({str(log)!r}, 'a').write('x'); print('noise'); print({json.dumps(json.dumps(COST))})"
    use(monkeypatch, [one("half/a", config), one("half/b", config)], script)
    config.work.mkdir()
    run(config, only=["*/a"], report=lambda line: None)
    run(config, only=["*/a"], report=lambda line: None)
    found = stored(config, "half/a")
    assert found is not None and found.items() >= COST.items() and log.read_text() == "x"
    assert collected(config).missing == ("half/b",)


def test_a_failure_is_a_result_and_what_needs_it_is_left_out(
    config: ExportBenchConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = [one("half/a", config), one("half/b", config, needs=("half/a",))]
    use(monkeypatch, planned, f"import sys; sys.exit('no room in {config.work}/there')")
    said: list[str] = []
    run(config, report=said.append)
    found = stored(config, "half/a")
    assert found is not None and found["failed"] == "ended with 1: no room in there"
    assert stored(config, "half/b") is None and said[-1] == "half/b: left out, it needs half/a"
    page = markdown(collected(config))
    assert "- half/a: ended with 1: no room in there" in page and "- half/b: not made" in page
    use(monkeypatch, planned, f"print({json.dumps(json.dumps(COST))})")
    run(config, report=said.append)
    assert stored(config, "half/a") == found, "a failure is made again only when asked for"
    run(config, retry=True, report=said.append)
    assert "failed" not in (stored(config, "half/a") or {"failed": 1})
    assert stored(config, "half/b") is not None


def test_a_child_that_takes_too_long_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ExportBenchConfig(work=tmp_path, sizes=("tiny",), limit_s=0.2)
    use(monkeypatch, [one("half/a", config)], "import time; time.sleep(60)")
    run(config, report=lambda line: None)
    assert (stored(config, "half/a") or {})["failed"] == "ran past 0 s"


@pytest.mark.parametrize(
    ("child", "number", "says"),
    [
        ("_export_ours", "SIGTERM", "ended by SIGTERM"),
        ("_export_ours", "SIGSEGV", "ended by SIGSEGV, most likely for want of memory."),
        (OPTIMUM, "SIGSEGV", "ended by SIGSEGV, most likely for want of memory. It may have 21 GiB of its own."),
    ],
)
def test_the_signal_that_ended_a_child_is_named(
    config: ExportBenchConfig, monkeypatch: pytest.MonkeyPatch, child: str, number: str, says: str
) -> None:
    planned = [dataclasses.replace(one("half/a", config), child=child)]
    use(monkeypatch, planned, "import os, signal; os.kill(os.getpid(), signal." + number + ")")
    run(config, report=lambda line: None)
    assert (stored(config, "half/a") or {})["failed"] == says


def test_what_a_killed_child_left_is_removed(config: ExportBenchConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    out = config.work / "half" / "graphs"
    out.mkdir(parents=True)
    (out / "cut.onnx").write_bytes(b"cut")
    script = f"import os; assert not os.path.exists({str(out)!r}); print({json.dumps(json.dumps(COST))})"
    use(monkeypatch, [one("half/a", config, out=out)], script)
    run(config, report=lambda line: None)
    assert "failed" not in (stored(config, "half/a") or {"failed": 1})


def latency(wall_s: list[float]) -> dict[str, Any]:
    return {"wall_s": wall_s, "cpu_s": wall_s, "sqnr_db": 60.0, "peak_rss_bytes": 2**30, "load_s": 1.0, "first_s": 1.0}


def test_ratios_are_to_the_fastest_peer_and_goals_are_judged(
    config: ExportBenchConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = {"openvino-fp16": 9.0, "openvino-int8": 6.0, "onnxruntime-fp32": 12.0}
    calls |= {"diffusers-fp32": 20.0, "diffusers-compile-fp32": 10.0}
    for side, wall_s in calls.items():
        for round_ in (1, 2):
            export._store(config, f"half/latency@512/decode/{side}/{round_}", latency([wall_s]))
    monkeypatch.setattr(export, "machine", lambda: {"cpu_features": "avx2", "cores": "2"})
    report = collected(config)
    assert ratios(report.latencies()["half", 512, "decode"]) == {
        "openvino-fp16": 0.9,
        "openvino-int8": 0.6,
        "onnxruntime-fp32": 1.2,
    }
    page = markdown(report)
    assert "openvino-fp16: 0.90 of the best peer, goal 0.95: met" in page
    assert "onnxruntime-fp32: 1.20 of the best peer, goal 0.95: missed" in page
    assert "openvino-int8: 0.60 of the best peer, goal 0.55: missed; promised only with AMX or VNNI" in page
    assert "half/latency@512/denoise/...: not made" in page.replace(" (14 of them)", "")
    monkeypatch.setattr(export, "machine", lambda: {"cpu_features": "avx2, avx512_vnni", "cores": "2"})
    assert "goal 0.55: missed\n" in markdown(collected(config))
    assert json.loads(report.to_json())["results"]["half/latency@512/decode/openvino-int8/1"]["wall_s"] == [6.0]


def test_the_report_speaks_of_every_kind(config: ExportBenchConfig) -> None:
    for measurement in measurements(config):
        if "latency" in measurement.name:
            result = latency([1.0])
        elif "quality" in measurement.name:
            result = {"denoise_sqnr_db": [30.0, 31.0], "decode_sqnr_db": [40.0], "image_psnr_db": [35.0], "image_ssim": [0.99]}
        else:
            result = COST | {"marks": [{"name": "text: done", "seconds": 1.0, "cpu_seconds": 1.0, "peak_rss_bytes": 5}]}
        export._store(config, measurement.name, result)
    report = collected(config)
    page = markdown(report)
    assert report.missing == () and "Nothing: all that was planned was measured." in page
    for text in (
        "export, optimum",
        "export, torch.onnx.export(dynamo) unet",
        "build tensorrt-rtx-int8-symmetric",
        "calibration int8",
    ):
        assert text in page
    assert "| half | fp8 | as written | 30.0 | 40.0 | 35.0 | 0.9900 |" in page
    assert str(config.work) not in page + report.to_json()


def test_a_busy_machine_is_said(config: ExportBenchConfig) -> None:
    export._store(config, "half/checkpoint", COST | {"load_average": "0.3"})
    assert "The machine was busy" not in markdown(collected(config))
    export._store(config, "half/export/torch-unet", COST | {"load_average": "700"})
    assert "busy** when 1 of 2 measurements began (load 0.3 to 700.0" in markdown(collected(config))


def test_pieces_of_several_days_are_said(config: ExportBenchConfig) -> None:
    export._store(config, "half/checkpoint", COST | {"date": "2026-11-23 23:50"})
    assert "Measured from" not in markdown(collected(config))
    export._store(config, "half/export/torch-unet", COST | {"date": "2026-11-25 00:10"})
    assert "Measured from 2026-11-23 to 2026-11-25." in markdown(collected(config))


def test_spans_are_added_up_by_stage() -> None:
    marks = [
        {"name": "decode: exported", "seconds": 2.0, "cpu_seconds": 1.0, "peak_rss_bytes": 7},
        {"name": "decode: 2.0 s", "seconds": 0.1, "cpu_seconds": 0.1, "peak_rss_bytes": 9},
        {"name": "text: 0.1 s", "seconds": 0.1, "cpu_seconds": 0.1, "peak_rss_bytes": 3},
    ]
    assert stages(marks) == {"decode": {"seconds": 2.1, "cpu_seconds": 1.1, "peak_rss_bytes": 9}}


def test_the_meter_sees_the_peak_of_each_span_alone() -> None:
    meter = Meter()
    block = np.ones(50_000_000, np.uint8)
    meter.mark("large")
    del block
    meter.mark("freeing")
    meter.mark("small")
    large, _, small = (mark["peak_rss_bytes"] for mark in meter.marks)
    assert large - small > 40_000_000
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024  # of other tests, in the order they ran
    assert meter.summary()["peak_rss_bytes"] == max(large, children)


def test_disk_usage_knows_hard_links(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "weights").write_bytes(b"12345678")
    (tmp_path / "a" / "weights").hardlink_to(tmp_path / "weights")
    (tmp_path / "a" / "graph").write_bytes(b"123")
    assert disk_usage(tmp_path / "a") == {"num_bytes": 11, "num_bytes_unshared": 3}


def test_sqnr() -> None:
    reference = np.array([5.0, 7.0, 5.0, 7.0], np.float32)  # a spread of 1
    assert sqnr_db(reference + np.float32([0.1, -0.1, 0.1, -0.1]), reference) == pytest.approx(20.0, abs=1e-3)
    assert sqnr_db(reference, reference) == 200.0
    assert sqnr_db(reference * np.float32(np.nan), reference) == -np.inf


@pytest.mark.parametrize("fault", [lambda x: x[::-1].copy(), lambda x: x * np.float32(np.nan), lambda x: x * 0])
def test_a_wrong_output_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault) -> None:
    x0 = np.random.default_rng(0).standard_normal((4, 8, 8)).astype(np.float32)
    constants = {"timestep": np.array(249), "alpha": np.float32(1), "sigma": np.float32(1)}
    np.savez(tmp_path / "reference.npz", **{"0/latents": x0, "0/x0": x0}, **constants)
    request = {"reference": str(tmp_path / "reference.npz"), "stage": "denoise", "floor_db": 20.0, "num_calls": 2}
    calls: list[int] = []

    def load(request, change=lambda x: x):
        return lambda arrays: (calls.append(1), change(arrays["latents"]))[1]

    monkeypatch.setattr(_export_latency, "load", load)
    assert len(_export_latency.measure(request)["wall_s"]) == 2 and len(calls) == 3
    calls.clear()
    monkeypatch.setattr(_export_latency, "load", lambda request: load(request, fault))
    with pytest.raises(BuildError, match="nothing was timed"):
        _export_latency.measure(request)
    assert len(calls) == 1


@pytest.mark.slow
def test_the_whole_bench_on_a_tiny_checkpoint(tmp_path: Path) -> None:
    """Everything but what needs optimum's environment or TensorRT-RTX, with real children."""
    config = ExportBenchConfig(work=tmp_path / "work", sizes=("tiny",), rounds=1, weight_bits=7)
    run(config)
    report = collected(config)
    failed = {name: result["failed"] for name, result in report.results.items() if "failed" in result}
    assert all("tensorrt-rtx" in name for name in failed), failed
    page = markdown(report)
    assert "| tiny | int8 | as written |" in page and "diffusers-compile-fp32" in page

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from nitro_bench import lean
from nitro_bench._draw import shifted_scheduler
from nitro_bench.lean_report import LeanReport, Side, markdown
from nitro_rt.errors import BuildError, ConfigError, ModelNotFound
from nitro_rt.schedule import grid


def gradient() -> np.ndarray:
    return np.arange(48, dtype=np.uint8).reshape(4, 4, 3)


def test_psnr_of_a_known_difference() -> None:
    assert lean.psnr_db(gradient(), gradient()) == float("inf")
    assert lean.psnr_db(gradient() + 1, gradient()) == pytest.approx(48.1308, abs=1e-4)  # 20 log10(255)


def test_psnr_refuses_references_that_prove_nothing() -> None:
    black = np.zeros((4, 4, 3), np.uint8)
    with pytest.raises(BuildError, match="of one colour"):
        lean.psnr_db(gradient(), black)
    with pytest.raises(BuildError, match=r"draws \(4, 4, 3\), diffusers \(8, 8, 3\)"):
        lean.psnr_db(gradient(), np.zeros((8, 8, 3), np.uint8))


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
@pytest.mark.parametrize("shift", [250, 500])
def test_the_peer_is_told_the_times_of_the_schedule(steps: int, shift: int) -> None:
    scheduler = shifted_scheduler({}, shift)
    scheduler.set_timesteps(steps)
    assert tuple(scheduler.original.tolist()) == grid(steps)
    assert scheduler.timesteps.tolist() == [time * shift // 1000 for time in grid(steps)]


def test_a_config_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"holds no model_index\.json"):
        lean.LeanConfig(bundle=tmp_path, checkpoint=tmp_path)
    with pytest.raises(ConfigError, match="1 or more"):
        lean.LeanConfig(bundle=tmp_path, checkpoint=tmp_path, num_rounds=0)


def test_errors_are_one_line_and_exit_code_1(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    answer = CliRunner().invoke(lean.main, [str(tmp_path), "--checkpoint", str(tmp_path)])
    assert answer.exit_code == 1
    assert answer.output.count("\n") == 1 and "is not a bundle" in answer.output


def test_the_environment_may_not_hold_torch() -> None:
    lean._require_lean(["numpy", "torchless"], "holds")
    with pytest.raises(BuildError, match="holds torch"):
        lean._require_lean(["numpy", "torch"], "holds")


def test_the_report_shows_ratios_and_hides_nothing() -> None:
    report = made_report(load_average="0.10 0.10 0.10")
    page = markdown(report)
    assert "| process start to first image, s | 0.50 | 4.00 | 8.0 |" in page
    assert "The two images are equal." in page and "abc" in page
    assert json.loads(report.to_json())["diffusers"]["first_image_s"] == 4.0


def test_the_report_says_when_the_machine_was_busy() -> None:
    assert "The machine was busy" in markdown(made_report(load_average="1.50 0.10 0.10"))
    assert "busy" not in markdown(made_report(load_average="0.90 2.00 2.00"))


def made_report(load_average: str) -> LeanReport:
    return LeanReport(
        command="python -m nitro_bench.lean b --checkpoint c",
        commit="abc",
        date="2025-01-31",
        machine={"cpu": "some", "cores": "2", "load_average": load_average},
        model="tiny",
        size_px=64,
        backend="openvino",
        compute_dtype="float32",
        prompt="a cat",
        seed=0,
        steps=1,
        num_rounds=3,
        psnr_db=None,
        nitro_rt=side(first_image_s=0.5),
        diffusers=side(first_image_s=4.0),
    )


def side(first_image_s: float) -> Side:
    return Side(
        version="1",
        num_packages=2,
        installed_mb=3.0,
        model_mb=1.0,
        import_ms=10.0,
        import_pipeline_ms=20.0,
        first_image_s=first_image_s,
        first_image_cpu_s=1.0,
        peak_rss_mb=100.0,
        image_ms=5.0,
        packages={"torch": "2"},
        samples=(),
    )


@pytest.mark.slow
def test_the_whole_measurement_on_a_tiny_checkpoint(tmp_path: Path) -> None:
    from checkpoints import make_tiny_sdxl
    from nitro_engines import BuildRequest, build

    checkpoint = make_tiny_sdxl(tmp_path / "checkpoint")
    build(
        BuildRequest(
            model=str(checkpoint),
            steps=(1,),
            precision="fp32",
            backend="onnxruntime",
            targets=(),
            size_px=64,
            batch=1,
            shift=None,
            out=tmp_path / "bundle",
        )
    )
    arguments = [
        str(tmp_path / "bundle"),
        "--checkpoint",
        str(checkpoint),
        "--rounds",
        "1",
        "--report",
        str(tmp_path / "reports"),
    ]
    answer = CliRunner().invoke(lean.main, arguments)
    assert answer.exit_code == 0, answer.output
    (written,) = (tmp_path / "reports").glob("*.json")
    result = json.loads(written.read_text())
    ours, theirs = result["nitro_rt"], result["diffusers"]
    assert "torch" not in ours["packages"] and "torch" in theirs["packages"]
    assert result["psnr_db"] is None or result["psnr_db"] >= 45
    assert ours["installed_mb"] < theirs["installed_mb"] and ours["peak_rss_mb"] < theirs["peak_rss_mb"]

"""Loss curves from a run's logs."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from PIL import Image

from nitro_rt.errors import ModelNotFound
from nitro_training.curves import plot, read_log


def test_a_loss_that_starts_late_is_nan_before(tmp_path: Path) -> None:
    log = tmp_path / "student.loss.jsonl"
    log.write_text('{"step": 20, "d_loss": 2.0}\n{"step": 40, "d_loss": 1.9, "regression": 0.4}\n', encoding="utf-8")
    columns = read_log(log)
    assert columns["step"] == [20, 40] and math.isnan(columns["regression"][0]) and columns["regression"][1] == 0.4


@pytest.mark.parametrize(("kind", "num_panels"), [("teacher_run", 3), ("student_run", 2)])
def test_every_stage_of_a_run_has_a_panel(kind: str, num_panels: int, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    run: Path = request.getfixturevalue(kind)
    assert len(list(run.glob("*.loss.jsonl"))) == num_panels
    plot(run, tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as image:
        assert image.width == 360 * num_panels


def test_a_folder_without_logs_is_said(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="no loss logs"):
        plot(tmp_path, tmp_path / "curves.png")

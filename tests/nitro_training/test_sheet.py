"""Sheets of pictures: a student beside its teacher."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nitro_rt.errors import ModelNotFound
from nitro_training import sheet
from nitro_training.sheet import Checkpoint, read_prompts

GAP, CAPTION, SIDE = 10, 16, 64


def test_a_sheet_shows_teacher_and_student_prompt_by_prompt(
    teacher_run: Path, student_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts, out = tmp_path / "prompts.txt", tmp_path / "sheet.png"
    prompts.write_text("# food\napple\nheldout: red banana\n", encoding="utf-8")
    arguments = [str(student_run), "--teacher", str(teacher_run / "checkpoint"), "--prompts", str(prompts), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["sheet", *arguments])
    sheet.main()
    assert capsys.readouterr().out.strip() == str(out)
    with Image.open(out) as image:
        page = np.asarray(image.convert("RGB")).astype(int)
    assert page.shape == (CAPTION + SIDE + CAPTION, 4 * (4 * SIDE + GAP) + GAP, 3)
    expected = sheet.draw_columns(
        Checkpoint.load(teacher_run / "checkpoint"), Checkpoint.load(student_run / "checkpoint"), ["apple", "red banana"], 0
    )
    assert list(expected) == ["teacher, 25 steps", "student, 1 step", "student, 2 steps", "student, 4 steps"]
    for column, images in enumerate(expected.values()):
        for row, image in enumerate(images.numpy().astype(int)):
            left = GAP + row * (4 * SIDE + GAP) + column * SIDE
            assert np.array_equal(page[CAPTION : CAPTION + SIDE, left : left + SIDE], image)


def test_pages_have_as_many_rows_as_the_prompts_need() -> None:
    columns = {"one": torch.zeros(5, 8, 8, 3, dtype=torch.uint8)}
    page = sheet.sheet(["a", "b", "c", "d", "e"], columns, prompts_per_row=2)
    assert page.size == (2 * (8 + GAP) + GAP, CAPTION + 3 * (8 + CAPTION))


def test_a_run_without_a_checkpoint_is_said(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"no checkpoint at .*: model_index.json is missing"):
        Checkpoint.load(tmp_path)


def test_prompts_may_have_comments(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("# a comment\n\n a red apple \nheldout: a dog\n", encoding="utf-8")
    assert read_prompts(path) == ["a red apple", "heldout: a dog"]

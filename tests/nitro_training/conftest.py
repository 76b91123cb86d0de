"""A tiny teacher and a tiny student, trained once for all tests that look at finished runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_run import ICONS, train, write_student_recipe, write_teacher_recipe


@pytest.fixture(scope="session")
def teacher_recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher's recipe; its data set is there."""
    from nitro_training.emoji import build_dataset
    from nitro_training.recipe import read_teacher_recipe

    folder = tmp_path_factory.mktemp("recipes")
    path = write_teacher_recipe(folder)
    build_dataset(read_teacher_recipe(path).emoji, folder / "concepts.txt", ICONS, folder / "data")
    return path


@pytest.fixture(scope="session")
def teacher_run(teacher_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished teacher; read only."""
    return train(teacher_recipe, tmp_path_factory.mktemp("teacher") / "run").parent


@pytest.fixture(scope="session")
def student_recipe(teacher_recipe: Path, teacher_run: Path) -> Path:
    return write_student_recipe(teacher_recipe.parent, teacher_run / "checkpoint")


@pytest.fixture(scope="session")
def student_run(student_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished student; read only."""
    return train(student_recipe, tmp_path_factory.mktemp("student") / "run").parent

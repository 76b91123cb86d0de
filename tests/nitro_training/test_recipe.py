"""Recipes: what is read, what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_run import changed

from nitro_rt.errors import ConfigError, ModelNotFound
from nitro_training.recipe import StudentRecipe, TeacherRecipe, read_recipe, read_student_recipe, read_teacher_recipe

RECIPES = Path(__file__).parents[2] / "training" / "recipes"
TEACHER = """version = 2
[run]
name = "x"
trains = "teacher"
licence = "MIT"
[data]
folder = "d"
concepts = "c.txt"
vocabulary = "v"
"""
STUDENT = """version = 2
[run]
name = "x"
trains = "student"
licence = "MIT"
[prompts]
files = ["p.txt"]
[teacher]
checkpoint = "t"
sampler = "lcm"
num_steps = 4
guidance = 1.0
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_teacher_that_ships_is_valid() -> None:
    recipe = read_teacher_recipe(RECIPES / "nitro-emoji-teacher.toml")
    assert recipe.run.name == "nitro-emoji-teacher" and (RECIPES / recipe.data.concepts).is_file()


@pytest.mark.parametrize(("name", "shift"), [("nitro-emoji", 500), ("nitrosd-realism", 250), ("nitrosd-vibrant", 500)])
def test_the_students_that_ship_are_valid(name: str, shift: int) -> None:
    recipe = read_student_recipe(RECIPES / f"{name}.toml")
    assert recipe.run.name == name and recipe.student.shifted_timestep == shift and recipe.pool.refresh_rate == 0.01


def test_a_recipe_is_what_it_trains(tmp_path: Path) -> None:
    assert isinstance(read_recipe(write(tmp_path, TEACHER)), TeacherRecipe)
    with pytest.raises(ConfigError, match=r"recipe.toml trains a teacher; this needs a recipe that trains a student"):
        read_student_recipe(write(tmp_path, TEACHER))
    assert isinstance(read_recipe(write(tmp_path, STUDENT)), StudentRecipe)
    with pytest.raises(ConfigError, match=r"recipe.toml trains a student; this needs a recipe that trains a teacher"):
        read_teacher_recipe(write(tmp_path, STUDENT))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"teacher_batch": "'many'"}, r"teacher: batch must be of type int, found 'many'"),
        ({"teacher_batch": "-3"}, r"batch must not be negative, found -3"),
        ({"teacher_batch": "0"}, r"teacher.batch must be at least 1"),
        ({"teacher_batch": "true"}, r"batch must be of type int, found True"),
        ({"teacher_learning_rate": "1.0"}, r"teacher: unknown option 'learning_rate'; available: start, num_steps"),
        ({"model_channels": "[10, 20]"}, r"needs 3 values, found 2"),
        ({"model_channels": "[10, 20, 30]"}, r"multiples of norm_groups"),
        ({"emoji_size_px": "100"}, r"multiple of 8"),
        ({"loop_log_every": "0"}, r"loop.log_every must be at least 1"),
    ],
)
def test_a_wrong_teacher_is_refused_by_name(values: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        read_recipe(write(tmp_path, changed(TEACHER + "[teacher]\n[model]\n[emoji]\n[loop]\n", **values)))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"student_learning_rate": "1.0"}, r"student: unknown option 'learning_rate'; available: init, shifted_timestep"),
        ({"student_batch": "1"}, r"student.batch must be at least 2"),
        ({"student_shifted_timestep": "0"}, r"from 1 to 1000, got 0"),
        ({"student_stage_steps": "[1, 1, 1, 1, 1]"}, r"student.stage_steps needs one to 4 numbers"),
        ({"student_loss": "'wasserstein'"}, r"student.loss is one of hinge, critic, nonsaturating, got 'wasserstein'"),
        ({"student_precision": "'fp16'"}, r"student.precision is bf16 or fp32"),
        ({"student_adversarial_weight": "0"}, r"both 0: nothing would be learnt"),
        ({"pool_width": "40"}, r"multiple of 32"),
        ({"pool_refresh_rate": "1.5"}, r"share from 0 to 1"),
        ({"pool_noise_levels": "[]"}, r"one or more times"),
        ({"pool_tasks": "['sideways']"}, r"pool.tasks needs one or more of global-conditional"),
        ({"pool_heads_per_cell": "0"}, r"at least 1"),
        ({"regression_one_step_share": "2.0"}, r"regression.one_step_share is a share"),
        ({"teacher_sampler": "'euler'"}, r"teacher.sampler is one of dpm-solver\+\+, lcm, ddim-trailing, got 'euler'"),
        ({"teacher_checkpoint": "''"}, r"teacher.checkpoint is empty"),
        ({"prompts_files": "[]"}, r"prompts.files needs one or more text files"),
        ({"prompts_files": "['a', 3]"}, r"files\[1\] must be of type str, found 3"),
        ({"backbone_source": "'clip'"}, r"backbone.source is one of teacher, base, got 'clip'"),
    ],
)
def test_a_wrong_student_is_refused_by_name(values: dict[str, str], message: str, tmp_path: Path) -> None:
    sections = "[student]\n[pool]\n[regression]\n[backbone]\n"
    with pytest.raises(ConfigError, match=message):
        read_recipe(write(tmp_path, changed(STUDENT + sections, **values)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("version = ", r"not valid TOML"),
        (STUDENT.replace("version = 2", "version = 1"), r"recipe version 1, this nitro-rt reads 2; compare"),
        (STUDENT.replace("version = 2\n", ""), r"recipe version None, this nitro-rt reads 2"),
        (STUDENT.replace('"student"', '"pupil"'), r"run: trains must be one of student, teacher, found 'pupil'"),
        (STUDENT.replace('trains = "student"\n', ""), r"run: trains must be one of student, teacher, found None"),
        (STUDENT.replace('name = "x"\n', ""), r"run: the option 'name' is missing"),
        (STUDENT.replace("num_steps = 4\n", ""), r"teacher: the option 'num_steps' is missing"),
        (STUDENT + "[optimizer]\n", r"unknown option 'optimizer'; available: version, run, prompts"),
        (STUDENT + "[data]\n", r"unknown option 'data'"),
        ("pool = 3\n" + STUDENT, r"pool must be a table, found 3"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused_by_name(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        read_recipe(write(tmp_path, text))


def test_a_missing_recipe_is_said(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="no recipe at"):
        read_recipe(tmp_path / "none.toml")

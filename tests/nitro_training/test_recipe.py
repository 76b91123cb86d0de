"""Recipes: what is read, what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from nitro_rt.errors import ConfigError, ModelNotFound
from nitro_training.recipe import read_recipe

RECIPES = Path(__file__).parents[2] / "training" / "recipes"
MINIMAL = """version = 1
[run]
name = "x"
licence = "MIT"
data = "d"
concepts = "c.txt"
vocabulary = "v"
"""


def test_the_shipped_recipe_is_valid() -> None:
    recipe = read_recipe(RECIPES / "nitro-emoji.toml")
    assert recipe.run.name == "nitro-emoji" and recipe.student.shifted_timestep in (250, 500)
    assert (RECIPES / recipe.run.concepts).is_file()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (MINIMAL + "[student]\nlearning_rate = 1.0\n", r"unknown option 'learning_rate'; available: shifted_timestep"),
        (MINIMAL + "[optimizer]\n", r"unknown option 'optimizer'"),
        (MINIMAL.replace("version = 1", "version = 2"), r"version 2, this nitro-rt reads 1"),
        (MINIMAL.replace('name = "x"\n', ""), r"the option 'name' is missing"),
        (MINIMAL + "[teacher]\nbatch = 'many'\n", r"batch must be of type int, found 'many'"),
        (MINIMAL + "[student]\nbatch = 1\n", r"batch must be at least 2"),
        (MINIMAL + "[student]\nshifted_timestep = 0\n", r"from 1 to 1000, got 0"),
        (MINIMAL + "[pool]\nwidth = 40\n", r"multiple of 32"),
        (MINIMAL + "[pool]\nrefresh_rate = 1.5\n", r"share from 0 to 1"),
        (MINIMAL + "[model]\nchannels = [10, 20]\n", r"needs 3 values, found 2"),
        (MINIMAL + "[pool]\nnoise_levels = []\n", r"one or more times"),
        (MINIMAL + "[pool]\nheads_per_cell = 0\n", r"at least 1"),
        (MINIMAL + "[teacher]\nbatch = -3\n", r"batch must not be negative"),
        (MINIMAL + "[teacher]\nbatch = 0\n", r"batch must be at least 1"),
        (MINIMAL + "[student]\nteacher_steps = 0\n", r"at least 1"),
        (MINIMAL + "[emoji]\nsize_px = 100\n", r"multiple of 8"),
        ("version = ", r"not valid TOML"),
    ],
)
def test_a_wrong_recipe_is_refused_by_name(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        read_recipe(path)


def test_a_missing_recipe_is_said(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="no recipe at"):
        read_recipe(tmp_path / "none.toml")

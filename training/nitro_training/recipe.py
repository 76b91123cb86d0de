"""A training recipe: one TOML file, checked; unknown keys are refused."""

from __future__ import annotations

import dataclasses
import tomllib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nitro_rt.errors import ConfigError, ModelNotFound
from nitro_training.autoencoder import AutoencoderConfig, DecoderConfig
from nitro_training.emoji import EmojiConfig
from nitro_training.loop import LoopConfig
from nitro_training.model import ModelConfig
from nitro_training.pool import HeadOptimizerConfig, PoolConfig
from nitro_training.prompts import PromptsConfig
from nitro_training.regression import RegressionConfig
from nitro_training.samples import TeacherSourceConfig
from nitro_training.sources import BackboneConfig
from nitro_training.student import StudentConfig
from nitro_training.teacher import TeacherConfig

RECIPE_VERSION = 2


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What the run is called and what it makes."""

    name: str
    trains: str
    """`student` (NitroFusion) or `teacher` (a small model of one's own)."""
    licence: str
    """Of the weights; goes into every bundle built from them."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where a small teacher's data lie. Paths are relative to the folder that the command runs in."""

    folder: str
    """The data set, made by `make emoji-data`."""
    concepts: str
    """The concept list; relative to the recipe."""
    vocabulary: str
    """open_clip's vocabulary (wheel or .txt.gz)."""
    num_merges: int = 3000
    """How many of its merges the tokenizer keeps."""


@dataclass(frozen=True, kw_only=True)
class TeacherRecipe:
    """Everything that decides a small teacher: autoencoder, text encoders, UNet."""

    version: int
    run: RunConfig
    data: DataConfig
    emoji: EmojiConfig = field(default_factory=EmojiConfig)
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)


@dataclass(frozen=True, kw_only=True)
class StudentRecipe:
    """Everything that decides a one-to-four-step student."""

    version: int
    run: RunConfig
    prompts: PromptsConfig
    teacher: TeacherSourceConfig
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    regression: RegressionConfig = field(default_factory=RegressionConfig)
    pool: PoolConfig = field(default_factory=PoolConfig)
    heads: HeadOptimizerConfig = field(default_factory=HeadOptimizerConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)


_KINDS: dict[str, type[TeacherRecipe] | type[StudentRecipe]] = {"student": StudentRecipe, "teacher": TeacherRecipe}


def read_recipe(path: Path) -> TeacherRecipe | StudentRecipe:
    """Raises: ModelNotFound if there is no such file, ConfigError naming the key that is wrong."""
    if not path.is_file():
        raise ModelNotFound(f"no recipe at {path}; the project's own are in training/recipes")
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{path} is not valid TOML: {exc}") from exc
    if data.get("version") != RECIPE_VERSION:
        raise ConfigError(
            f"{path.name} has recipe version {data.get('version')!r}, this nitro-rt reads {RECIPE_VERSION}; "
            "compare it with the recipes in training/recipes"
        )
    run = data.get("run")
    trains = run.get("trains") if isinstance(run, dict) else None
    if trains not in _KINDS:
        raise ConfigError(f"{path.name}: run: trains must be one of {', '.join(_KINDS)}, found {trains!r}")
    recipe = _read(_KINDS[trains], data, path.name)
    assert isinstance(recipe, (TeacherRecipe, StudentRecipe))
    return recipe


def read_teacher_recipe(path: Path) -> TeacherRecipe:
    """Raises: ConfigError if the recipe trains a student, and as `read_recipe`."""
    recipe = read_recipe(path)
    if not isinstance(recipe, TeacherRecipe):
        raise ConfigError(f"{path.name} trains a {recipe.run.trains}; this needs a recipe that trains a teacher")
    return recipe


def read_student_recipe(path: Path) -> StudentRecipe:
    """Raises: ConfigError if the recipe trains a teacher, and as `read_recipe`."""
    recipe = read_recipe(path)
    if not isinstance(recipe, StudentRecipe):
        raise ConfigError(f"{path.name} trains a {recipe.run.trains}; this needs a recipe that trains a student")
    return recipe


def _read(kind: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return _read_dataclass(typing.cast(type[Any], kind), value, where)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple:
        if not isinstance(value, list):
            raise ConfigError(f"{where} must be a list, found {value!r}")
        if arguments[-1] is not Ellipsis and len(value) != len(arguments):
            raise ConfigError(f"{where} needs {len(arguments)} values, found {len(value)}")
        return tuple(_read(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(value))
    if origin is types.UnionType:
        return _read(arguments[0], value, where)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ConfigError(f"{where} must be of type {kind.__name__}, found {value!r}")
    if kind in (int, float) and value < 0:
        raise ConfigError(f"{where} must not be negative, found {value!r}")
    return value


def _read_dataclass(kind: type[Any], value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise ConfigError(f"{where} must be a table, found {value!r}")
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    for key in value:
        if key not in fields:
            raise ConfigError(f"{where}: unknown option {key!r}; available: {', '.join(fields)}")
    for key, f in fields.items():
        if key not in value and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{where}: the option {key!r} is missing")
    return kind(**{key: _read(hints[key], item, f"{where}: {key}") for key, item in value.items()})

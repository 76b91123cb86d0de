"""What the ablation compares: the method, and the method with one part taken away.

Source: Chen et al. 2024, NitroFusion, arXiv:2412.02030, table 2; the single discriminator is ours.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nitro_rt.errors import ConfigError
from nitro_training.ablation_scores import NUM_IMAGES
from nitro_training.metric import DEFAULT_FOLDER
from nitro_training.recipe import StudentRecipe, read_student_recipe

NUM_SEEDS = 3


@dataclass(frozen=True, kw_only=True)
class Variant:
    """The method, or what is left of it."""

    name: str
    title: str
    pool: Mapping[str, Any] = field(default_factory=dict)
    """What it changes in the recipe's [pool]."""

    def recipe(self, base: StudentRecipe, seed: int) -> StudentRecipe:
        """The recipe of one run; nothing but [pool] and the two seeds differs from the base."""
        pool = dataclasses.replace(base.pool, **self.pool, seed=base.pool.seed + seed)
        return dataclasses.replace(base, pool=pool, student=dataclasses.replace(base.student, seed=base.student.seed + seed))


_ONE_TASK = {"tasks": ("global-conditional",)}
_FIXED = {"heads_per_cell": 1, "drawn_per_cell": 1, "refresh_rate": 0.0}
VARIANTS = (
    Variant(name="full", title="full"),
    Variant(name="one-objective", title="without multi-scale dual-objective", pool=_ONE_TASK),
    Variant(name="no-refresh", title="without refresh", pool={"refresh_rate": 0.0}),
    Variant(name="fixed-heads", title="without dynamic pool", pool=_FIXED),
    Variant(name="single", title="single discriminator", pool={**_ONE_TASK, **_FIXED, "specialised": False}),
)


@dataclass(frozen=True, kw_only=True)
class AblationConfig:
    """One ablation."""

    recipe: Path
    """Of a student; its options are the full method's."""
    out: Path
    """The folder of its results."""
    seeds: int = NUM_SEEDS
    """Runs of every variant."""
    steps: int = 0
    """Optimiser steps of every run; 0 takes the recipe's."""
    init: str = ""
    """One-step weights: a run's folder, of which its regression is taken, or whatever `student.init` may name; empty takes
    the recipe's, or trains them by its [regression]."""
    metric: Path = DEFAULT_FOLDER
    """The judge's folder."""
    num_images: int = NUM_IMAGES
    """Images that every run is scored on."""

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise ConfigError(f"--seeds must be at least 1, got {self.seeds}")
        if self.steps < 0:
            raise ConfigError(f"--steps must not be negative, got {self.steps}")

    def resolved(self) -> StudentRecipe:
        """The base recipe, of one stage.

        Raises: ConfigError if the recipe trains more than the first step and `steps` does not say how many, or as
            `read_student_recipe`.
        """
        recipe = read_student_recipe(self.recipe)
        student = recipe.student
        if self.steps:
            student = dataclasses.replace(student, stage_steps=(self.steps,))
        if len(student.stage_steps) != 1:
            raise ConfigError(
                f"{self.recipe.name} has student.stage_steps {list(student.stage_steps)}; the ablation compares one-step "
                "students: give one number there, or --steps"
            )
        return dataclasses.replace(recipe, student=student)


def key_of(recipe: StudentRecipe) -> dict[str, Any]:
    """The part of a run's recipe that decides its result."""
    return {name: dataclasses.asdict(getattr(recipe, name)) for name in ("backbone", "pool", "heads", "student")}

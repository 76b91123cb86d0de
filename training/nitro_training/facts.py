"""What `run.json` says of every run: the resolved recipe, versions, the machine."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import platform
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from nitro_training.loop import Losses
from nitro_training.recipe import StudentRecipe, TeacherRecipe

Report = Callable[[str, int, int, Losses], None]
"""Called with (stage, steps done, steps in all, losses)."""


def facts(recipe: TeacherRecipe | StudentRecipe) -> dict[str, Any]:
    """What holds for every kind of run; the checkpoint's own facts are added to it."""
    return {
        "schema_version": 2,
        "name": recipe.run.name,
        "licence": recipe.run.licence,
        "recipe": dataclasses.asdict(recipe),
        "versions": {name: metadata.version(name) for name in ("torch", "diffusers", "transformers", "accelerate", "numpy")},
        "python": platform.python_version(),
        "num_threads": torch.get_num_threads(),
        "date": datetime.date.today().isoformat(),
    }


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write a JSON file by one rename."""
    temporary = path.with_suffix(".partial")
    temporary.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(temporary, path)

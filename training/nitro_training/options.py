"""Every option of a student recipe in Markdown tables, from the docstrings beside the options.

`python -m nitro_training.options` prints what stands in docs/recipes.md.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import textwrap
import typing
from collections.abc import Iterator
from typing import Any

from nitro_training import script
from nitro_training.recipe import StudentRecipe

_PLAIN = {
    "name": "The run's name; its folder is `runs/<name>` if `--out` says nothing else.",
    "lora_scale": "Strength at which the LoRA is fused.",
    "num_steps": "Number of steps.",
    "seed": "What all randomness of this part follows from.",
    "lr": "Learning rate.",
    "betas": "AdamW's.",
    "weight_decay": "AdamW's.",
    "warmup_steps": "Steps over which the learning rate rises.",
    "width": "Channels inside a head.",
    "adversarial_weight": "Weight of the adversarial loss.",
}
"""For options that need no words beside their name in the code."""


def tables() -> Iterator[str]:
    """A section per table of the recipe."""
    for section, kind in typing.get_type_hints(StudentRecipe).items():
        if not dataclasses.is_dataclass(kind):
            continue
        yield f"## [{section}]\n\n{inspect.cleandoc(kind.__doc__ or '')}\n\n| option | default | meaning |\n|---|---|---|"
        meanings = _docstrings(typing.cast(type[Any], kind))
        for field in dataclasses.fields(kind):
            yield f"| `{field.name}` | {_default(field)} | {meanings.get(field.name) or _PLAIN[field.name]} |"
        yield ""


def _docstrings(kind: type[Any]) -> dict[str, str]:
    """Field -> the string that stands below it in the class."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(definition, ast.ClassDef)
    found = {}
    for field, below in zip(definition.body, definition.body[1:], strict=False):
        if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(below, ast.Expr)):
            continue
        if isinstance(below.value, ast.Constant) and isinstance(below.value.value, str):
            found[field.target.id] = " ".join(below.value.value.split()).replace("|", "\\|")
    return found


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is dataclasses.MISSING:
        return "needed"
    value = list(field.default) if isinstance(field.default, tuple) else field.default
    return f"`{json.dumps(value)}`"


def main() -> None:
    print("\n".join(tables()))


if __name__ == "__main__":
    script.run(main)

"""One finished run of the ablation: a small JSON file with its scores and with everything that they follow from."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nitro_rt.errors import TrainingError
from nitro_training.facts import write_json

SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Result:
    """One scored run, or one of the two rows to compare with: `teacher` and `init`."""

    name: str
    seed: int | None
    scores: dict[str, float]
    about: dict[str, Any]
    """Heads, steps, time, versions: what is reported but decides nothing."""
    key: dict[str, Any]
    """What the scores follow from."""
    schema_version: int = SCHEMA_VERSION

    def write(self, path: Path) -> None:
        """By one rename. Raises: TrainingError if it cannot be written."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, dataclasses.asdict(self))
        except OSError as exc:
            raise TrainingError(f"cannot write {path}: {exc}; make room, the runs before it are kept") from exc

    @classmethod
    def read(cls, path: Path) -> Result:
        """Raises: TrainingError if the file is damaged or of another version."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data["schema_version"] != SCHEMA_VERSION:
                raise TrainingError(
                    f"{path} has version {data['schema_version']}, this nitro-rt reads {SCHEMA_VERSION}; remove it, and the "
                    "run is made anew"
                )
            return cls(**data)
        except (OSError, ValueError, KeyError, TypeError) as exc:
            raise TrainingError(f"{path} is damaged ({exc!r}); remove it, and the run is made anew") from exc

    def require_key(self, path: Path, key: Mapping[str, Any]) -> None:
        """Raises: TrainingError naming the first options that differ from those of `key`."""
        was, now = _flat(self.key), _flat(json.loads(json.dumps(key)))
        differing = [name for name in sorted(was.keys() | now.keys()) if was.get(name) != now.get(name)]
        if differing:
            shown = "; ".join(f"{name} was {_short(was.get(name))}, now {_short(now.get(name))}" for name in differing[:3])
            raise TrainingError(
                f"{path} was made with other options: {shown}; use the options it was made with, another --out, or remove the "
                "file to have this run made anew"
            )


def _flat(options: Any, where: str = "") -> dict[str, Any]:
    if not isinstance(options, Mapping):
        return {where: options}
    parts = [_flat(part, f"{where}.{name}".lstrip(".")) for name, part in options.items()]
    return {name: value for part in parts for name, value in part.items()}


def _short(value: object) -> str:
    text = str(value)
    return text[:12] + "..." if len(text) > 40 else text

"""The JSON Schema of a tree of dataclasses, and reading JSON back into it, strictly. Both walk the type hints."""

from __future__ import annotations

import dataclasses
import inspect
import json
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
_SCALARS = {str: "string", int: "integer", float: "number", bool: "boolean"}


class Misfit(ValueError):
    """A value is not what the type says; the message names the place."""


def schema_of(kind: type, title: str, schema_version: int) -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of dataclass `kind`, each dataclass in `$defs` with its docstring."""
    definitions: dict[str, Any] = {}
    root = _schema(kind, definitions)
    definitions[kind.__name__]["properties"]["schema_version"] = {"const": schema_version}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": title,
        **root,
        "$defs": dict(sorted(definitions.items())),
    }


def _schema(kind: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    options, origin, arguments = _options(kind), typing.get_origin(kind), typing.get_args(kind)
    if options:
        return {"anyOf": [_schema(options[0], definitions), {"type": "null"}]}
    if dataclasses.is_dataclass(kind):
        name = typing.cast(type, kind).__name__
        if name not in definitions:
            definitions[name] = {}  # before its fields: they may come back to it
            hints = typing.get_type_hints(kind)
            definitions[name] = {
                "description": inspect.getdoc(kind) or "",
                "type": "object",
                "properties": {field: _schema(hint, definitions) for field, hint in hints.items()},
                "required": sorted(hints),
                "additionalProperties": False,
            }
        return {"$ref": f"#/$defs/{name}"}
    if origin is tuple:
        return {"type": "array", "items": _schema(arguments[0], definitions)}
    if origin is dict:
        return {"type": "object", "additionalProperties": _schema(arguments[1], definitions)}
    return {"type": _SCALARS[kind]}


def read(kind: type[T], value: Any, place: str) -> T:
    """`value`, as parsed from JSON, as `kind`. Raises: Misfit naming the first place that does not fit."""
    return typing.cast(T, _read(kind, value, place))


def _read(kind: Any, value: Any, place: str) -> Any:
    options, origin, arguments = _options(kind), typing.get_origin(kind), typing.get_args(kind)
    if options:
        return None if value is None else _read(options[0], value, place)
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        _require(isinstance(value, dict), place, "an object", value)
        wrong = sorted(set(value) ^ set(hints))
        if wrong:
            raise Misfit(f"{place} {'has the unknown' if wrong[0] in value else 'lacks the'} field {wrong[0]!r}")
        return typing.cast(type, kind)(**{name: _read(hint, value[name], f"{place}.{name}") for name, hint in hints.items()})
    if origin is tuple:
        _require(isinstance(value, list), place, "a list", value)
        return tuple(_read(arguments[0], item, f"{place}[{index}]") for index, item in enumerate(value))
    if origin is dict:
        _require(isinstance(value, dict), place, "an object", value)
        return {key: _read(arguments[1], item, f"{place}.{key}") for key, item in value.items()}
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    _require(type(value) is kind, place, _SCALARS[kind], value)
    return value


def _options(kind: Any) -> list[Any]:
    """What an optional type may be beside None; empty for any other type."""
    if typing.get_origin(kind) not in (types.UnionType, typing.Union):
        return []
    return [option for option in typing.get_args(kind) if option is not type(None)]


def _require(fits: bool, place: str, expected: str, value: Any) -> None:
    if not fits:
        raise Misfit(f"{place} must be {expected}, found {str(value)[:60]!r}")


def main() -> None:
    """Write the schema of the reports into the repository that this file lies in."""
    from nitro_bench.bench_report import SCHEMA_VERSION, BenchReport

    path = Path(__file__).resolve().parents[1] / "reports" / "schema" / f"bench-{SCHEMA_VERSION}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    schema = schema_of(BenchReport, "A report of nitro-rt bench", SCHEMA_VERSION)
    path.write_text(json.dumps(schema, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

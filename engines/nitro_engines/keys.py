"""Keys: digests of canonical JSON over everything that decides an artefact, and their comparison field by field."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Fields = dict[str, Any]
"""What decides an artefact, by name: JSON values only."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One field in which two keys differ; None where a key lacks it."""

    field: str
    """Dotted path: `toolchain.openvino`."""
    wanted: Any
    cached: Any

    def __str__(self) -> str:
        return f"{self.field}: {_shown(self.wanted)} wanted, {_shown(self.cached)} cached"


def canonical_json(fields: Mapping[str, Any]) -> str:
    """One spelling per value: sorted keys, no spaces, UTF-8. Tuples become lists."""
    return json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def key_of(fields: Mapping[str, Any]) -> str:
    """sha256 of the canonical JSON, in hex."""
    return hashlib.sha256(canonical_json(fields).encode()).hexdigest()


def differences(wanted: Mapping[str, Any], cached: Mapping[str, Any]) -> tuple[Difference, ...]:
    """Every leaf field that is not equal, by name."""
    left, right = _flat(wanted), _flat(cached)
    return tuple(
        Difference(field=field, wanted=left.get(field), cached=right.get(field))
        for field in sorted({*left, *right})
        if left.get(field) != right.get(field)
    )


def nearest(wanted: Mapping[str, Any], cached: Mapping[str, Fields]) -> str | None:
    """The cached key that differs in the fewest fields (the smallest key among equals), None if nothing is cached."""
    return min(cached, key=lambda key: (len(differences(wanted, cached[key])), key), default=None)


def _flat(fields: Mapping[str, Any], prefix: str = "") -> Fields:
    leaves: Fields = {}
    for name, value in fields.items():
        if isinstance(value, Mapping) and value:
            leaves |= _flat(value, f"{prefix}{name}.")
        else:
            leaves[prefix + name] = list(value) if isinstance(value, tuple) else value
    return leaves


def _shown(value: Any) -> str:
    if isinstance(value, str) and len(value) == 64:
        return value[:12]  # a digest
    if isinstance(value, list):
        return "[" + ", ".join(map(_shown, value)) + "]"
    return "nothing" if value is None else str(value)

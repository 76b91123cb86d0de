"""How the real functions of TensorRT and of CUDA's Python packages may be called, and what they return.

Python tells it for some; the others write it into the first lines of their docstrings, as pybind11 and Cython do:
`name(self: T, a: T, b: T = d) -> R`, in pybind11 once per overload behind a number.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Signature:
    """One way to call something, `self` left out."""

    positional: tuple[str, ...]
    keyword_only: tuple[str, ...]
    required: frozenset[str]
    is_open: bool = False
    """Takes any number of further arguments."""

    def takes(self, num_positional: int, keywords: list[str]) -> bool:
        if self.is_open:
            return True
        if num_positional > len(self.positional):
            return False
        given = set(self.positional[:num_positional])
        if given & set(keywords) or not set(keywords) <= {*self.positional, *self.keyword_only}:
            return False
        return self.required <= given | set(keywords)

    def __str__(self) -> str:
        return f"({', '.join((*self.positional, *(f'{name}=' for name in self.keyword_only)))})"


def signatures_of(called: Any) -> Iterator[Signature]:
    """Every overload; nothing where neither Python nor the docstring tells."""
    try:
        parameters = list(inspect.signature(called).parameters.values())
    except (TypeError, ValueError):
        yield from _documented(called)
        return
    kinds = inspect.Parameter
    named = [p for p in parameters if p.name not in ("self", "cls")]
    yield Signature(
        positional=tuple(p.name for p in named if p.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)),
        keyword_only=tuple(p.name for p in named if p.kind is kinds.KEYWORD_ONLY),
        required=frozenset(
            p.name for p in named if p.default is kinds.empty and p.kind not in (kinds.VAR_POSITIONAL, kinds.VAR_KEYWORD)
        ),
        is_open=any(p.kind in (kinds.VAR_POSITIONAL, kinds.VAR_KEYWORD) for p in named),
    )


def _documented(called: Any) -> Iterator[Signature]:
    what = called.__init__ if inspect.isclass(called) and not _heads(called) else called
    for head, _ in _heads(what):
        positional: list[str] = []
        keyword_only: list[str] = []
        required: set[str] = set()
        kind, is_open = positional, False
        for argument in map(str.strip, _split(head)):
            if argument == "*":
                kind = keyword_only
            elif argument.startswith("*"):
                is_open = True
            elif argument not in ("", "/"):
                name = re.split(r"[:=]", argument)[0].split()[-1]
                if name in ("self", "cls"):
                    continue
                kind.append(name)
                if "=" not in argument:
                    required.add(name)
        yield Signature(tuple(positional), tuple(keyword_only), frozenset(required), is_open)


def _heads(called: Any) -> list[tuple[str, str]]:
    """(arguments, return type) of each signature in a docstring, as text."""
    name = getattr(called, "__name__", "")
    lines = re.findall(rf"^(?:\d+\. )?{re.escape(name)}(\(.*)$", called.__doc__ or "", re.MULTILINE) if name else []
    if len(lines) > 1:  # the first of several only says that there are several
        lines = [line for line in lines if not line.startswith("(*args")]
    heads = []
    for line in lines:
        end = _closing(line)
        heads.append((line[1:end], line[end + 1 :].partition("->")[2].strip()))
    return heads


def _closing(text: str) -> int:
    depth = 0
    for index, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if depth == 0:
            return index
    return len(text)


def _split(arguments: str) -> Iterator[str]:
    """At the commas that are in no bracket."""
    depth, start = 0, 0
    for index, character in enumerate(arguments):
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            yield arguments[start:index]
            start = index + 1
    yield arguments[start:]


def return_type_of(called: Any) -> str:
    """As it is written; empty where nothing tells."""
    try:
        return str(inspect.signature(called).return_annotation).strip("'\"")
    except (TypeError, ValueError):
        return next((returned for _, returned in _heads(called)), "")

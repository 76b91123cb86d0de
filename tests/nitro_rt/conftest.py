"""Fixtures over hand-made bundles."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import pytest

from hand_made import hand_made_bundle
from nitro_rt import manifest as m


class MakeBundle(Protocol):
    def __call__(self, folder: Path, **options: Any) -> Path: ...


@pytest.fixture(scope="session")
def make_bundle(tmp_path_factory: pytest.TempPathFactory) -> MakeBundle:
    """A function that writes a bundle: (folder, backend=, steps=, batch=, size_px=, more_sizes_px=, shift=, compute_dtype=)."""
    made: dict[str, Path] = {}

    def make(folder: Path, **options: Any) -> Path:
        # Equal bundles are compiled once and copied.
        name = repr(sorted(options.items()))
        if name not in made:
            made[name] = hand_made_bundle(tmp_path_factory.mktemp("made") / "bundle", **options)
        shutil.copytree(made[name], folder)
        return folder

    return make


@pytest.fixture
def bundle_folder(tmp_path: Path, make_bundle: MakeBundle) -> Path:
    """A reference bundle for 1 and 2 steps, batch 2, 32 pixels."""
    return make_bundle(tmp_path / "bundle")


@pytest.fixture
def edit_manifest() -> Callable[[Path, Callable[[dict[str, Any]], None]], None]:
    """A function that changes the JSON of a bundle's manifest in place."""

    def edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
        path = folder / m.BUNDLE_FILE
        data = json.loads(path.read_text(encoding="utf-8"))
        change(data)
        path.write_text(json.dumps(data), encoding="utf-8")

    return edit

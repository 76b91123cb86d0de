"""Fixtures of benchmarks: a bundle that draws in a millisecond, with pictures to judge it by."""

from __future__ import annotations

import dataclasses
import hashlib
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hand_made import hand_made_bundle
from nitro_rt.bundle import open_bundle
from nitro_rt.manifest import BUNDLE_FILE, FileRef, Reference, sealed, to_json
from nitro_rt.pipeline import Pipeline

PROMPT, SEED = "a red apple", 20_000


@pytest.fixture(scope="session")
def little_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1 and 2 steps, batch 2, 32 pixels, its own pictures as references. Do not write into it: the tests share it."""
    return with_references(hand_made_bundle(tmp_path_factory.mktemp("little") / "little"))


@pytest.fixture
def spoilt_bundle(tmp_path: Path) -> Path:
    """The same, but its reference of 1 step is another picture."""
    return with_references(hand_made_bundle(tmp_path / "spoilt", steps=(1,)), spoil=True)


def with_references(folder: Path, *, spoil: bool = False) -> Path:
    references = []
    with Pipeline.load(folder) as pipe:
        for steps in pipe.bundle.built_steps:
            picture_HW3 = np.asarray(pipe(PROMPT, seed=[SEED], steps=steps).images[0])
            references.append(Reference(prompt=PROMPT, seed=SEED, steps=steps, file=_store(folder, 255 * spoil ^ picture_HW3)))
    manifest = dataclasses.replace(open_bundle(folder).manifest, references=tuple(references))
    (folder / BUNDLE_FILE).write_text(to_json(sealed(manifest)), encoding="utf-8")
    return folder


def _store(folder: Path, picture_HW3: np.ndarray) -> FileRef:
    content = io.BytesIO()
    Image.fromarray(picture_HW3.astype(np.uint8)).save(content, format="PNG")
    digest = hashlib.sha256(content.getvalue()).hexdigest()
    path = folder / "files" / f"{digest}.png"
    path.write_bytes(content.getvalue())
    return FileRef(path=f"files/{digest}.png", sha256=digest, num_bytes=path.stat().st_size)

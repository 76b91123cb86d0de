"""Tiny checkpoints and their graphs, made once per run; `draw` drives the three graphs by hand."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from checkpoints import make_tiny_sdxl
from nitro_export import export_checkpoint
from nitro_export.tokenizer import encode
from nitro_rt.manifest import Graph, GraphsManifest


@pytest.fixture(scope="session")
def tiny_kl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_sdxl(tmp_path_factory.mktemp("checkpoints") / "tiny-kl")


@pytest.fixture(scope="session")
def tiny_tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_sdxl(tmp_path_factory.mktemp("checkpoints") / "tiny-tiny", seed=1, vae="tiny")


@pytest.fixture
def copied(tiny_kl: Path, tmp_path: Path) -> Path:
    """A checkpoint of one's own, to damage."""
    return Path(shutil.copytree(tiny_kl, tmp_path / "checkpoint"))


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, GraphsManifest]]:
    """`export_checkpoint` into a fresh folder; equal arguments share one export. What it reported is in report.txt beside."""
    done: dict[Any, tuple[Path, GraphsManifest]] = {}

    def export(checkpoint: Path, **options: Any) -> tuple[Path, GraphsManifest]:
        key = (checkpoint, *sorted(options.items()))
        if key not in done:
            out = tmp_path_factory.mktemp("graphs") / "out"
            lines: list[str] = []
            done[key] = out, export_checkpoint(checkpoint, out, report=lines.append, **options)
            out.with_name("report.txt").write_text("\n".join(lines))
        return done[key]

    return export


@pytest.fixture(scope="session")
def draw() -> Callable[..., NDArray[np.uint8]]:
    return _draw


def _draw(folder: Path, manifest: GraphsManifest, prompts: list[str], *, seed: int, steps: int) -> NDArray[np.uint8]:
    """uint8 [B, H, W, 3] through ONNX Runtime; the noise comes from torch, as diffusers draws it."""
    ids = []
    for spec in manifest.tokenizers:
        tokenizer = Tokenizer.from_file(str(folder / spec.file.path))
        ids.append(np.array([encode(tokenizer, prompt, spec) for prompt in prompts], dtype=np.int64))
    embeds, pooled = _run(folder, manifest.text, *ids)
    generator = torch.Generator().manual_seed(seed)
    shape = manifest.decode.inputs[0].shape
    latents = torch.randn(shape, generator=generator).numpy()
    for index in range(steps):
        last = index == steps - 1
        # The last step must not use its noise: what it is given would show.
        noise = np.full(shape, 1e3, dtype=np.float32) if last else torch.randn(shape, generator=generator).numpy()
        (latents,) = _run(folder, manifest.denoise[steps], latents, embeds, pooled, np.array([index]), noise)
    (images,) = _run(folder, manifest.decode, latents)
    return images


_SESSIONS: dict[Path, ort.InferenceSession] = {}


def _run(folder: Path, graph: Graph, *arrays: NDArray) -> list[NDArray]:
    path = folder / graph.files[0].path
    if path not in _SESSIONS:
        _SESSIONS[path] = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return _SESSIONS[path].run(None, {spec.name: array for spec, array in zip(graph.inputs, arrays, strict=True)})

"""The float32 parent's pictures: drawn once, kept one by one, refused where they would judge nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import nitro_export
import nitro_export.parent
import nitro_rt.noise
from nitro_engines.bundle import read_graphs
from nitro_engines.cache import EngineCache
from nitro_engines.references import FIRST_SEED, PROMPTS, references_of
from nitro_rt.errors import BundleError
from nitro_rt.manifest import GraphsManifest, check_file
from nitro_rt.schedule import StepSchedule

Change = Callable[[np.ndarray], None]


class Painter:
    """Stands in for `nitro_export.parent.Parent`: it counts what it draws, and is stopped on request."""

    def __init__(self) -> None:
        self.drawn: list[tuple[str, int, int]] = []
        self.stop_after: int | None = None
        self.latents, self.change = torch.zeros(1, 4, 4, 4), lambda picture: None

    def __call__(self, checkpoint: Any, *, size_px: int, batch: int = 1) -> Painter:
        self.size_px = size_px
        return self

    def draw(self, prompts: Sequence[str], seeds: Sequence[int], schedule: StepSchedule) -> Any:
        if len(self.drawn) == self.stop_after:
            raise KeyboardInterrupt
        (prompt,), (seed,) = prompts, seeds
        self.drawn.append((prompt, seed, len(schedule.timesteps)))
        picture = np.random.default_rng([seed, len(schedule.timesteps)]).integers(0, 256, (1, self.size_px, self.size_px, 3))
        self.change(picture)
        return SimpleNamespace(x0_BChw=self.latents, images_BHWC=torch.from_numpy(picture.astype(np.uint8)))


@pytest.fixture
def painter(monkeypatch: pytest.MonkeyPatch) -> Painter:
    painter = Painter()
    monkeypatch.setattr(nitro_export.parent, "Parent", painter)
    monkeypatch.setattr(nitro_export, "read_checkpoint", lambda folder: folder)
    return painter


@pytest.fixture
def graphs(make_graphs: Callable[..., Path]) -> GraphsManifest:
    return read_graphs(make_graphs(steps=(1, 4)))


def checkpoint() -> Path:
    return Path("checkpoint")


def test_every_step_count_has_its_pictures(graphs: GraphsManifest, cache: EngineCache, painter: Painter) -> None:
    found = references_of(checkpoint, graphs, 2, cache)
    expected = [(prompt, FIRST_SEED + index, steps) for steps in (1, 4) for index, prompt in enumerate(PROMPTS[:2])]
    assert [(reference.prompt, reference.seed, reference.steps) for reference in found] == expected == painter.drawn
    path = check_file(cache.engines, found[0].file)
    with Image.open(path) as image:
        assert np.asarray(image).shape == (32, 32, 3) and path.suffix == ".png"


def test_they_are_drawn_once_whatever_the_precision(
    graphs: GraphsManifest, cache: EngineCache, painter: Painter, make_graphs: Callable[..., Path]
) -> None:
    first = references_of(checkpoint, graphs, 2, cache)
    other = read_graphs(make_graphs("other", steps=(1, 4), precision="fp16", batch=3))
    second = references_of(lambda: pytest.fail("the checkpoint is not needed"), other, 2, cache)
    assert second == first and len(painter.drawn) == 4
    references_of(checkpoint, graphs, 3, cache)
    assert len(painter.drawn) == 6  # more prompts take those that are there


@pytest.mark.parametrize("options", [{"seed": 5}, {"shift": 250}, {"size_px": 64}])
def test_another_parent_draws_anew(
    graphs: GraphsManifest, cache: EngineCache, painter: Painter, make_graphs: Callable[..., Path], options: dict[str, Any]
) -> None:
    references_of(checkpoint, graphs, 1, cache)
    references_of(checkpoint, read_graphs(make_graphs("other", steps=(1, 4), **options)), 1, cache)
    assert len(painter.drawn) == 4


def test_other_noise_draws_anew(
    graphs: GraphsManifest, cache: EngineCache, painter: Painter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    references_of(checkpoint, graphs, 1, cache)
    (tmp_path / "noise.py").write_text("")
    monkeypatch.setattr(nitro_rt.noise, "__file__", str(tmp_path / "noise.py"))
    references_of(checkpoint, graphs, 1, cache)
    assert len(painter.drawn) == 4


def test_an_interruption_keeps_what_is_drawn(graphs: GraphsManifest, cache: EngineCache, painter: Painter) -> None:
    painter.stop_after = 3
    with pytest.raises(KeyboardInterrupt):
        references_of(checkpoint, graphs, 2, cache)
    assert not list((cache.root / "work").iterdir())
    painter.stop_after = None
    lines: list[str] = []
    assert len(references_of(checkpoint, graphs, 2, cache, lines.append)) == 4
    assert (
        len(painter.drawn) == 4 and len(lines) == 1 and lines[0].startswith(f"reference: {PROMPTS[1]!r} in 4 steps, drawn in")
    )


@pytest.mark.parametrize("fault", ["picture", "record"])
def test_what_is_damaged_is_drawn_again(graphs: GraphsManifest, cache: EngineCache, painter: Painter, fault: str) -> None:
    first = references_of(checkpoint, graphs, 1, cache)
    lines: list[str] = []
    if fault == "picture":
        cache.path(first[0].file).write_bytes(b"damaged")
    else:
        for record in (cache.root / "references").iterdir():
            record.write_text('{"fields": {}, "file": 3}')
    assert references_of(checkpoint, graphs, 1, cache, lines.append) == first
    assert "is damaged and is drawn again" in lines[0]
    check_file(cache.engines, first[0].file)


def _set(value: int) -> Change:
    def change(picture: np.ndarray) -> None:
        picture[:] = value

    return change


def _saturate(picture: np.ndarray) -> None:
    picture[:] = np.where(picture > 127, 255, 0)


@pytest.mark.parametrize(("change", "message"), [(_set(0), "is uniform"), (_saturate, r"is saturated \(100.0%")])
def test_pictures_that_judge_nothing_are_refused(
    graphs: GraphsManifest, cache: EngineCache, painter: Painter, change: Change, message: str
) -> None:
    painter.change = change
    with pytest.raises(BundleError, match=f"the float32 parent of hand-made, 'a red apple' in 1 step.*{message}"):
        references_of(checkpoint, graphs, 1, cache)
    assert not (cache.root / "references").exists()  # nothing of it is kept


def test_latents_with_nan_are_refused_although_the_picture_hides_them(
    graphs: GraphsManifest, cache: EngineCache, painter: Painter
) -> None:
    painter.latents = torch.full((1, 4, 4, 4), float("nan"))
    with pytest.raises(BundleError, match="its latents hold NaN or infinity"):
        references_of(checkpoint, graphs, 1, cache)


@pytest.mark.slow
def test_a_real_build_is_judged_by_its_real_parent(cache: EngineCache, tmp_path: Path) -> None:
    from checkpoints import make_tiny_sdxl
    from nitro_engines import BuildRequest, build
    from nitro_rt.verify import verify_bundle

    model = make_tiny_sdxl(tmp_path / "tiny")
    request = BuildRequest(model=str(model), steps=(1, 4), precision="fp16", gate_prompts=2, out=tmp_path / "out")
    manifest = build(request, cache=cache).manifest
    assert all(entry.passed and entry.num_images == 2 for entry in manifest.quality_gate)
    assert {check.status for check in verify_bundle(tmp_path / "out")} == {"ok"}

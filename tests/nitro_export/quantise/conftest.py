"""One calibration of the tiny checkpoint, and the float graphs that other tests of the export use, too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nitro_export.checkpoint import read_checkpoint
from nitro_export.parent import Parent
from nitro_export.quantise import QuantisationRecipe, calibrate, quantise_graphs
from nitro_rt.manifest import GraphsManifest

ALL_STEPS = (1, 2, 3, 4)


@pytest.fixture(scope="session")
def parent_of() -> Callable[[Path], Parent]:
    return lambda checkpoint: Parent(read_checkpoint(checkpoint), size_px=64)


@pytest.fixture(scope="session")
def float_graphs(tiny_kl: Path, exported: Callable[..., tuple[Path, GraphsManifest]]) -> Path:
    """float32, shift 250, all step counts: the export's own tests make the very same."""
    return exported(tiny_kl, steps=ALL_STEPS, shift=250, batch=1)[0]


@pytest.fixture(scope="session")
def recipe(tiny_kl: Path, parent_of: Callable[[Path], Parent]) -> QuantisationRecipe:
    """Of all layers but the small ones: which of a tiny network are sensitive is of no interest here."""
    return calibrate(parent_of(tiny_kl), steps=ALL_STEPS, precision="int8", shift=250, num_prompts=2, min_sqnr_db=25)


@pytest.fixture(scope="session")
def int8_graphs(float_graphs: Path, recipe: QuantisationRecipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("quantised") / "int8"
    quantise_graphs(float_graphs, out, recipe)
    return out


@pytest.fixture(scope="session")
def reference(tiny_kl: Path, parent_of: Callable[[Path], Parent]) -> Callable[..., Any]:
    """uint8 images of the parent in float32, as `draw` of the export's tests makes them from graphs."""
    from nitro_rt.schedule import alphas_cumprod_from_config, step_schedule

    parent = parent_of(tiny_kl)
    alphas = alphas_cumprod_from_config(parent.checkpoint.scheduler)

    def images(prompt: str, *, seed: int, steps: int) -> Any:
        drawn = parent.draw([prompt], [seed], step_schedule(steps, 250, alphas)).images_BHWC
        assert drawn is not None
        return drawn.numpy()

    return images

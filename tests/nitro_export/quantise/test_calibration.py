"""`calibrate`: at the noise levels that are served and no others, the same twice, and refused where it makes no sense."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nitro_export.parent import Parent
from nitro_export.quantise import QuantisationRecipe, calibrate
from nitro_export.quantise.calibration import default_num_prompts
from nitro_export.quantise.prompts import built_in_prompts, prompts_sha256
from nitro_rt.errors import BundleError, ConfigError, ExportError


def test_one_step_is_calibrated_at_its_one_level_and_twice_the_same(
    tiny_kl: Path, parent_of: Callable[[Path], Parent], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[int, ...]] = []
    draw = Parent.draw

    def watched(self: Parent, prompts: Any, seeds: Any, schedule: Any, **options: Any) -> Any:
        drawn.append(schedule.shifted_timesteps)
        return draw(self, prompts, seeds, schedule, **options)

    monkeypatch.setattr(Parent, "draw", watched)
    said: list[str] = []
    first, again = (
        calibrate(parent_of(tiny_kl), steps=(1,), precision="int8", shift=500, num_prompts=1, report=said.append).to_json()
        for _ in range(2)
    )
    measured = [line for line in said if line.endswith("of 262 layers measured")]
    assert [int(line.split()[1]) // 100 for line in measured] == [1, 2, 1, 2]  # layers that share a tensor come together
    assert first == again
    assert drawn == [(499,), (499,)]
    recipe = QuantisationRecipe.from_json(first)
    assert recipe.noise_levels == (499,) and recipe.steps == (1,)
    assert recipe.to_json() == first


def test_all_step_counts_share_four_levels(recipe: QuantisationRecipe) -> None:
    assert recipe.noise_levels == (249, 187, 124, 62) and recipe.steps == (1, 2, 3, 4)
    assert recipe.prompts_sha256 == prompts_sha256(built_in_prompts(2, 0))
    assert recipe.num_prompts == 2 and recipe.calibration_size_px == 64 and recipe.toolchain["torch"]


def test_every_layer_is_listed_once_with_its_figure(recipe: QuantisationRecipe) -> None:
    names = [layer.name for layer in (*recipe.layers, *recipe.kept)]
    assert len(set(names)) == len(names) > 250
    assert {name.split(".")[0] for name in names} == {"network", "vae"}
    assert not any("encoder" in name or "time_embedding" in name for name in names)  # neither is in the graphs
    for prefix in ("network", "vae"):
        shares = [layer.share for layer in (*recipe.layers, *recipe.kept) if layer.name.startswith(prefix)]
        assert sum(shares) == pytest.approx(1, abs=1e-3)
    assert min(layer.sqnr_db for layer in recipe.layers) > 25  # measured: 31
    assert {layer.reason for layer in recipe.kept} == {"small"} and all(layer.share < 1e-4 for layer in recipe.kept)
    assert any(layer.smoothing for layer in recipe.layers) and all(
        layer.low == -layer.high for layer in recipe.layers if layer.smoothing
    )


def test_a_recipe_is_read_strictly(recipe: QuantisationRecipe) -> None:
    text = recipe.to_json()
    assert QuantisationRecipe.from_json(text) == recipe == QuantisationRecipe.from_dict(recipe.as_dict())
    with pytest.raises(BundleError, match="unknown field 'seeds'"):
        QuantisationRecipe.from_json(text.replace('"seed":', '"seeds":'))
    with pytest.raises(BundleError, match="weight_bits must be int"):
        QuantisationRecipe.from_json(text.replace('"weight_bits": 8', '"weight_bits": "8"'))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": ()}, "steps must name each step count once"),
        ({"steps": (1, 1)}, "steps must name each step count once"),
        ({"steps": (5,)}, "from 1 to 4"),
        ({"precision": "int4"}, "available: int8, fp8"),
        ({"precision": "fp8", "symmetric": False}, "no zero point"),
        ({"weight_bits": 6}, "8 or 7"),
        ({"num_prompts": 0}, "1 or more"),
        ({"prompts": ("a cat",), "num_prompts": 2}, "1 prompts were given"),
        ({"headroom": 0.5}, "headroom must be"),
    ],
)
def test_requests_that_make_no_sense(
    tiny_kl: Path, parent_of: Callable[[Path], Parent], options: dict[str, Any], message: str
) -> None:
    request = {"steps": (1,), "precision": "int8", "shift": 500} | options
    with pytest.raises(ConfigError, match=message):
        calibrate(parent_of(tiny_kl), **request)


def test_a_parent_that_gives_nan_is_refused(tiny_kl: Path, parent_of: Callable[[Path], Parent]) -> None:
    parent = parent_of(tiny_kl)
    parent.network.unet.conv_in.bias.data[0] = float("nan")
    with pytest.raises(ExportError, match="NaN or infinity by the parent itself"):
        calibrate(parent, steps=(1,), precision="int8", shift=500, num_prompts=1)


def test_prompts_are_seeded_and_varied() -> None:
    assert built_in_prompts(8, 3) == built_in_prompts(8, 3) != built_in_prompts(8, 4)
    found = built_in_prompts(64, 0)
    assert len(set(found)) > 60
    plain = [prompt for prompt in found if "," not in prompt]
    assert len(plain) == 32 and {prompt.split()[0] for prompt in plain} == {"a", "an"}
    apples = [prompt for prompt in found if "apple" in prompt]
    assert any("," in prompt for prompt in apples) and any("," not in prompt for prompt in apples)


def test_small_images_are_calibrated_with_many_prompts() -> None:
    assert [default_num_prompts(size_px) for size_px in (64, 128, 256, 512, 1024)] == [128, 128, 32, 4, 4]

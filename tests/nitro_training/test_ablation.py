"""The ablation: equal terms, resumable, and tables that say what the runs said."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from checkpoints import make_tiny_sdxl
from nitro_rt.errors import ConfigError, TrainingError
from nitro_training import ablation, ablation_report
from nitro_training.ablation_plan import VARIANTS, AblationConfig
from nitro_training.ablation_result import Result
from nitro_training.ablation_scores import distance
from nitro_training.metric import Metric, Pair
from nitro_training.pool import HeadPool, PoolConfig
from nitro_training.recipe import read_student_recipe
from nitro_training.samples import CachedSamples, Sample

RECIPE = """
version = 2
[run]
name = "tiny"
trains = "student"
licence = "CC0-1.0"
[prompts]
files = ["{folder}/prompts.txt"]
[teacher]
checkpoint = "{folder}/checkpoint"
sampler = "ddim-trailing"
num_steps = 1
guidance = 0.0
cache_samples = 4
shard_size = 4
[regression]
num_steps = 1
batch = 2
[pool]
width = 32
num_blocks = 1
crop_latents = 4
heads_per_cell = 2
refresh_rate = 0.5
[student]
stage_steps = [2]
batch = 2
accumulation = 1
warmup_steps = 0
lr = 1e-3
precision = "fp32"
[loop]
log_every = 1
"""
TITLES = {variant.name: variant.title for variant in VARIANTS}


class FakeJudge:
    """Judges 64x64 pictures by their mean colours, of the whole and of the quarters."""

    config = SimpleNamespace(size_px=64)
    pairs = tuple(Pair(colour="red", concept=name, is_heldout=True) for name in ("apple", "star"))
    captions = ("a red apple", "a star")
    manifest = {"sha256": {"encoder.safetensors": "0"}}

    def image_features(self, images_NHW3: NDArray[np.uint8]) -> NDArray[np.float32]:
        return images_NHW3.mean((1, 2)).astype(np.float32)

    def patch_features(self, images_NHW3: NDArray[np.uint8]) -> NDArray[np.float32]:
        return images_NHW3.reshape(-1, 2, 32, 2, 32, 3).mean((2, 4)).reshape(-1, 4, 3).astype(np.float32)

    def ranks(self, image_features_ND: NDArray[np.float32], targets_N: NDArray[np.int64]) -> NDArray[np.int64]:
        return targets_N % 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ablation")
    make_tiny_sdxl(folder / "checkpoint")
    (folder / "prompts.txt").write_text("a red apple\na star\na cat\n", encoding="utf-8")
    (folder / "recipe.toml").write_text(RECIPE.format(folder=folder), encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def judge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Metric, "load", lambda folder: FakeJudge())


def config_of(folder: Path, **changes: int | str) -> AblationConfig:
    return AblationConfig(recipe=folder / "recipe.toml", out=folder / "out", num_images=16, **{"seeds": 1, **changes})  # type: ignore[arg-type]


def silent(line: str) -> None:
    pass


@pytest.fixture(scope="module")
def finished(folder: Path) -> Iterator[tuple[list[Result], dict[str, list[torch.Tensor]]]]:
    """All runs of one seed, killed once in the third and called again; and what every run's first batches were."""
    seen: dict[str, list[torch.Tensor]] = {}
    run, draw, draw_level = ablation.Ablation._run, CachedSamples.draw, HeadPool.draw_noise_level

    def spy_run(self: ablation.Ablation, name: str, recipe: object) -> object:
        if len(seen) == 2 and "killed" not in seen:
            seen["killed"] = []
            raise KeyboardInterrupt
        seen[name] = []
        return run(self, name, recipe)  # type: ignore[arg-type]

    def spy_draw(self: CachedSamples, random: object) -> Sample:
        sample = draw(self, random)  # type: ignore[arg-type]
        if seen:
            seen[list(seen)[-1]] += [sample.noise_B4hw, sample.x0_B4hw]
        return sample

    def spy_level(self: HeadPool, source: torch.Generator) -> int:
        level = draw_level(self, source)
        seen[list(seen)[-1]].append(torch.tensor(level))
        return level

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Metric, "load", lambda folder: FakeJudge())
        patch.setattr(ablation.Ablation, "_run", spy_run)
        patch.setattr(CachedSamples, "draw", spy_draw)
        patch.setattr(HeadPool, "draw_noise_level", spy_level)
        with pytest.raises(KeyboardInterrupt):
            ablation.run(config_of(folder), silent)
        first = {path: path.read_bytes() for path in (folder / "out/results").iterdir()}
        assert sorted(path.stem for path in first) == ["full-0", "init", "one-objective-0", "teacher"]
        results = ablation.run(config_of(folder), silent)
    assert all(path.read_bytes() == data for path, data in first.items()), "finished runs are not made again"
    del seen["killed"]
    yield results, seen


def test_a_killed_ablation_goes_on(finished: tuple[list[Result], dict[str, list[torch.Tensor]]]) -> None:
    results, seen = finished
    assert [result.name for result in results] == ["teacher", "init", *TITLES]
    assert list(seen) == [f"{name}, seed 0" for name in TITLES], "every variant was run once"


def test_variants_see_the_same_batches_at_the_same_noise_levels(
    finished: tuple[list[Result], dict[str, list[torch.Tensor]]],
) -> None:
    (first, *others) = finished[1].values()
    assert len(first) == 2 * 3, "two steps: noise, x0 and t* each"
    for other in others:
        assert all(torch.equal(one, two) for one, two in zip(first, other, strict=True))


def test_every_run_moved_and_is_scored(finished: tuple[list[Result], dict[str, list[torch.Tensor]]]) -> None:
    results = {result.name: result for result in finished[0]}
    distances = [results[name].scores["frechet_to_teacher"] for name in ("init", *TITLES)]
    assert len(set(distances)) == 6 and min(distances) > 0
    assert [results[name].about["num_heads"] for name in TITLES] == [240, 80, 240, 120, 10]
    assert results["teacher"].scores["frechet_to_teacher"] > 0, "drawn from other noise than the images it is compared with"


def test_other_options_are_refused_and_named(
    folder: Path, finished: tuple[list[Result], dict[str, list[torch.Tensor]]]
) -> None:
    with pytest.raises(
        TrainingError, match=r"full-0\.json was made with other options: student\.stage_steps was \[2\], now \[3\]"
    ):
        ablation.run(config_of(folder, steps=3), silent)
    with pytest.raises(TrainingError, match=r"num_images was 16, now 18"):
        ablation.run(dataclasses.replace(config_of(folder), num_images=18), silent)


def test_a_judge_of_another_size_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeJudge, "config", SimpleNamespace(size_px=128))
    with pytest.raises(ConfigError, match="draws 64x64 pixels, the metric judges 128x128"):
        ablation.run(dataclasses.replace(config_of(folder), out=folder / "other"), silent)


def test_a_run_with_its_regression_serves_as_init(folder: Path) -> None:
    job = ablation.Ablation.__new__(ablation.Ablation)
    unet = ablation.load_teacher(read_student_recipe(folder / "recipe.toml").teacher, torch.device("cpu"), torch.float32).unet
    state = {f"module/unet_ema/{key}": value + 1 for key, value in unet.state_dict().items()}
    run = folder / "run"
    run.mkdir()
    save_file(state, run / "regression.safetensors", metadata={"options": '{"shifted_timestep": 500}'})
    job.config, job.base = config_of(folder, init=str(run)), config_of(folder).resolved()
    job.teacher = type("T", (), {"unet": unet})()  # type: ignore[assignment]
    found = job._init().state_dict()
    assert all(torch.equal(found[key], value + 1) for key, value in unet.state_dict().items())
    with pytest.raises(ConfigError, match="trained for shifted_timestep 500, the recipe has 250"):
        ablation.regressed(run / "regression.safetensors", unet, 250)


def test_variants_take_away_what_they_say() -> None:
    sizes = {}
    for variant in VARIANTS:
        config = dataclasses.replace(PoolConfig(width=32, num_blocks=1), **variant.pool)
        pool = HeadPool(config, (4,) * 10, {task: (8,) * 10 for task in config.tasks})
        sizes[variant.name] = len(pool), config.refresh_rate
    assert sizes == {
        "full": (480, 0.01), "one-objective": (160, 0.01), "no-refresh": (480, 0.0), "fixed-heads": (120, 0.0),
        "single": (10, 0.0),
    }  # fmt: skip


def test_seeds_and_pool_are_all_that_differs(folder: Path) -> None:
    base = config_of(folder).resolved()
    for variant in VARIANTS:
        recipe = variant.recipe(base, 2)
        assert (recipe.student.seed, recipe.pool.seed) == (base.student.seed + 2, base.pool.seed + 2)
        assert dataclasses.replace(recipe, pool=base.pool, student=base.student) == base
        assert dataclasses.replace(recipe.student, seed=base.student.seed) == base.student


def test_a_recipe_of_several_stages_needs_steps(folder: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE.format(folder=folder).replace("[2]", "[2, 1]"), encoding="utf-8")
    with pytest.raises(ConfigError, match="give one number there, or --steps"):
        AblationConfig(recipe=recipe, out=tmp_path).resolved()
    assert AblationConfig(recipe=recipe, out=tmp_path, steps=7).resolved().student.stage_steps == (7,)


def test_the_distance_of_a_cloud_to_itself_is_zero() -> None:
    cloud = np.random.default_rng(0).normal(size=(40, 2, 3)).astype(np.float32)
    assert distance(cloud, cloud) == pytest.approx(0, abs=1e-9)
    assert distance(cloud, cloud + 1) == pytest.approx(3, rel=1e-4), "1 in each of 3 components"


def made_results(full: Sequence[float], single: Sequence[float]) -> list[Result]:
    def result(name: str, seed: int | None, value: float) -> Result:
        scores = {
            "frechet_to_teacher": value, "patch_frechet_to_teacher": 2 * value, "retrieval_top1": 0.5, "retrieval_top5": 0.6,
            "colour": 0.75,
        }  # fmt: skip
        about = {
            "num_heads": 480, "num_steps": 9, "step_s": 1.5, "date": "2025-01-31", "python": "3", "num_threads": 2,
            "versions": {"torch": "2"},
        }  # fmt: skip
        samples = {"cache_samples": 64, "num_steps": 8}
        key = {"student": {"batch": 4, "accumulation": 2}, "samples": samples, "num_images": 32}
        return Result(name=name, seed=seed, scores=scores, about=about, key=key)

    rows = [result("full", seed, value) for seed, value in enumerate(full)]
    rows += [result("single", seed, value) for seed, value in enumerate(single)]
    return [result("teacher", None, 0.1), result("init", None, 9.0), *rows]


def test_tables_show_mean_spread_and_paired_change() -> None:
    page = ablation_report.markdown(made_results((1.0, 2.0, 3.0), (2.0, 2.0, 5.0)), {"full": "full", "single": "one head"})
    assert "| full | 480 | 1.50 | 2.000 ± 1.000 (1.000 to 3.000) | 4.000 ± 2.000 (2.000 to 6.000) | 50.0 ± 0.0" in page
    assert "| one head | +1.000 (+0.000 to +2.000) | +2.000 (+0.000 to +4.000) | +0.0 (+0.0 to +0.0)" in page
    assert "| before: the one-step weights | 480 | 1.50 | 9.000 |" in page
    assert "9 optimiser steps of 8 samples" in page and "Mean of 3 seeds" in page


def test_the_page_keeps_its_own_words(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    with pytest.raises(ConfigError, match="has no lines <!-- ablation: begin -->"):
        ablation_report.require_marks(page)
    page.write_text("above\n<!-- ablation: begin -->\nold\n<!-- ablation: end -->\nbelow\n", encoding="utf-8")
    ablation_report.put_into(page, "new")
    ablation_report.put_into(page, "newer")
    assert page.read_text() == "above\n<!-- ablation: begin -->\nnewer\n<!-- ablation: end -->\nbelow\n"


def test_damaged_results_say_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "full-0.json"
    path.write_text("{", encoding="utf-8")
    with pytest.raises(TrainingError, match="is damaged .* remove it, and the run is made anew"):
        Result.read(path)


def test_the_recipe_of_the_repository_is_one() -> None:
    config = AblationConfig(recipe=Path(__file__).parents[2] / "training/recipes/ablation.toml", out=Path("unused"))
    recipe = config.resolved()
    assert recipe.student.regression_weight == 0, "purely adversarial"
    assert recipe.pool.heads_per_cell == 4 and len(recipe.pool.tasks) == 3

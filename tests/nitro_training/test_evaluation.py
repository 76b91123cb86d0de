"""Scores of constructed images, and a whole evaluation of a tiny checkpoint."""

from __future__ import annotations

import dataclasses
import inspect
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import pytest
from numpy.typing import NDArray

from checkpoints import make_tiny_sdxl
from nitro_rt.cli import main
from nitro_rt.cli.evaluate import command
from nitro_rt.errors import ConfigError, ModelNotFound, ShapeError
from nitro_training import evaluation
from nitro_training.contrastive import ContrastiveConfig, train_metric
from nitro_training.emoji import EmojiConfig, EmojiDataset, build_dataset
from nitro_training.evaluation import Prompt, Scores, choose_prompts, draw, evaluate, real_images, rows_of, score
from nitro_training.frechet import Moments
from nitro_training.metric import Metric, MetricConfig, Pair
from nitro_training.sheet import Checkpoint

ICONS = Path(__file__).parents[1] / "data" / "npm"
SHAPE = MetricConfig(channels=(8, 16), blocks=(0, 1), text_width=16, feature_dim=8)
RED, GREEN, WHITE = (220, 20, 20), (20, 160, 40), (255, 255, 255)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    (folder / "concepts.txt").write_text("# food\nred apple = apple\nbanana\n# sky\nstar\n", encoding="utf-8")
    config = EmojiConfig(packs=("noto", "fluent-emoji-flat"), size_px=64, heldout_share=0.3)
    build_dataset(config, folder / "concepts.txt", ICONS, folder / "emoji")
    return folder / "emoji"


@pytest.fixture(scope="module")
def judge_folder(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("metric") / "tiny"
    train_metric(ContrastiveConfig(num_steps=2, batch=4), data, out, shape=SHAPE)
    return out


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_sdxl(tmp_path_factory.mktemp("student"), size_px=64)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_sdxl(tmp_path_factory.mktemp("teacher"), seed=5, size_px=64)


class ConstructedJudge:
    """Three pairs whose text features are the axes; an image's feature is its mean colour."""

    pairs = (
        Pair(colour="red", concept="ball", is_heldout=True),
        Pair(colour="green", concept="ball", is_heldout=True),
        Pair(colour="blue", concept="ball", is_heldout=False),
    )
    reference = patch_reference = Moments(np.zeros(3), np.eye(3))
    captions = ("a red ball",) * 9
    ranks = Metric.ranks
    candidates = np.eye(3, dtype=np.float32)

    def image_features(self, images_NHW3: NDArray[np.uint8]) -> NDArray[np.float32]:
        means: NDArray[np.float32] = images_NHW3.reshape(len(images_NHW3), -1, 3).mean(1, dtype=np.float32)
        return means

    def patch_features(self, images_NHW3: NDArray[np.uint8]) -> NDArray[np.float32]:
        return np.repeat(self.image_features(images_NHW3)[:, None], 4, axis=1)


JUDGE = cast(Metric, ConstructedJudge())


def balls(*fills: tuple[int, int, int]) -> NDArray[np.uint8]:
    images = np.full((len(fills), 16, 16, 3), 255, np.uint8)
    for image, fill in zip(images, fills, strict=True):
        image[4:12, 4:12] = fill
    return images


def asked(*pairs: int, num_captions: int = 2) -> list[Prompt]:
    captions = [Prompt(text="a red ball", caption=index) for index in range(num_captions)]
    return [Prompt(text=JUDGE.pairs[pair].prompt, pair=pair) for pair in pairs] + captions


def test_retrieval_and_colour_of_constructed_images() -> None:
    """A red ball for "red" is right; a red one for "green" is tied for the last place and has the wrong colour."""
    found = score(balls(RED, RED, GREEN, RED, GREEN), asked(0, 1, 1), JUDGE)
    assert found.pairs_N.tolist() == [0, 1, 1] and found.ranks_N.tolist() == [0, 2, 0]
    assert found.is_right_colour_N.tolist() == [True, False, True]
    assert found.features_MD.shape == (2, 3) and found.patches_MPD.shape == (2, 4, 3)


def test_the_background_has_no_colour() -> None:
    assert evaluation.dominant_colour(balls(RED)[0]) == "red"
    assert evaluation.dominant_colour(balls(WHITE)[0]) == "none"


def test_every_prompt_needs_one_image() -> None:
    with pytest.raises(ShapeError, match="2 images for 3 prompts"):
        score(balls(RED, RED), asked(0, 1, num_captions=1), JUDGE)


def columns_of(*scores: tuple[str, str, int, Scores]) -> Sequence[tuple[str, str, int | None, Scores]]:
    return scores


def test_the_table_of_a_student_and_its_teacher() -> None:
    """The teacher finds 3 of 4, one step 2 of these 3, two steps the same as the teacher."""
    prompts = asked(0, 0, 1, 1, num_captions=4)
    cloud = (RED, GREEN, RED, WHITE)
    teacher = score(balls(RED, RED, GREEN, RED, *cloud), prompts, JUDGE)
    one = score(balls(RED, RED, RED, RED, *cloud[::-1]), prompts, JUDGE)
    columns = columns_of(("teacher", "teacher", 25, teacher), ("1 step", "student", 1, one), ("2 steps", "student", 2, teacher))
    rows = rows_of(columns, JUDGE, num_resamples=200, seed=0)
    assert [row.scores["retrieval_top1"].value for row in rows] == [0.75, 0.5, 0.75]
    ratio = rows[1].ratios_to_teacher["retrieval_top1"]
    assert ratio is not None and ratio.value == pytest.approx(2 / 3) and ratio.low <= ratio.value <= ratio.high
    assert rows[2].ratios_to_teacher["colour"] == evaluation.Interval(1.0, 1.0, 1.0), "the same images, resampled alike"
    assert rows[1].scores["frechet_to_teacher"].value == pytest.approx(0.0, abs=1e-6), "the same cloud in another order"
    assert rows[2].changes["retrieval_top1"].value == 0.25 and not rows[1].changes and not rows[0].ratios_to_teacher
    assert "frechet_to_teacher" not in rows[0].scores


def test_every_held_out_pair_is_asked_for_equally_often() -> None:
    prompts = choose_prompts(JUDGE, 23, seed=3)
    pairs = [prompt.pair for prompt in prompts if prompt.pair is not None]
    assert sorted(pairs) == [0] * 6 + [1] * 5 or sorted(pairs) == [0] * 5 + [1] * 6
    captions = [prompt.caption for prompt in prompts if prompt.caption is not None]
    assert len(captions) == 12 and set(captions) == set(range(9)), "all captions before any comes twice"
    assert prompts == choose_prompts(JUDGE, 23, seed=3) != choose_prompts(JUDGE, 23, seed=4)
    assert prompts[0].text in ("a red ball", "a green ball")


def test_a_judge_without_held_out_pairs_is_refused() -> None:
    judge = ConstructedJudge()
    judge.pairs = tuple(dataclasses.replace(pair, is_heldout=False) for pair in judge.pairs)  # type: ignore[assignment]
    with pytest.raises(ConfigError, match="knows no held-out pair"):
        choose_prompts(cast(Metric, judge), 16, seed=0)


def test_the_noise_of_a_prompt_is_the_same_in_every_column(student: Path) -> None:
    """Whatever is drawn after it: with fewer prompts the first batch is the same, with another seed it is not."""
    model = Checkpoint.load(student)
    prompts = [Prompt(text=f"a {word} apple", pair=0) for word in ("red", "green") * 17]
    seen: list[int] = []
    images = draw(model, prompts, 1, 0, lambda done, total: seen.append(done))
    assert images.shape == (34, 64, 64, 3) and images.dtype == np.uint8 and seen == [32, 34]
    np.testing.assert_array_equal(draw(model, prompts[:32], 1, 0, lambda done, total: None), images[:32])
    assert not np.array_equal(draw(model, prompts[:2], 1, 1, lambda done, total: None), images[:2])


def test_a_whole_evaluation(
    student: Path, teacher: Path, judge_folder: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "TEACHER_STEPS", 3)
    seen: list[str] = []
    result = evaluate(
        student, teacher=teacher, metric=judge_folder, steps=(2, 1), num_images=16, data=data, num_resamples=100,
        report=lambda column, done, total, losses: seen.append(column),
    )  # fmt: skip
    assert [row.kind for row in result.rows] == ["real", "real", "teacher", "student", "student"]
    assert [row.num_steps for row in result.rows] == [None, None, 3, 1, 2] and "teacher" in seen and "2 steps" in seen
    assert result.num_pair_images == result.num_caption_images == 8
    for row in result.rows:
        for found in row.scores.values():
            assert np.isfinite([found.value, found.low, found.high]).all() and found.low <= found.high
    assert set(result.rows[4].changes) == set(result.rows[4].scores)
    assert json.loads(json.dumps(result.as_dict(), allow_nan=False))["rows"][3]["name"] == "1 step"
    again = evaluate(student, teacher=teacher, metric=judge_folder, steps=(1, 2), num_images=16, data=data, num_resamples=100)
    assert again == result


def test_real_images_are_those_that_were_asked_for(judge_folder: Path, data: Path) -> None:
    dataset, judge = EmojiDataset.load(data), Metric.load(judge_folder)
    prompts = choose_prompts(judge, 16, seed=0)
    images = real_images(dataset, judge, prompts)
    for image, prompt in zip(images, prompts, strict=True):
        if prompt.pair is None:
            assert prompt.caption is not None
            np.testing.assert_array_equal(image, dataset.images_NHW3[prompt.caption])
            assert prompt.text in dataset.records[prompt.caption].captions
        else:
            assert evaluation.dominant_colour(image) == judge.pairs[prompt.pair].colour
    other = dataclasses.replace(
        dataset, manifest=dataset.manifest | {"sha256": {"images.safetensors": "", "records.jsonl": ""}}
    )
    with pytest.raises(ConfigError, match="not the data set that this metric was trained on"):
        real_images(other, judge, prompts)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": (0,)}, "steps must be from 1 to 4, got 0"),
        ({"steps": (1, 5)}, "steps must be from 1 to 4, got 1, 5"),
        ({"steps": ()}, "got none"),
        ({"num_images": 4}, "num_images must be at least 16, got 4"),
        ({"num_resamples": 9}, "num_resamples must be at least 100, got 9"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_read(tmp_path: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        evaluate(tmp_path, metric=tmp_path, **options)  # type: ignore[arg-type]


def test_checkpoints_that_cannot_be_judged(student: Path, judge_folder: Path, tmp_path: Path) -> None:
    def refused(kind: type[Exception], message: str, folder: Path) -> None:
        with pytest.raises(kind, match=message):
            evaluate(folder, metric=judge_folder, num_images=16)

    refused(ModelNotFound, r"no checkpoint at .*model_index.json is missing", tmp_path)
    with pytest.raises(ModelNotFound, match=r"no checkpoint at .*nowhere"):  # and before the minutes of drawing
        evaluate(student, teacher=tmp_path / "nowhere", metric=judge_folder, report=lambda *progress: pytest.fail("drawn"))
    refused(
        ConfigError, r"draws 96x96 pixels, the metric judges 64x64.*--metric", make_tiny_sdxl(tmp_path / "large", size_px=96)
    )
    broken = shutil.copytree(student, tmp_path / "broken")
    (broken / "run.json").write_text('{"shifted_timestep": "no"}')
    refused(ConfigError, r"run.json is 'no'; it must be a whole number", broken)
    (broken / "run.json").unlink()
    refused(ConfigError, r"run.json does not say the shifted_timestep", broken)
    shutil.copy(student / "run.json", broken)
    (broken / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    refused(ConfigError, r"the checkpoint .*broken cannot be read", broken)


# --- the command --------------------------------------------------------------------------------------------------------


def test_the_command_prints_tables(
    student: Path, judge_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "scores.json"
    assert (
        main(["evaluate", str(student), "--metric", str(judge_folder), "--steps", "1,2", "--num-images", "16", "-o", str(out)])
        == 0
    )
    printed = capsys.readouterr().out
    assert "8 images of held-out pairs" in printed and "top-1" in printed and "against 1 step" in printed
    assert any(line.startswith("2 steps") for line in printed.splitlines())
    assert [row["num_steps"] for row in json.loads(out.read_text())["rows"]] == [1, 2]
    assert [path.name for path in tmp_path.iterdir()] == ["scores.json"]


def test_the_command_prints_json(student: Path, judge_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command_line = ["evaluate", str(student), "--metric", str(judge_folder), "--steps", "1", "--num-images", "16", "--json"]
    assert main(command_line) == 0
    assert json.loads(capsys.readouterr().out)["num_candidates"] == len(Metric.load(judge_folder).pairs)


def test_the_command_says_in_one_line_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(tmp_path), "--metric", str(tmp_path / "no")]) == 1
    assert capsys.readouterr().err.startswith("nitro-rt: no metric encoder at")
    assert main(["evaluate", str(tmp_path), "-o", str(tmp_path)]) == 1
    assert "cannot be written" in capsys.readouterr().err
    assert main(["evaluate", str(tmp_path), "--steps", "one"]) == 2


def test_the_commands_defaults_are_the_functions() -> None:
    defaults = {name: p.default for name, p in inspect.signature(evaluate).parameters.items()}
    shown = {
        option.name: option.show_default for option in command.params if isinstance(getattr(option, "show_default", None), str)
    }
    assert shown == {
        "steps": ",".join(map(str, defaults["steps"])),
        "num_images": str(defaults["num_images"]),
        "seed": str(defaults["seed"]),
    }


@pytest.mark.slow
def test_a_bundle_draws_what_its_checkpoint_draws(student: Path, judge_folder: Path, tmp_path: Path) -> None:
    from nitro_engines import BuildRequest, EngineCache, build
    from nitro_rt.bundle import open_bundle
    from nitro_rt.quality import compare

    # Training has one tokenizer for both encoders; the tiny checkpoint has two that pad differently, as SDXL's.
    model = shutil.copytree(student, tmp_path / "model")
    shutil.rmtree(model / "tokenizer_2")
    shutil.copytree(model / "tokenizer", model / "tokenizer_2")
    request = BuildRequest(model=str(model), steps=(1, 4), batch=5, gate_prompts=1, out=tmp_path / "bundle")
    folder = build(request, cache=EngineCache(tmp_path / "cache")).out
    prompts = choose_prompts(Metric.load(judge_folder), 36, seed=0)  # more than one batch of noise, none of them whole
    for num_steps in (1, 4):
        wanted = draw(Checkpoint.load(model), prompts, num_steps, 3, lambda done, total: None)
        found = evaluation.draw_with_bundle(open_bundle(folder), prompts, num_steps, 3, lambda done, total: None)
        assert compare(found, wanted).worst_psnr_db > 60
    whole = {"metric": judge_folder, "num_images": 16, "num_resamples": 100}
    ours, theirs = (evaluate(source, steps=(1, 4), **whole) for source in (folder, model))
    assert ours.bundle_sha256 == open_bundle(folder).digest and ours.unet_sha256 is None and theirs.bundle_sha256 is None
    for left, right in zip(ours.rows, theirs.rows, strict=True):
        assert left.scores["colour"].value == pytest.approx(right.scores["colour"].value, abs=0.13)  # one image of eight
    with pytest.raises(ConfigError, match="was not built for 2 steps; say --steps 1,4"):
        evaluate(folder, **whole)
    with pytest.raises(ConfigError, match="--data adds real images through the VAE's encoder"):
        evaluate(folder, steps=(1,), data=tmp_path, **whole)

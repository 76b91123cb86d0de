"""The judge: its folder, its views, and that training teaches it something."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from nitro_rt.errors import ConfigError, ModelNotFound, ShapeError
from nitro_training import frechet, metric
from nitro_training.contrastive import (
    ContrastiveConfig,
    degrade,
    info_nce,
    judged_captions,
    moved,
    retrieval_loss,
    train_metric,
)
from nitro_training.emoji import EmojiConfig, EmojiDataset, Record, build_dataset, file_sha256
from nitro_training.metric import DEFAULT_FOLDER, Metric, MetricConfig, Pair, blurred, details, word_ids

ICONS = Path(__file__).parents[1] / "data" / "npm"
SHAPE = MetricConfig(channels=(8, 16), blocks=(0, 1), text_width=16, feature_dim=8)
TRAINING = ContrastiveConfig(num_steps=40, batch=16, warmup_steps=3, peak_lr=6e-3)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    (folder / "concepts.txt").write_text("# food\nred apple = apple\nbanana\n# sky\nstar\n", encoding="utf-8")
    config = EmojiConfig(packs=("noto", "fluent-emoji-flat"), size_px=64, heldout_share=0.3)
    build_dataset(config, folder / "concepts.txt", ICONS, folder / "emoji")
    return folder / "emoji"


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("metric") / "tiny"
    train_metric(TRAINING, data, out, shape=SHAPE, report=lambda line: None)
    return out


def test_training_teaches_it_to_find_the_pair(trained: Path) -> None:
    manifest = json.loads((trained / "metric.json").read_text())
    found = manifest["accuracy_on_real_images"]["all"]
    chance = 1 / len(Metric.load(trained).pairs)
    assert found["top1"] > 4 * chance and found["top5"] >= found["top1"]


def test_the_folder_gives_back_what_was_trained(trained: Path, data: Path) -> None:
    """Statistics and accuracy are those of the stored half-precision weights."""
    judge, dataset = Metric.load(trained), EmojiDataset.load(data)
    features = judge.image_features(dataset.images_NHW3)
    assert features.shape == (len(dataset.records), 8 + 3) and len(judge.captions) == len(dataset.records)
    reference, patch_reference = judge.reference, judge.patch_reference
    assert frechet.distance(reference, frechet.moments(features[:, None])) < 1e-4 * np.trace(reference.covariance_DD)
    patches = judge.patch_features(dataset.images_NHW3)
    assert patches.shape == (len(dataset.records), 4, 8 + 3)
    assert frechet.distance(patch_reference, frechet.moments(patches)) < 1e-4 * np.trace(patch_reference.covariance_DD)
    target = [(pair.colour, pair.concept) for pair in judge.pairs]
    coloured = [i for i, record in enumerate(dataset.records) if record.colour]
    targets = np.array([target.index((dataset.records[i].colour, dataset.records[i].concept)) for i in coloured])
    top1 = (judge.ranks(features[coloured], targets) < 1).mean()
    assert top1 == pytest.approx(judge.manifest["accuracy_on_real_images"]["all"]["top1"])


def test_equal_seeds_train_equal_weights(data: Path, tmp_path: Path) -> None:
    config = ContrastiveConfig(num_steps=3, batch=8)
    for name in ("one", "two"):
        train_metric(config, data, tmp_path / name, shape=SHAPE, report=lambda line: None)
    one, two = (file_sha256(tmp_path / name / "encoder.safetensors") for name in ("one", "two"))
    assert one == two


def test_loading_leaves_the_global_generator_alone(trained: Path) -> None:
    """So that a run that evaluates now and then stays what it was."""
    before = torch.get_rng_state()
    judge = Metric.load(trained)
    assert torch.equal(torch.get_rng_state(), before)
    assert not judge.encoder.training and not any(parameter.requires_grad for parameter in judge.encoder.parameters())


def test_held_out_pairs_are_marked(trained: Path, data: Path) -> None:
    heldout = {(r.colour, r.concept) for r in EmojiDataset.load(data).records if r.split == "heldout"}
    assert heldout and {(p.colour, p.concept) for p in Metric.load(trained).pairs if p.is_heldout} == heldout


@pytest.mark.parametrize(
    ("colour", "concept", "prompt"),
    [("red", "apple", "a red apple"), ("orange", "cat face", "an orange cat face"), ("blue", "scissors", "blue scissors")],
)
def test_the_prompt_of_a_pair(colour: str, concept: str, prompt: str) -> None:
    assert Pair(colour=colour, concept=concept, is_heldout=True).prompt == prompt


def test_ranks_count_the_better_pairs(trained: Path) -> None:
    judge = Metric.load(trained)
    every = np.arange(len(judge.pairs))
    assert (judge.ranks(judge.candidates, every) == 0).all(), "a prompt's own feature finds the prompt"
    assert (judge.ranks(7.5 * judge.candidates, every) == 0).all(), "whatever its length"
    tied = np.zeros_like(judge.candidates)
    assert (judge.ranks(tied, every) == len(every) - 1).all(), "who says nothing has found nothing"
    assert (judge.ranks(-judge.candidates, every) == len(every) - 1).all(), "and its opposite finds it last"


def test_views_show_what_they_say() -> None:
    image = torch.zeros(1, 3, 8, 8)
    image[..., :4, 4:] = 1.0
    assert metric.whole(image).shape == (1, 3, 4, 4)
    assert metric.quarters(image).mean((0, 2, 3, 4)).tolist() == [0.0, 1.0, 0.0, 0.0]


def test_details_fall_with_blur_and_rise_with_noise() -> None:
    """The finest most, and a flat picture has none."""
    checks = (torch.arange(32) // 8 % 2 * 2.0 - 1).expand(1, 3, 32, 32)
    sharp, soft = details(checks), details(blurred(checks))
    noisy = details(checks + 0.2 * torch.randn(checks.shape, generator=torch.Generator().manual_seed(0)))
    assert (soft < sharp)[0, 0] and (sharp - soft)[0].diff().max() < 0 and noisy[0, 0] > sharp[0, 0] + 0.2
    torch.testing.assert_close(details(torch.ones(1, 3, 16, 16)), torch.full((1, 3), metric.SMALLEST_DETAIL).log())


def test_words_have_ids_and_padding() -> None:
    ids = word_ids(["A red apple, flat style", "apple"], ["a", "apple", "flat", "red", "style"], 8)
    assert ids.tolist() == [[1, 4, 2, 3, 5, 0, 0, 0], [2, 0, 0, 0, 0, 0, 0, 0]]


def test_padding_does_not_change_a_text(trained: Path) -> None:
    judge = Metric.load(trained)
    alone, beside = judge.text_features(["a red apple"]), judge.text_features(["a red apple", "a yellow banana, noto style"])
    np.testing.assert_allclose(alone[0], beside[0], atol=1e-6)
    assert not np.allclose(alone, judge.text_features(["a blue apple"]), atol=1e-3)


@pytest.mark.parametrize("caption", ["a red castle", "red " * 20])
def test_a_caption_of_another_domain_is_refused(trained: Path, caption: str) -> None:
    with pytest.raises(ConfigError, match=r"does not know (the words castle|captions of 20 words)"):
        Metric.load(trained).text_features([caption])


@pytest.mark.parametrize("images", [np.zeros((2, 32, 32, 3), np.uint8), np.zeros((2, 64, 64, 3), np.float32)])
def test_other_images_are_refused(trained: Path, images: np.ndarray) -> None:
    with pytest.raises(ShapeError, match=r"judges uint8 images \[N, 64, 64, 3\], got"):
        Metric.load(trained).image_features(images)


def test_a_missing_judge_says_where_one_is(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"no metric encoder at .*training/weights/nitro-emoji-metric.*--metric"):
        Metric.load(tmp_path)


@pytest.mark.parametrize("name", metric.FILES)
def test_a_changed_file_is_refused(trained: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(trained, tmp_path / "metric")
    with (tmp_path / "metric" / name).open("ab") as file:
        file.write(b"\n")
    with pytest.raises(ConfigError, match=rf"{name} differs from its digest"):
        Metric.load(tmp_path / "metric")


@pytest.mark.parametrize("text", ["{", "[]", '{"schema_version": 1}'])
def test_a_damaged_manifest_is_refused(trained: Path, tmp_path: Path, text: str) -> None:
    shutil.copytree(trained, tmp_path / "metric")
    (tmp_path / "metric" / "metric.json").write_text(text)
    with pytest.raises(ConfigError, match=r"is damaged"):
        Metric.load(tmp_path / "metric")


def test_a_judge_of_another_version_is_refused(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "metric")
    path = tmp_path / "metric" / "metric.json"
    path.write_text(path.read_text().replace('"schema_version": 1', '"schema_version": 2'))
    with pytest.raises(ConfigError, match=r"has metric schema 2, this version reads 1"):
        Metric.load(tmp_path / "metric")


def test_training_does_not_replace_a_folder(trained: Path, data: Path) -> None:
    with pytest.raises(ConfigError, match=r"is there already; remove it"):
        train_metric(TRAINING, data, trained, shape=SHAPE)


def test_the_judge_also_learns_captions_without_style() -> None:
    facts = {"concept": "apple", "style": "flat", "colour": "red", "recoloured": False, "split": "train"}
    record = Record(**facts, captions=("a red apple, flat style",))  # type: ignore[arg-type]
    assert judged_captions(record) == ["a red apple, flat style", "a red apple"]


def test_the_contrastive_loss() -> None:
    """Perfect matches have none at a high scale; equal captions are no counter-examples of each other."""
    features = torch.eye(4)
    scale = torch.tensor(4.6)
    nothing = torch.eye(4, dtype=torch.bool)
    assert info_nce(features, features, scale, nothing) < 1e-6
    assert info_nce(features, features.roll(1, 0), scale, nothing) > 50
    twice = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    assert info_nce(twice, twice, scale, torch.ones(2, 2, dtype=torch.bool)) == pytest.approx(0.0, abs=1e-6)
    assert info_nce(twice, twice, scale, torch.eye(2, dtype=torch.bool)) == pytest.approx(np.log(2), abs=1e-6)


def test_the_retrieval_loss_asks_coloured_images_only() -> None:
    features, scale = torch.eye(3), torch.tensor(4.6)
    assert retrieval_loss(features, features, scale, torch.tensor([0, 1, 2])) < 1e-6
    assert retrieval_loss(features, features, scale, torch.tensor([1, -1, -1])) > 50
    assert retrieval_loss(features, features, scale, torch.tensor([-1, -1, -1])) == 0


def test_degraded_views_stay_pictures_and_repeat_with_the_seed() -> None:
    images = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    first, again, other = (degrade(images, TRAINING, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert first.shape == (6, 3, 16, 16) and first.abs().max() <= 1
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_windows_and_blur() -> None:
    images = torch.rand(2, 3, 8, 8)
    assert torch.equal(moved(images, 0, 8, torch.Generator()), images)
    assert moved(images, 2, 8, torch.Generator().manual_seed(3)).shape == images.shape
    flat = torch.full((1, 3, 8, 8), 0.25)
    torch.testing.assert_close(blurred(flat), flat)
    assert blurred(images).std() < images.std()


def test_shapes_that_do_not_fit_are_refused() -> None:
    for options in ({"size_px": 72}, {"blocks": (1,)}):
        with pytest.raises(ConfigError):
            MetricConfig(**options)


@pytest.mark.skipif(not DEFAULT_FOLDER.is_dir(), reason="the repository's judge is not part of the package")
def test_the_shipped_judge_knows_the_domain() -> None:
    judge = Metric.load()
    assert len(judge.pairs) > 1000 and sum(pair.is_heldout for pair in judge.pairs) > 100
    assert judge.manifest["training"]["with_heldout"] is True
    assert judge.manifest["accuracy_on_real_images"]["heldout"]["top1"] > 0.8
    near = judge.text_features(["a blue car", "a blue automobile", "a blue banana", "a red car"])
    cosine = near @ near.T
    assert cosine[0, 1] > cosine[0, 2] and cosine[0, 1] > cosine[0, 3], "synonyms are nearest"

"""The data set, from a committed sample of two icon packs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from nitro_rt.errors import ConfigError
from nitro_training import colours
from nitro_training.captions import article, captions
from nitro_training.emoji import EmojiConfig, EmojiDataset, IconPack, build_dataset, is_heldout, read_concepts, slug

ICONS = Path(__file__).parents[1] / "data" / "npm"
CONFIG = EmojiConfig(packs=("noto", "fluent-emoji-flat"), size_px=64)


@pytest.fixture(scope="module")
def concepts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("concepts") / "concepts.txt"
    path.write_text("# smileys\ngrinning face\n# food\nred apple = apple\nbanana\n# sky\nstar\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def dataset(concepts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dataset")
    build_dataset(CONFIG, concepts, ICONS, out)
    return out


def test_pictures_show_what_their_captions_say(dataset: Path) -> None:
    loaded = EmojiDataset.load(dataset)
    assert loaded.images_NHW3.shape[1:] == (64, 64, 3)
    assert {record.concept for record in loaded.records} == {"grinning face", "apple", "banana", "star"}
    for image, record in zip(loaded.images_NHW3, loaded.records, strict=True):
        assert tuple(image[0, 0]) == (255, 255, 255), "the background is white"
        if record.recoloured:
            rgb = image.astype(np.float32) / 255
            name, share = colours.dominant(rgb, (image < 250).any(-1))
            assert name == record.colour and share > 0.4
            assert all(record.colour in caption for caption in record.captions)


def test_faces_keep_their_colour(dataset: Path) -> None:
    faces = [record for record in EmojiDataset.load(dataset).records if record.concept == "grinning face"]
    assert len(faces) == 2 and not any(record.recoloured for record in faces)


def test_pairs_are_held_out_whole(concepts: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, heldout_share=0.4)
    build_dataset(config, concepts, ICONS, tmp_path)
    records = EmojiDataset.load(tmp_path).records
    heldout = {(r.colour, r.concept) for r in records if r.split == "heldout"}
    trained = {(r.colour, r.concept) for r in records if r.split == "train"}
    assert heldout and trained and not heldout & trained
    assert is_heldout("blue", "star", config) == is_heldout("blue", "star", config)


def test_the_same_options_give_the_same_bytes(concepts: Path, dataset: Path, tmp_path: Path) -> None:
    again = build_dataset(CONFIG, concepts, ICONS, tmp_path)
    assert again["sha256"] == json.loads((dataset / "data.json").read_text())["sha256"]


def test_a_changed_file_is_refused(concepts: Path, tmp_path: Path) -> None:
    build_dataset(CONFIG, concepts, ICONS, tmp_path)
    with (tmp_path / "records.jsonl").open("a") as file:
        file.write("\n")
    with pytest.raises(ConfigError, match=r"records.jsonl differs from its digest"):
        EmojiDataset.load(tmp_path)


def test_an_unfinished_data_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="make emoji-data"):
        EmojiDataset.load(tmp_path)


def test_a_missing_pack_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'twemoji' is not installed.*make emoji-data"):
        IconPack("twemoji", tmp_path)


def test_an_unknown_pack_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"unknown icon pack openmoji; available: noto"):
        EmojiConfig(packs=("openmoji",))


def test_concepts_are_read_with_synonyms_and_groups(concepts: Path) -> None:
    face, apple, *_ = read_concepts(concepts)
    assert not face.recolourable and apple.synonyms == ("apple",) and apple.recolourable


@pytest.mark.parametrize(("label", "name"), [("T-Rex", "t-rex"), ("woman’s hat", "womans-hat"), ("pool 8 ball", "pool-8-ball")])
def test_slug(label: str, name: str) -> None:
    assert slug(label) == name


@pytest.mark.parametrize(
    ("phrase", "spoken"),
    [("apple", "an apple"), ("euro banknote", "a euro banknote"), ("unicorn", "a unicorn"), ("jeans", "jeans")],
)
def test_articles(phrase: str, spoken: str) -> None:
    assert article(phrase) == spoken


def test_captions_of_a_recoloured_picture_always_name_its_colour() -> None:
    words = captions("red apple", ("apple",), "noto", "blue", recoloured=True, is_default=True)
    assert words == ["blue apple", "a blue apple", "blue apple, noto style", "a blue apple, noto style"]


def test_captions_of_a_natural_picture_also_come_without_colour() -> None:
    words = captions("banana", (), "flat", "yellow", recoloured=False, is_default=True)
    assert {"banana", "a banana", "a yellow banana", "a banana, flat style"} <= set(words)


def test_only_the_default_style_goes_unnamed() -> None:
    words = captions("banana", (), "flat", "yellow", recoloured=False, is_default=False)
    assert words and all(word.endswith(", flat style") for word in words)


@pytest.mark.parametrize("colour", list(colours.HUES_DEG))
def test_a_hue_shift_reaches_the_colour_it_names(colour: str) -> None:
    red = np.zeros((8, 8, 3), np.float32)
    red[..., 0] = 0.9
    mask = np.ones((8, 8), bool)
    assert colours.dominant(colours.shift_hue(red, mask, colour), mask) == (colour, 1.0)


def test_hsv_round_trip() -> None:
    rgb = np.random.default_rng(0).random((16, 16, 3)).astype(np.float32)
    np.testing.assert_allclose(colours.rgb_from_hsv(colours.hsv_from_rgb(rgb)), rgb, atol=1e-5)

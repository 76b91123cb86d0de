"""Exported tokenizers give the ids that diffusers gives the text encoders."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import CLIPTokenizer

from nitro_export.tokenizer import PROBES, encode, write_tokenizer
from nitro_rt.errors import ExportError

VOCAB_SIZE = 10_000


def _random_prompts(count: int) -> list[str]:
    """Words, digits, marks, white space, accents, emoji, end marks and other scripts, in any order."""
    draw = random.Random(0)
    pieces = [
        "apple",
        "Red",
        " ",
        "  ",
        "\n",
        "\t",
        "!",
        "!!",
        "'s",
        "'LL",
        "7",
        "42",
        "é",
        "e\u0301",
        "ß",
        "İ",
        "猫",
        "🐈‍⬛",
        "<|endoftext|>",
        "<|startoftext|>",
        "_",
        "-",
        "—",
        "\u00a0",
        "\x00",
        "ﬁ",
        "ǅ",
        "</w>",
        "Ω",
        "क्षि",
    ]
    return ["".join(draw.choices(pieces, k=draw.randrange(1, 60))) for _ in range(count)]


@pytest.mark.parametrize("part", ["tokenizer", "tokenizer_2"])
@pytest.mark.parametrize("old_layout", [False, True])
def test_ids_equal_those_of_transformers(copied: Path, tmp_path: Path, part: str, old_layout: bool) -> None:
    if old_layout:
        (copied / part / "tokenizer.json").unlink()
    spec = write_tokenizer(copied / part, tmp_path / "plain.json", num_tokens=77, vocab_size=VOCAB_SIZE)
    reference = CLIPTokenizer.from_pretrained(copied / part)
    plain = Tokenizer.from_file(str(tmp_path / "plain.json"))
    prompts = [*PROBES, *_random_prompts(300)]
    expected = reference(prompts, padding="max_length", max_length=77, truncation=True)["input_ids"]
    assert [encode(plain, prompt, spec) for prompt in prompts] == expected
    assert any(len(set(ids)) > 20 for ids in expected)


def test_the_json_holds_no_special_part(tiny_kl: Path, tmp_path: Path) -> None:
    write_tokenizer(tiny_kl / "tokenizer", tmp_path / "plain.json", num_tokens=77, vocab_size=VOCAB_SIZE)
    plain = Tokenizer.from_file(str(tmp_path / "plain.json"))
    assert plain.encode("apple").ids == plain.encode("apple", add_special_tokens=False).ids
    assert (plain.padding, plain.truncation) == (None, None)
    assert len(plain.encode("apple " * 100).ids) == 100


def test_the_two_tokenizers_pad_differently(tiny_kl: Path, tmp_path: Path) -> None:
    first, second = (
        write_tokenizer(tiny_kl / part, tmp_path / part, num_tokens=77, vocab_size=VOCAB_SIZE)
        for part in ("tokenizer", "tokenizer_2")
    )
    assert first.pad_id == first.eos_id == second.eos_id
    assert second.pad_id == 0


@pytest.mark.parametrize("length", [64, None])
def test_refuses_another_length(copied: Path, tmp_path: Path, length: int | None) -> None:
    path = copied / "tokenizer" / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config.pop("model_max_length")
    path.write_text(json.dumps(config | ({"model_max_length": length} if length else {})))
    with pytest.raises(ExportError, match="model_max_length"):
        write_tokenizer(copied / "tokenizer", tmp_path / "plain.json", num_tokens=77, vocab_size=VOCAB_SIZE)


def test_refuses_a_damaged_or_foreign_vocabulary(copied: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="the text encoder knows 100"):
        write_tokenizer(copied / "tokenizer", tmp_path / "plain.json", num_tokens=77, vocab_size=100)
    for name in ("tokenizer.json", "vocab.json"):
        (copied / "tokenizer" / name).write_text('{"cut')
    with pytest.raises(ExportError, match="cannot be read"):
        write_tokenizer(copied / "tokenizer", tmp_path / "plain.json", num_tokens=77, vocab_size=VOCAB_SIZE)

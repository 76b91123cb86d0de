"""Token ids equal transformers'."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from nitro_rt.bundle import open_bundle
from nitro_rt.errors import BundleError
from nitro_rt.manifest import FileRef, TokenizerSpec
from nitro_rt.tokenizer import Tokenizer, truncation_message

PROMPTS = [
    "",
    " ",
    "a red apple",
    "A  RED\tapple\n, please!",
    "it's we'll don't 12345 x2",
    "café naïve ÅNGSTRÖM ß",
    "a 🍎 and 🍐👍🏽",
    "日本語 текст",
    "<|endoftext|> a <|startoftext|> b",
    "word " * 74,
    "word " * 75,
    "word " * 76 + "tail",
    "apple, " * 60,
]


@pytest.fixture(scope="module", params=["<|endoftext|>", "!"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[object, Tokenizer]:
    """transformers' CLIP tokenizer with a small vocabulary of all bytes and a few merges, and ours of the same file."""
    from transformers import CLIPTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    vocabulary, merges = _clip_vocabulary()
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]), encoding="utf-8")
    theirs = CLIPTokenizer.from_pretrained(folder, pad_token=request.param, model_max_length=77)
    path = folder / "tokenizer.json"
    theirs.backend_tokenizer.save(str(path))
    content = path.read_bytes()
    reference = FileRef(path=path.name, sha256=hashlib.sha256(content).hexdigest(), num_bytes=len(content))
    spec = TokenizerSpec(
        file=reference, max_length=77, bos_id=theirs.bos_token_id, eos_id=theirs.eos_token_id, pad_id=theirs.pad_token_id
    )
    return theirs, Tokenizer(path, spec)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_ids_equal_transformers(prompt: str, pair: tuple[object, Tokenizer]) -> None:
    theirs, ours = pair
    expected = theirs(prompt, padding="max_length", max_length=77, truncation=True).input_ids  # type: ignore[operator]
    assert ours.encode(prompt).ids == expected


def test_a_batch_is_padded_with_the_empty_prompt(pair: tuple[object, Tokenizer]) -> None:
    _, ours = pair
    ids = ours.encode_batch(["a red apple"], 3)
    assert ids.shape == (3, 77) and ids.dtype == np.int64
    assert ids[0].tolist() == ours.encode("a red apple").ids
    assert ids[1].tolist() == ids[2].tolist() == ours.encode("").ids


def test_the_cut_words_are_named(bundle_folder: Path) -> None:
    bundle = open_bundle(bundle_folder)
    tokenizers = [Tokenizer(bundle.path(spec.file), spec) for spec in bundle.manifest.tokenizers]

    def message_of(prompt: str) -> str | None:
        return truncation_message([tokenizer.encode(prompt) for tokenizer in tokenizers])

    assert message_of("a red apple " * 3 + "and") is None  # 10 tokens and two marks
    message = message_of("a red apple " * 3 + "and Blue Pear")
    assert message is not None
    assert "14 tokens" in message and "reads 12" in message and "'Blue Pear'" in message


def test_something_else_is_not_a_tokenizer(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text("{}")
    spec = TokenizerSpec(file=FileRef(path=path.name, sha256="", num_bytes=2), max_length=77, bos_id=0, eos_id=1, pad_id=1)
    with pytest.raises(BundleError, match="is not a tokenizer file"):
        Tokenizer(path, spec)


def _clip_vocabulary() -> tuple[dict[str, int], list[str]]:
    """CLIP's layout: bytes, bytes that end a word, merges, the two marks."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    merges = ["r e", "a p", "p l", "re d</w>", "ap pl", "appl e</w>", "w o", "r d</w>", "wo rd</w>"]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *(merge.replace(" ", "") for merge in merges)]
    return {token: index for index, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}, merges

"""A byte-level BPE in CLIP's format and of any size, made without a corpus, for checkpoints that are made without one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice, product
from pathlib import Path
from string import ascii_lowercase

from tokenizers.pre_tokenizers import ByteLevel

from nitro_rt.errors import ConfigError

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
END = "</w>"
"""CLIP's mark of a token that ends a word."""


def write_clip_tokenizer(folder: Path, *, vocab_size: int, num_tokens: int, pad: str | None = None) -> None:
    """Write vocab.json, merges.txt and the configs that transformers' CLIPTokenizer reads.

    Args:
        vocab_size: tokens: the 256 bytes, inside and at the end of a word, both marks, and merges for the rest. As in CLIP
            the marks come last (49,406 and 49,407 of 49,408).
        num_tokens: length of a prompt.
        pad: padding token; None for the end mark. SDXL's second tokenizer has "!".
    Raises: ConfigError if `vocab_size` is too small, or larger than there are merges.
    """
    alphabet = sorted(ByteLevel.alphabet())
    tokens = alphabet + [letter + END for letter in alphabet]
    num_merges = vocab_size - len(tokens) - 2
    merges = list(islice(_merges(), max(num_merges, 0)))
    if len(merges) != num_merges:
        raise ConfigError(f"a vocabulary of {vocab_size} tokens cannot be made; from {len(tokens) + 2} to 49408 can")
    tokens += [left + right for left, right in merges]
    vocab = {token: index for index, token in enumerate([*tokens, BOS, EOS])}
    assert len(vocab) == vocab_size
    folder.mkdir(parents=True)
    _write(folder / "vocab.json", json.dumps(vocab, ensure_ascii=False))
    _write(folder / "merges.txt", "\n".join(["#version: 0.2", *(f"{left} {right}" for left, right in merges)]))
    special = {"bos_token": BOS, "eos_token": EOS, "pad_token": pad or EOS, "unk_token": EOS}
    _write(folder / "special_tokens_map.json", json.dumps(special, indent=2))
    config = {**special, "tokenizer_class": "CLIPTokenizer", "model_max_length": num_tokens}
    _write(folder / "tokenizer_config.json", json.dumps(config, indent=2))


def _merges() -> Iterator[tuple[str, str]]:
    """Pairs to merge, by rank: two letters, inside and at the end of a word, then two and one, then two and two."""
    letters = ascii_lowercase
    pairs = ["".join(pair) for pair in product(letters, letters)]
    yield from ((pair[0], pair[1]) for pair in pairs)
    yield from ((pair[0], pair[1] + END) for pair in pairs)
    for end in (END, ""):
        yield from ((pair, letter + end) for pair in pairs for letter in letters)
    yield from product(pairs, (pair + END for pair in pairs))


def _write(path: Path, text: str) -> None:
    path.write_text(text + "\n", encoding="utf-8")

"""The CLIP tokenizer, cut down to the most frequent merges of open_clip's vocabulary."""

from __future__ import annotations

import gzip
import io
import json
import zipfile
from pathlib import Path

from transformers import CLIPTokenizer

from nitro_rt.errors import ConfigError

VOCABULARY_FILE = "open_clip/bpe_simple_vocab_16e6.txt.gz"
MAX_TOKENS = 77


def read_merges(wheel_or_gz: Path, num_merges: int) -> list[str]:
    """The first `num_merges` merges ("a b") of CLIP's byte-pair vocabulary, from the open_clip wheel or the file itself."""
    if not wheel_or_gz.is_file():
        raise ConfigError(f"no vocabulary at {wheel_or_gz}; run `make emoji-data`, which fetches open_clip_torch's wheel")
    if wheel_or_gz.suffix == ".whl":
        with zipfile.ZipFile(wheel_or_gz) as wheel:
            packed = wheel.read(VOCABULARY_FILE)
    else:
        packed = wheel_or_gz.read_bytes()
    with gzip.open(io.BytesIO(packed), "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")
    return lines[1 : num_merges + 1]


def byte_symbols() -> list[str]:
    """The 256 symbols that stand for bytes in GPT-2's and CLIP's vocabularies, printable bytes first."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(others))]


def write_tokenizer(merges: list[str], folder: Path) -> CLIPTokenizer:
    """Write `vocab.json` and `merges.txt` and load them.

    Ids: 256 bytes, the same ending a word, one per merge, start, end; padding is the end mark.
    """
    symbols = byte_symbols()
    words = [*symbols, *(symbol + "</w>" for symbol in symbols), *("".join(merge.split()) for merge in merges)]
    vocabulary = {word: index for index, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    config = {"model_max_length": MAX_TOKENS, "pad_token": "<|endoftext|>", "tokenizer_class": "CLIPTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    tokenizer: CLIPTokenizer = CLIPTokenizer.from_pretrained(str(folder))
    return tokenizer

"""CLIP tokenizers as plain `tokenizers` JSON, checked to give the ids that diffusers would give.

The JSON does the text part only: normalise, split, merge, and find special tokens that are written out in a prompt.
Its post-processor, truncation and padding are removed, so the runtime's part is the same for every checkpoint:

    ids = tokenizer.encode(prompt, add_special_tokens=False).ids[: max_length - 2]
    ids = [bos_id, *ids, eos_id]
    ids += [pad_id] * (max_length - len(ids))
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer
from transformers import CLIPTokenizer

from nitro_rt.errors import ExportError
from nitro_rt.manifest import FileRef, TokenizerSpec, sha256_of

PROBES = (
    "",
    "a red apple",
    "A photo, of THE cat's  house!  ",
    "naïve café № 7 — 東京の猫 🐈‍⬛ \t\n x",
    "<|startoftext|> red <|endoftext|> !! ! a!",
    "it's they're 12345 e=mc^2 (((masterpiece:1.2)))",
    "apple " * 100,
)
"""Prompts on which every exported tokenizer must agree: empty, plain, contractions, Unicode, end marks, too long."""


def write_tokenizer(source: Path, target: Path, *, num_tokens: int, vocab_size: int) -> TokenizerSpec:
    """Write the tokenizer of the checkpoint folder `source` to the JSON file `target`.

    Args:
        num_tokens: what the text encoder reads; the tokenizer must say the same.
        vocab_size: rows of the text encoder's table; every id must have one.
    Raises: ExportError if it cannot be read, has another length, or the JSON gives other ids.
    """
    try:
        reference = CLIPTokenizer.from_pretrained(source, local_files_only=True)
    except Exception as exc:  # json, tokenizers and transformers each raise their own kinds for a damaged file
        raise ExportError(f"{source} cannot be read as a CLIP tokenizer: {exc}; fetch the checkpoint again") from exc
    if reference.model_max_length != num_tokens:
        raise ExportError(
            f"{source}: model_max_length is {reference.model_max_length} in tokenizer_config.json, "
            f"but the text encoder reads {num_tokens} tokens; set it to {num_tokens}"
        )
    if len(reference) > vocab_size:
        raise ExportError(
            f"{source} has {len(reference)} tokens, the text encoder knows {vocab_size}; they do not belong together"
        )
    description = json.loads(reference.backend_tokenizer.to_str())
    description |= {"post_processor": None, "truncation": None, "padding": None}
    target.write_text(json.dumps(description, ensure_ascii=False), encoding="utf-8")
    spec = TokenizerSpec(
        file=FileRef(path=target.name, sha256=sha256_of(target), num_bytes=target.stat().st_size),
        max_length=num_tokens,
        bos_id=reference.bos_token_id,
        eos_id=reference.eos_token_id,
        pad_id=reference.pad_token_id,
    )
    plain = Tokenizer.from_file(str(target))
    for prompt in PROBES:
        expected = reference(prompt, padding="max_length", max_length=num_tokens, truncation=True)["input_ids"]
        if encode(plain, prompt, spec) != expected:
            raise ExportError(
                f"{source}: as plain JSON this tokenizer reads {prompt[:40]!r} differently; it is no CLIP tokenizer"
            )
    return spec


def encode(tokenizer: Tokenizer, prompt: str, spec: TokenizerSpec) -> list[int]:
    """The `max_length` ids of a prompt, as the runtime makes them."""
    inner = tokenizer.encode(prompt, add_special_tokens=False).ids[: spec.max_length - 2]
    ids = [spec.bos_id, *inner, spec.eos_id]
    return ids + [spec.pad_id] * (spec.max_length - len(ids))

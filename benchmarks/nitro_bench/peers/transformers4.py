"""A checkpoint in the form that transformers 4 reads, which optimum's exporters need: links to its files, with two corrections.

transformers 5 saves a tokenizer as tokenizer.json alone, where 4 wants vocab.json and merges.txt, and CLIPTextModel's weights
without the prefix `text_model.`, where 4 warns and goes on with random weights. Standard library only.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

PREFIX = "text_model."
UNPREFIXED = ("embeddings.", "encoder.", "final_layer_norm.")
"""How the names start that transformers 4 wants with the prefix."""
HEADER_ALIGNMENT = 8


def in_transformers_4_form(model: Path, folder: Path) -> Path:
    """Make `folder`. What needs no correction is linked.

    Args:
        model: a diffusers folder, absolute.
    Returns: `folder`.
    """
    folder.mkdir()
    for part in sorted(model.iterdir()):
        if not part.is_dir():
            (folder / part.name).symlink_to(part)
            continue
        copy = folder / part.name
        copy.mkdir()
        for file in sorted(part.iterdir()):
            if part.name.startswith("text_encoder") and file.suffix == ".safetensors":
                _link_with_prefix(file, copy / file.name)
            else:
                (copy / file.name).symlink_to(file)
        if (copy / "tokenizer.json").is_file() and not (copy / "vocab.json").is_file():
            _write_vocabulary(copy)
    return folder


def stored_dtype(model: Path) -> str:
    """What the UNet's weights are stored in, as safetensors names it: F16, BF16, F32. The largest tensor decides."""
    path = next(iter(sorted((model / "unet").glob("*.safetensors"))), None)
    if path is None:
        raise FileNotFoundError(f"{model / 'unet'} holds no .safetensors file")
    header, _ = _header(path)
    tensors = [entry for name, entry in header.items() if name != "__metadata__"]
    return str(max(tensors, key=lambda entry: entry["data_offsets"][1] - entry["data_offsets"][0])["dtype"])


def _write_vocabulary(tokenizer: Path) -> None:
    pieces = json.loads((tokenizer / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in pieces["merges"]]
    (tokenizer / "vocab.json").write_text(json.dumps(pieces["vocab"], ensure_ascii=False), encoding="utf-8")
    (tokenizer / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")


def _link_with_prefix(path: Path, target: Path) -> None:
    """A link, or a copy with other names in its header where transformers 4 knows the tensors by others."""
    header, data_at = _header(path)
    if not any(name.startswith(UNPREFIXED) for name in header):
        target.symlink_to(path)
        return
    renamed = {PREFIX + name if name.startswith(UNPREFIXED) else name: entry for name, entry in header.items()}
    text = json.dumps(renamed).encode()
    text += b" " * (-len(text) % HEADER_ALIGNMENT)
    with path.open("rb") as source, target.open("wb") as copy:
        copy.write(len(text).to_bytes(8, "little") + text)
        source.seek(data_at)
        shutil.copyfileobj(source, copy, 1 << 24)


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """A safetensors file's header and where its data starts."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(length)), 8 + length

"""UNet weights on disk, read tensor by tensor and written tensor by tensor: an SDXL UNet of 5 GB never stands in memory.

Reading maps files into memory; the pages belong to the system's cache. Writing goes through a small writer of our own, since
`safetensors.torch.save_file` wants all tensors at once, and shards (the other way out) are not what single-file tools read.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.single_file_utils import LDM_UNET_KEY, convert_ldm_unet_checkpoint
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nitro_export.checkpoint import shards
from nitro_rt.errors import ConfigError, ExportError, ModelNotFound
from nitro_rt.manifest import sha256_of

STEM = "diffusion_pytorch_model"
VARIANTS = ("", ".fp16")
"""Of weight files, by preference: what a folder holds as fp16 only is read as that."""
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""safetensors' name -> torch's. Quantised types are refused: a sum of them is not one of them."""
SDXL = {"layers_per_block": 2, "addition_embed_type": "text_time"}
"""What diffusers' converter of single-file checkpoints asks of a UNet's config."""


@dataclass(frozen=True)
class TensorSpec:
    """What a tensor looks like before it is read."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(kw_only=True)
class UNetWeights:
    """The weights of one UNet, open for reading, under the names that diffusers gives them."""

    name: str
    """The checkpoint's own name, or its file's."""
    files: tuple[Path, ...]
    checkpoint: Path | None
    """The checkpoint folder that the UNet is part of; None for a UNet alone."""
    run: dict[str, Any]
    """The checkpoint's run.json, or empty."""
    specs: dict[str, TensorSpec]
    _read: dict[str, Callable[[], Tensor]] = field(repr=False)

    def tensor(self, key: str) -> Tensor:
        """A tensor on the CPU; its memory is the mapped file's, so do not write to it."""
        return self._read[key]()

    @property
    def num_bytes(self) -> int:
        return sum(spec.num_bytes for spec in self.specs.values())

    def sha256(self) -> dict[str, str]:
        """Digest of each weight file, by its name."""
        return {path.name: sha256_of(path) for path in self.files}

    def facts(self) -> dict[str, Any]:
        """Where weights that are made of these come from: name, licence, digests."""
        return {"name": self.name, "licence": str(self.run.get("licence") or "unknown"), "unet_sha256": self.sha256()}


@contextmanager
def open_unet(path: Path) -> Iterator[UNetWeights]:
    """Open the UNet at `path`.

    Args:
        path: a diffusers checkpoint folder, its `unet` folder, a shard index, or one .safetensors file, with the UNet alone
            or a whole checkpoint in the layout of ComfyUI (keys model.diffusion_model.*).
    Raises: ModelNotFound if there is no UNet; ConfigError if it is a pickle, quantised, or no UNet; ExportError if it is
        damaged.
    """
    checkpoint = path if path.is_dir() and ((path / "model_index.json").is_file() or (path / "unet").is_dir()) else None
    files = _weight_files(checkpoint / "unet" if checkpoint else path)
    run = read_run(checkpoint) if checkpoint else {}
    with ExitStack() as stack:
        specs, read = _open_files(files, stack)
        names = _diffusers_names(path, list(specs))
        yield UNetWeights(
            name=str(run.get("name") or path.resolve().name.removesuffix(".safetensors")),
            files=files,
            checkpoint=checkpoint,
            run=run,
            specs={name: specs[key] for name, key in names.items()},
            _read={name: read[key] for name, key in names.items()},
        )


def read_run(checkpoint: Path) -> dict[str, Any]:
    """A checkpoint's run.json; empty where there is none. Raises: ExportError if it is damaged."""
    path = checkpoint / "run.json"
    return _read_json(path) if path.is_file() else {}


def shift_of(weights: UNetWeights, shift: int | None) -> int | None:
    """The timestep shift that the weights are to be drawn with: `shift`, or else what their run.json says.

    Raises: ConfigError if it is not a whole number from 1 to 1000.
    """
    found = weights.run.get("shifted_timestep") if shift is None else shift
    if found is not None and (isinstance(found, bool) or not isinstance(found, int) or not 1 <= found <= 1000):
        raise ConfigError(f"the timestep shift of {weights.name} is {found!r}, it must be from 1 to 1000; say --shift")
    return found


def require_same_layout(unets: Mapping[str, UNetWeights]) -> None:
    """All UNets have the same tensors in the same shapes; their number types may differ.

    Args:
        unets: role (for the message) -> weights; the first is what the others are compared with.
    Raises: ConfigError with the first difference and their number.
    """
    (first, model), *others = unets.items()
    for role, other in others:
        missing, extra = sorted(set(model.specs) - set(other.specs)), sorted(set(other.specs) - set(model.specs))
        if missing or extra:
            lacks = f"lacks {len(missing)} of the {len(model.specs)} tensors of {first}, first {missing[0]}" if missing else ""
            more = f"has {len(extra)} that {first} has not, first {extra[0]}" if extra else ""
            raise ConfigError(
                f"the UNets of {first} ({model.name}) and {role} ({other.name}) do not fit: {role} "
                f"{' and '.join(filter(None, (lacks, more)))}; all must be of one architecture"
            )
        shapes = [key for key, spec in model.specs.items() if spec.shape != other.specs[key].shape]
        if shapes:
            key = min(shapes)
            raise ConfigError(
                f"the UNets of {first} ({model.name}) and {role} ({other.name}) do not fit: {len(shapes)} of "
                f"{len(model.specs)} tensors have other shapes, first {key}: {list(model.specs[key].shape)} in {first}, "
                f"{list(other.specs[key].shape)} in {role}; all must be of one architecture"
            )


def write_safetensors(
    path: Path,
    specs: Mapping[str, TensorSpec],
    parts_of: Callable[[str], Iterable[Tensor]],
    metadata: Mapping[str, str],
) -> None:
    """Write a safetensors file with one part of one tensor in memory at a time.

    Args:
        parts_of: asked for each name in turn; gives the tensor's elements in order, cut as the caller likes.
    Raises: OSError if it cannot be written; the file is then cut, and the caller removes it.
    Source of the format: huggingface.co/docs/safetensors, section "Format".
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    # Widest numbers first, as safetensors itself orders them, so that every tensor is aligned.
    order = sorted(specs, key=lambda key: (-specs[key].dtype.itemsize, key))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for key in order:
        begin, end = end, end + specs[key].num_bytes
        header[key] = {"dtype": names[specs[key].dtype], "shape": list(specs[key].shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for key in order:
            written = 0
            for part in parts_of(key):
                assert part.dtype == specs[key].dtype, (key, part.dtype, specs[key].dtype)
                written += file.write(part.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            assert written == specs[key].num_bytes, (key, written, specs[key].num_bytes)
        file.flush()
        os.fsync(file.fileno())


def _weight_files(path: Path) -> tuple[Path, ...]:
    """The one weight file of a UNet, or its shards."""
    if path.is_dir():
        return _weight_files_of_folder(path)
    if not path.is_file():
        raise ModelNotFound(f"there is no file or folder {path}; name a checkpoint folder or a UNet's .safetensors file")
    if path.name.endswith(".json"):
        return shards(path)
    if path.suffix != ".safetensors":
        raise ConfigError(
            f"{path} is no .safetensors file; pickles (.ckpt, .bin, .pt) are not opened because they can run code"
        )
    return (path,)


def _weight_files_of_folder(folder: Path) -> tuple[Path, ...]:
    for variant in VARIANTS:
        single, index = folder / f"{STEM}{variant}.safetensors", folder / f"{STEM}.safetensors.index{variant}.json"
        if single.is_file():
            return (single,)
        if index.is_file():
            return shards(index)
    found = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) if folder.is_dir() else ""
    raise ModelNotFound(f"{folder} has no {STEM}.safetensors and no index of shards; found: {found or 'nothing'}")


def _open_files(files: tuple[Path, ...], stack: ExitStack) -> tuple[dict[str, TensorSpec], dict[str, Callable[[], Tensor]]]:
    specs: dict[str, TensorSpec] = {}
    read: dict[str, Callable[[], Tensor]] = {}
    for path in files:
        try:
            file = stack.enter_context(safe_open(str(path), framework="pt"))
        except (SafetensorError, OSError) as exc:
            raise ExportError(f"{path} is damaged: {exc}; fetch it again") from exc
        for key in file.keys():  # noqa: SIM118 (safe_open is no mapping)
            part = file.get_slice(key)
            if part.get_dtype() not in DTYPES:
                raise ConfigError(
                    f"{path}: {key} has the number type {part.get_dtype()}; weights in {', '.join(DTYPES)} are read, "
                    "take a checkpoint that is not quantised"
                )
            specs[key] = TensorSpec(DTYPES[part.get_dtype()], tuple(part.get_shape()))
            read[key] = _reader(file, key)
    return specs, read


def _reader(file: Any, key: str) -> Callable[[], Tensor]:
    return lambda: file.get_tensor(key)


def _diffusers_names(path: Path, keys: list[str]) -> dict[str, str]:
    """diffusers' name of every UNet tensor -> its key in the file.

    diffusers' own converter only renames, so it is given each key as its own value and tells the names.
    """
    if any(key.startswith(LDM_UNET_KEY) for key in keys):
        names = convert_ldm_unet_checkpoint({key: key for key in keys if key.startswith(LDM_UNET_KEY)}, SDXL)
    elif any(key.startswith("input_blocks.") for key in keys):
        names = convert_ldm_unet_checkpoint({LDM_UNET_KEY + key: key for key in keys}, SDXL)
    else:
        names = {key: key for key in keys}
    if "conv_in.weight" not in names:
        raise ConfigError(
            f"{path} holds no UNet: there is no conv_in.weight among its {len(keys)} tensors, "
            f"first {min(keys, default='none')}; a UNet in the layout of diffusers or ComfyUI is needed"
        )
    return names


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as exc:
        raise ExportError(f"{path} is not valid JSON: {exc}; fetch the checkpoint again") from exc
    if not isinstance(data, dict):
        raise ExportError(f"{path} holds a {type(data).__name__}, not an object; fetch the checkpoint again")
    return data

"""Tensors that are read when they are written: a conversion of gigabytes that holds one tensor at a time.

diffusers' converters of single-file checkpoints rename, cut, transpose and reshape tensors. A `LazyTensor` takes these few
operations and carries them out when it is read, so the converters run as they are over the headers of files.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from nitro_export.stored import StoredTensor, stored_tensors
from nitro_export.weights import DTYPES, TensorSpec, write_safetensors
from nitro_rt.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class LazyTensor:
    """A tensor by its type and shape; `read` gives its values, in memory of its own, anew each time."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    key: str
    """Of the stored tensor that it comes from: tells which ones a conversion left behind."""

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    @property
    def T(self) -> LazyTensor:  # noqa: N802 (torch's name)
        return self._then(lambda tensor: tensor.T)

    def __getitem__(self, index: Any) -> LazyTensor:
        return self._then(lambda tensor: tensor[index])

    def contiguous(self) -> LazyTensor:
        return self

    clone = detach = contiguous
    """What is read is a copy already."""

    def _then(self, change: Callable[[Tensor], Tensor]) -> LazyTensor:
        shape = tuple(change(torch.empty(self.shape, device="meta")).shape)
        return LazyTensor(dtype=self.dtype, shape=shape, read=lambda: change(self.read()), key=self.key)


Tensors = Mapping[str, LazyTensor]


def lazy_tensors(files: Iterable[Path]) -> dict[str, LazyTensor]:
    """Every tensor of these safetensors files, by key.

    Raises: ExportError if a file is damaged or quantised.
    """
    return {key: _lazy(stored) for key, stored in stored_tensors(files).items()}


def metadata_of(path: Path) -> dict[str, str]:
    """What a safetensors file says about itself; `lazy_tensors` has found it undamaged."""
    with safe_open(str(path), framework="pt") as file:
        return dict(file.metadata() or {})


def write_lazy(path: Path, tensors: Tensors) -> None:
    """Write a safetensors file, one tensor in memory at a time. Raises: OSError; ConfigError for numbers that are no floats."""
    write_safetensors(path, _specs(path, tensors), lambda key: [tensors[key].read()], {"format": "pt"})


def write_outline(path: Path, tensors: Tensors) -> None:
    """A safetensors file with a true header, true size and no values: a hole, which takes no room on the disk."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {}
    end = 0
    for key, spec in _specs(path, tensors).items():
        begin, end = end, end + spec.num_bytes
        header[key] = {"dtype": names[spec.dtype], "shape": list(spec.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


def _specs(path: Path, tensors: Tensors) -> dict[str, TensorSpec]:
    for key, tensor in tensors.items():
        if tensor.dtype not in DTYPES.values():
            raise ConfigError(f"{path.name}: {key} holds {tensor.dtype}, weights are one of {', '.join(DTYPES)}")
    return {key: TensorSpec(tensor.dtype, tensor.shape) for key, tensor in tensors.items()}


def _lazy(stored: StoredTensor) -> LazyTensor:
    return LazyTensor(dtype=getattr(torch, stored.dtype), shape=stored.shape, read=stored.read, key=stored.key)

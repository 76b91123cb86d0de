"""Tensors as they lie in safetensors files: found by header, read one by one, scanned without being kept.

An SDXL UNet has 5 GB; nothing here holds more than one tensor. Files are read, not mapped, where every byte is looked at
once: mapped pages would count as this process's memory.

Source of the format: huggingface.co/docs/safetensors, section "Format".
"""

from __future__ import annotations

import functools
import hashlib
import json
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from nitro_rt.errors import ExportError

DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32"}
"""safetensors' name -> torch's. Others (quantised weights) are refused."""
EXPONENTS = {"float32": (np.uint32, 0x7F800000), "float16": (np.uint16, 0x7C00), "bfloat16": (np.uint16, 0x7F80)}
"""Type -> its bits as an unsigned type, and the exponent bits: where all are set, the number is infinite or NaN."""
MAX_HEADER_BYTES = 100_000_000
"""safetensors' own limit."""
CHUNK_BYTES = 1 << 24


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """Where a tensor's bytes are."""

    path: Path
    key: str
    """Its name in the file."""
    dtype: str
    """torch's name."""
    shape: tuple[int, ...]
    offset: int
    """Bytes from the file's start."""
    num_bytes: int
    folded: Callable[[Any], Any] | None = None
    """Makes a network's parameter of it, in another shape and in float32; None: it is used as it lies."""

    def read(self) -> Any:
        """The tensor, in memory of its own."""
        return self._folded(self._read())

    def mapped(self) -> Any:
        """The tensor over the file's pages, which the system may drop and read again; a write stays in this process."""
        content = np.memmap(self.path, dtype=np.uint8, mode="c", offset=self.offset, shape=(self.num_bytes,))
        return self._folded(_tensor(content, self))

    def _folded(self, tensor: Any) -> Any:
        return tensor if self.folded is None else self.folded(tensor)

    def _read(self) -> Any:
        with self.path.open("rb") as file:
            file.seek(self.offset)
            content = bytearray(self.num_bytes)
            if file.readinto(content) != self.num_bytes:
                raise ExportError(f"{self.path} was cut while it was read; fetch it again")
        return _tensor(content, self)


def _tensor(content: Any, stored: StoredTensor) -> Any:
    import torch

    if not stored.num_bytes:
        return torch.empty(stored.shape, dtype=getattr(torch, stored.dtype))
    flat = torch.frombuffer(content, dtype=torch.uint8) if isinstance(content, bytearray) else torch.from_numpy(content)
    return flat.view(getattr(torch, stored.dtype)).view(stored.shape)


def stored_tensors(files: Iterable[Path]) -> dict[str, StoredTensor]:
    """Every tensor of these safetensors files, by key; shards are one namespace.

    Raises: ExportError for a damaged header, a cut file, a quantised type, or a key in two shards.
    """
    tensors: dict[str, StoredTensor] = {}
    for path in files:
        for key, tensor in _header(path).items():
            if key in tensors:
                raise ExportError(f"{path} and {tensors[key].path.name} both hold {key}; fetch the checkpoint again")
            tensors[key] = tensor
    return tensors


def _header(path: Path) -> dict[str, StoredTensor]:
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            raise ExportError(f"{path} is no safetensors file, or was cut ({size} bytes); fetch it again")
        try:
            entries = json.loads(file.read(length))
            tensors = {key: _stored(path, key, entry, 8 + length) for key, entry in entries.items() if key != "__metadata__"}
        except (ValueError, KeyError, TypeError, AttributeError) as exc:
            raise ExportError(f"{path} has a damaged header ({exc}); fetch it again") from exc
    end = max((tensor.offset + tensor.num_bytes for tensor in tensors.values()), default=0)
    if end > size:
        raise ExportError(f"{path} was cut: its header speaks of {end} bytes, there are {size}; fetch it again")
    return tensors


def _stored(path: Path, key: str, entry: dict[str, Any], base: int) -> StoredTensor:
    begin, end = entry["data_offsets"]
    shape = tuple(int(size) for size in entry["shape"])
    if entry["dtype"] not in DTYPES:
        raise ExportError(
            f"{path}: {key} has the number type {entry['dtype']}; weights in {', '.join(DTYPES)} are read, "
            "take a checkpoint that is not quantised"
        )
    dtype = DTYPES[entry["dtype"]]
    width = {"float64": 8, "int64": 8, "float32": 4, "int32": 4}.get(dtype, 2)
    if not 0 <= begin <= end or end - begin != prod(shape) * width:
        raise ValueError(f"{key} has {list(shape)} {dtype} in {end - begin} bytes")
    return StoredTensor(path=path, key=key, dtype=dtype, shape=shape, offset=base + begin, num_bytes=end - begin)


def sha256_of_finite(path: Path) -> str:
    """The file's digest, after looking at every weight on the way: one reading for both.

    A file that has not changed since (size, time of change, inode) is not read again by this process.
    Raises: ExportError naming the first tensors that hold NaN or infinity.
    """
    facts = path.stat()
    return _scan(path, facts.st_size, facts.st_mtime_ns, facts.st_ino)


@functools.lru_cache(maxsize=64)
def _scan(path: Path, size: int, mtime_ns: int, inode: int) -> str:
    digest = hashlib.sha256()
    tensors = sorted(_header(path).values(), key=lambda tensor: tensor.offset)
    broken = []
    with path.open("rb") as file:
        for tensor in tensors:
            # What lies before it: the header, or padding.
            digest.update(file.read(max(0, tensor.offset - file.tell())))
            finite = True
            left = tensor.num_bytes
            while left:
                content = file.read(min(CHUNK_BYTES, left))
                if not content:
                    raise ExportError(f"{path} was cut while it was read; fetch it again")
                digest.update(content)
                finite &= _all_finite(content, tensor.dtype)
                left -= len(content)
            if not finite:
                broken.append(tensor.key)
        while content := file.read(CHUNK_BYTES):
            digest.update(content)
    if broken:
        listed = ", ".join(broken[:10]) + (f" and {len(broken) - 10} more" if len(broken) > 10 else "")
        raise ExportError(
            f"{path} holds NaN or infinity in {listed}; every image would be black. Fetch it again or train longer"
        )
    return digest.hexdigest()


def _all_finite(content: bytes, dtype: str) -> bool:
    if dtype not in EXPONENTS:
        return bool(np.isfinite(np.frombuffer(content)).all()) if dtype == "float64" else True
    kind, exponent = EXPONENTS[dtype]
    return bool(((np.frombuffer(content, kind) & kind(exponent)) != exponent).all())

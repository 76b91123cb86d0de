"""One file of weights, written tensor by tensor and named by its content, that several graphs point into."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

import onnx
import torch
from torch import Tensor

from nitro_export.graph import ALIGNMENT, INLINE_BYTES
from nitro_rt.errors import ExportError

TORCH_TYPES: dict[int, torch.dtype] = {
    onnx.TensorProto.FLOAT: torch.float32,
    onnx.TensorProto.FLOAT16: torch.float16,
    onnx.TensorProto.BFLOAT16: torch.bfloat16,
    onnx.TensorProto.INT8: torch.int8,
    onnx.TensorProto.UINT8: torch.uint8,
    onnx.TensorProto.FLOAT8E4M3FN: torch.float8_e4m3fn,
    onnx.TensorProto.INT32: torch.int32,
    onnx.TensorProto.INT64: torch.int64,
}
ONNX_TYPES: dict[torch.dtype, int] = {dtype: kind for kind, dtype in TORCH_TYPES.items()}


class WeightFile:
    """Takes tensors by name, each once, and gives initializers; `close` names the file and completes the graphs."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._partial = folder / "weights.partial"
        self._out = self._partial.open("wb")
        self._digest = hashlib.sha256()
        self._end = 0
        self._known: dict[str, onnx.TensorProto] = {}

    def __enter__(self) -> WeightFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._out.close()
        self._partial.unlink(missing_ok=True)

    def __contains__(self, name: str) -> bool:
        return name in self._known

    def initializer(self, name: str, tensor: Tensor | None = None) -> onnx.TensorProto:
        """An initializer of this name for one more graph; its value is needed the first time only."""
        if name not in self._known:
            assert tensor is not None, name
            self._known[name] = self._written(name, tensor)
        return self._known[name]

    def close(self, models: Iterable[onnx.ModelProto]) -> Path | None:
        """Name the file, and tell the graphs that point into it; None if every tensor was small enough to stay inline."""
        self._out.close()
        if not self._end:
            return None
        path = self._folder / f"{self._digest.hexdigest()}.data"
        os.replace(self._partial, path)
        for model in models:
            for tensor in model.graph.initializer:
                if tensor.data_location == onnx.TensorProto.EXTERNAL:
                    assert tensor.name in self._known and tensor.external_data[0].key == "location", tensor.name
                    tensor.external_data[0].value = path.name
        return path

    def _written(self, name: str, tensor: Tensor) -> onnx.TensorProto:
        content = bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        found = onnx.TensorProto(name=name, dims=tuple(tensor.shape), data_type=ONNX_TYPES[tensor.dtype])
        if len(content) < INLINE_BYTES:
            found.raw_data = content
            return found
        padding = b"\0" * (-self._end % ALIGNMENT)
        offset = self._end + len(padding)
        for part in (padding, content):
            self._out.write(part)
            self._digest.update(part)
        self._end = offset + len(content)
        found.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", ""), ("offset", str(offset)), ("length", str(len(content)))):
            found.external_data.add(key=key, value=value)
        return found


def read_tensor(tensor: onnx.TensorProto, folder: Path) -> Tensor:
    """The value of an initializer, in memory of its own, from inside the graph or from the file that it points to.

    Raises: ExportError for a type that no graph of ours has, or a file that is cut, missing or not beside the graph.
    """
    dtype = TORCH_TYPES.get(tensor.data_type)
    if dtype is None:
        raise ExportError(f"{tensor.name} has the ONNX type {tensor.data_type}, which is not read; export again")
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        content = bytearray(tensor.raw_data or onnx.numpy_helper.to_array(tensor).tobytes())
        return torch.frombuffer(content, dtype=dtype).reshape(tuple(tensor.dims)) if content else torch.empty(0, dtype=dtype)
    place = {entry.key: entry.value for entry in tensor.external_data}
    if Path(place["location"]).name != place["location"]:
        raise ExportError(f"{tensor.name} lies in {place['location']!r}, which is not beside its graph in {folder}; refused")
    path, length = folder / place["location"], int(place["length"])
    content = bytearray(length)
    try:
        with path.open("rb") as file:
            file.seek(int(place.get("offset", 0)))
            if file.readinto(content) != length:
                raise ExportError(f"{path} was cut: it ends within {tensor.name}; export again")
    except OSError as exc:
        raise ExportError(f"{path}, which holds {tensor.name}, cannot be read: {exc}; export again") from exc
    return torch.frombuffer(content, dtype=dtype).reshape(tuple(tensor.dims))

"""What the layers of a network are given while it draws: extremes of everything, and a seeded sample of rows.

A row is what one output position is computed from: a token's features for a linear layer, the pixels under the kernel for a
convolution. Layers given the very same tensor (the queries, keys and values of an attention) share one record. A few rows
per layer say what quantising it would cost, so the network is run once and nothing of its size is kept.

Shapes: N rows, K numbers in a row, C input channels, O output channels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

QUANTISABLE = (nn.Linear, nn.Conv2d)


@dataclass(kw_only=True)
class InputRecord:
    """Everything that calibration keeps of one tensor that layers are given."""

    low: float = 0.0
    high: float = 0.0
    amax_C: Tensor | None = None
    """[C] largest magnitude of each channel."""
    rows_NK: list[Tensor] = field(default_factory=list)
    multiplications: dict[str, float] = field(default_factory=dict)
    """Of each layer that is given this tensor, over all calls."""

    def rows(self) -> Tensor:
        """[N, K] float32: of every call, a few at random and the one with the largest number."""
        return torch.cat(self.rows_NK)


class Recorder:
    """Watches the layers of a network. `records` is by the first layer that is given a tensor, `leaders` says which that is."""

    def __init__(self, *, seed: int, rows_per_call: int) -> None:
        self.records: dict[str, InputRecord] = {}
        self.leaders: dict[str, str] = {}
        self._seed, self._rows_per_call = seed, rows_per_call
        self._num_calls: dict[str, int] = {}
        self._seen: WeakIdKeyDictionary = WeakIdKeyDictionary()

    @contextmanager
    def watching(self, layers: Mapping[str, nn.Module]) -> Iterator[None]:
        """Record the inputs of these modules, by name, while the body runs the network."""
        handles = [
            layer.register_forward_pre_hook(lambda module, args, name=name: self._see(name, module, args[0]))
            for name, layer in layers.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _see(self, name: str, module: nn.Module, given: Tensor) -> None:
        if name not in self.leaders:
            # Convolutions cut rows of their own shape out of a tensor, so they share with nobody.
            self.leaders[name] = self._seen.setdefault(given, name) if isinstance(module, nn.Linear) else name
        leader = self.leaders[name]
        record = self.records.setdefault(leader, InputRecord())
        record.multiplications[name] = record.multiplications.get(name, 0.0) + multiplications(module, given)
        if leader == name:
            self._num_calls[name] = self._num_calls.get(name, 0) + 1
            self._add(record, module, given.detach().float(), f"{name} {self._num_calls[name]}")

    def _add(self, record: InputRecord, module: nn.Module, given: Tensor, draw: str) -> None:
        channel = 1 if isinstance(module, nn.Conv2d) else given.ndim - 1
        low, high = (_over_channels(given, channel, extreme) for extreme in ("amin", "amax"))
        amax_C = torch.maximum(-low, high)
        record.low, record.high = min(record.low, low.min().item()), max(record.high, high.max().item())
        record.amax_C = amax_C if record.amax_C is None else torch.maximum(record.amax_C, amax_C)
        digest = hashlib.sha256(f"{self._seed} {draw}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        record.rows_NK.append(sample_rows(module, given, self._rows_per_call, generator))


def multiplications(module: nn.Module, given: Tensor) -> float:
    """Of one call of a linear layer or convolution."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    if isinstance(module, nn.Conv2d):
        height, width = (_out_size(module, axis, given.shape[axis - 2]) for axis in (0, 1))
        return float(prod(weight.shape)) * given.shape[0] * height * width
    return float(prod(weight.shape)) * prod(given.shape[:-1])


def sample_rows(module: nn.Module, given: Tensor, num_rows: int, generator: torch.Generator) -> Tensor:
    """[N, K] rows of `given` that `module` computes an output from: `num_rows` at random, and that of the largest number."""
    if isinstance(module, nn.Conv2d):
        return _patches(module, given, num_rows, generator)
    rows = given.reshape(-1, given.shape[-1])
    if len(rows) <= num_rows:
        return rows.clone()
    largest = _argmax_of_magnitude(given) // given.shape[-1]
    picked = torch.randint(len(rows), (num_rows,), generator=generator)
    return rows[torch.cat([picked, torch.tensor([largest])])]


def _patches(module: nn.Conv2d, given: Tensor, num_rows: int, generator: torch.Generator) -> Tensor:
    sizes = [_out_size(module, axis, given.shape[axis + 2]) for axis in (0, 1)]
    strides, paddings, kernels = module.stride, _paddings(module), module.kernel_size
    places = [torch.randint(size, (num_rows,), generator=generator) for size in (len(given), *sizes)]
    image, rest = divmod(_argmax_of_magnitude(given), prod(given.shape[1:]))
    row, column = divmod(rest % prod(given.shape[2:]), given.shape[3])
    corners = [
        min(max((at + padding) // stride, 0), size - 1)
        for at, padding, stride, size in zip((row, column), paddings, strides, sizes, strict=True)
    ]
    batch, rows, columns = (
        torch.cat([place, torch.tensor([found])]) for place, found in zip(places, (image, *corners), strict=True)
    )
    at_rows = (rows * strides[0] - paddings[0])[:, None] + torch.arange(kernels[0]) * module.dilation[0]
    at_columns = (columns * strides[1] - paddings[1])[:, None] + torch.arange(kernels[1]) * module.dilation[1]
    inside_rows, inside_columns = (
        (at >= 0) & (at < size) for at, size in ((at_rows, given.shape[2]), (at_columns, given.shape[3]))
    )
    inside = inside_rows[:, :, None] & inside_columns[:, None, :]
    at_rows, at_columns = at_rows.clamp(0, given.shape[2] - 1), at_columns.clamp(0, given.shape[3] - 1)
    patches = given[batch[:, None, None], :, at_rows[:, :, None], at_columns[:, None, :]]  # [N, kh, kw, C]
    return (patches * inside[..., None]).permute(0, 3, 1, 2).reshape(len(batch), -1)


def _paddings(module: nn.Conv2d) -> tuple[int, int]:
    assert not isinstance(module.padding, str) and module.padding_mode == "zeros" and module.groups == 1, module
    return module.padding[0], module.padding[1]


def _out_size(module: nn.Conv2d, axis: int, size: int) -> int:
    reach = module.dilation[axis] * (module.kernel_size[axis] - 1) + 1
    return (size + 2 * _paddings(module)[axis] - reach) // module.stride[axis] + 1


def _argmax_of_magnitude(given: Tensor) -> int:
    """Of the flattened tensor, without a copy of it."""
    flat = given.reshape(-1)
    low, high = int(flat.argmin()), int(flat.argmax())
    return low if -flat[low] > flat[high] else high


def _over_channels(given: Tensor, channel: int, extreme: str) -> Tensor:
    return getattr(given, extreme)(dim=tuple(axis for axis in range(given.ndim) if axis != channel))

"""What a piece of a network costs, measured on meta tensors: nothing is computed and nothing allocated.

FLOPs are torch's FlopCounterMode's: two per multiply-add of matrix products, convolutions and attention, forward and
backward; everything elementwise is left out. Memory is what the forward pass keeps for the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

_LOWERED = {
    torch.conv1d, torch.conv2d, torch.conv3d, functional.linear, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__,
    torch.mm, torch.bmm, torch.baddbmm, torch.addmm,
}  # fmt: skip
_RAISED = {functional.group_norm, functional.layer_norm, functional.softmax, torch.softmax, functional.smooth_l1_loss}


class AcceleratorRules(TorchFunctionMode):
    """On meta tensors, what CUDA does: autocast's number types, and attention that keeps no attention matrix.

    torch refuses autocast for the meta device and sends its attention down the plain path. The two lists are the part of
    "CUDA Ops that can autocast" (PyTorch's page on automatic mixed precision) that SDXL's networks call.
    """

    def __init__(self, lowered: torch.dtype | None) -> None:
        """
        Args:
            lowered: autocast's number type; None for no autocast.
        """
        super().__init__()
        self.lowered = lowered
        self._copies: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is functional.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        if self.lowered is not None and (func in _LOWERED or func in _RAISED):
            dtype = self.lowered if func in _LOWERED else torch.float32
            args = tuple(self._cast(value, dtype) for value in args)
            kwargs = {name: self._cast(value, dtype) for name, value in kwargs.items()}
        return func(*args, **kwargs)

    def _attention(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        """FlashAttention; a mask changes neither its FLOPs as they are counted nor what it keeps."""
        cast = [self._cast(x, self.lowered or x.dtype) for x in (query, key, value)]
        output: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(*cast, 0.0, False)[0]
        return output

    def _cast(self, value: Any, dtype: torch.dtype) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype == dtype:
            return value
        if not isinstance(value, nn.Parameter) or dtype != self.lowered:
            return value.to(dtype)
        if id(value) not in self._copies:  # autocast casts a weight once, and keeps the copy until it ends
            self._copies[id(value)] = value, value.to(dtype)
        return self._copies[id(value)][1]


class Meter:
    """Counts while it is entered; entered again, it goes on counting.

    Call the backward pass on what a metered forward pass gave; the parts that gradient checkpointing would compute again
    are not computed again but noted, by `unit` or `units`.
    """

    def __init__(self, *modules: nn.Module, lowered: torch.dtype | None) -> None:
        """
        Args:
            modules: whose own weights do not count as kept.
            lowered: autocast's number type; None for no autocast.
        """
        self.flops = 0
        self.kept_bytes = 0
        """What the graph of everything so far holds on to, each piece of memory once."""
        self.unit_flops = 0
        """FLOPs of all units: what gradient checkpointing computes a second time."""
        self.largest_unit_bytes = 0
        """The most that one unit keeps: what checkpointing needs beside the units' inputs."""
        self._rules = AcceleratorRules(lowered)
        self._own = {_identity(t) for m in modules for t in (*m.parameters(), *m.buffers())}
        self._kept: list[torch.UntypedStorage] = []

    def __enter__(self) -> Meter:
        self._counter = FlopCounterMode(display=False)
        self._entered = ExitStack()
        self._entered.enter_context(torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor))
        self._entered.enter_context(self._rules)
        self._entered.enter_context(self._counter)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._entered.close()
        self.flops += self._counter.get_total_flops()

    def unit(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call a unit; what diffusers takes as `gradient_checkpointing_func`."""
        kept, flops = self.kept_bytes, self._counter.get_total_flops()
        result = function(*args)
        self.largest_unit_bytes = max(self.largest_unit_bytes, self.kept_bytes - kept)
        self.unit_flops += self._counter.get_total_flops() - flops
        return result

    @contextmanager
    def units(self, modules: Sequence[nn.Module]) -> Iterator[None]:
        """Make every call of these modules a unit, until left."""
        for module in modules:
            module.forward = _as_unit(self, module.forward)
        try:
            yield
        finally:
            for module in modules:
                del module.forward  # the class's own again

    def _keep(self, tensor: Tensor) -> Tensor:
        if _identity(tensor) not in self._own:
            self._own.add(_identity(tensor))
            self._kept.append(tensor.untyped_storage())  # held, so that its identity stays its own
            self.kept_bytes += tensor.untyped_storage().nbytes()
        return tensor


def _as_unit(meter: Meter, forward: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: meter.unit(partial(forward, **kwargs), *args)


def _identity(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata

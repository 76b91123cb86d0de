"""Tensors that are spread over processes (DTensors), on their way to a checkpoint and back."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(tensor: Tensor) -> Tensor:
    """The tensor with all its elements: itself, or its shards put together, for which every process has to call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def laid_out_like(reference: Tensor, tensor: Tensor) -> Tensor:
    """`tensor`, of the reference's shape, on its device and in its memory layout, or as its shards.

    Every process has to hold the same tensor: each cuts out its own shard, and nothing is sent.
    """
    if isinstance(reference, DTensor):
        here = tensor.to(reference.device)
        return distribute_tensor(here, reference.device_mesh, reference.placements, src_data_rank=None)
    return torch.empty_like(reference).copy_(tensor)


def skeleton(module: nn.Module) -> nn.Module:
    """A copy without memory: its parameters and buffers are on the meta device."""
    tensors: list[Tensor] = [*module.parameters(), *module.buffers()]
    memo = {id(tensor): _without_memory(tensor) for tensor in tensors}
    return copy.deepcopy(module, memo)


def _without_memory(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="meta", memory_format=torch.contiguous_format)
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty

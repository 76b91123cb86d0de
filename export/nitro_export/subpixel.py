"""A doubling by nearest neighbours and the 3x3 convolution behind it as one convolution of the small image.

Of the nine pixels under such a kernel, those that were doubled from one place hold the same number, so their weights can be
added up beforehand: four places remain. Each place of a 2x2 kernel gives the four pixels between its places at once, which
are then put side by side (Shi et al. 2016, arXiv 1609.05158). 4 of 9 multiplications remain, and the doubled image is
never made; SDXL's decoder spends 27 % of its multiplications behind its three doublings.

Shapes: B batch, C and O channels, H and W pixels before the doubling.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from itertools import pairwise

import torch
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from nitro_export.stored import StoredTensor

PLACES = torch.tensor([[[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]], [[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]]])
"""[2, 2, 3] along one axis: of the pixel with the odd index, then of the even one after it, which of the two places in the
window each of the kernel's three weights meets."""


class SubpixelConv2d(nn.Conv2d):
    """[B, C, H, W] to [B, O, 2H, 2W]; its weights are those of the 3x3 convolution, folded."""

    def __init__(self, conv: nn.Conv2d) -> None:
        """Args: conv: a 3x3 convolution of the doubled image; its weights are not taken over."""
        shape = (conv.in_channels, 4 * conv.out_channels)
        like = conv.weight
        super().__init__(*shape, 2, padding=1, bias=conv.bias is not None, device=like.device, dtype=like.dtype)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (torch's name)
        # A window lies between pixels, so the outermost ones give a rim that the doubled image has not.
        return nn.functional.pixel_shuffle(super().forward(input), 2)[:, :, 1:-1, 1:-1]


def fold_doublings(network: nn.Module, stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Exchange each 3x3 convolution of a doubled image in `network`, and say how its weights come from those stored.

    Args:
        network: diffusers' decoder of a VAE; its convolutions keep their names.
        stored: where each of its parameters is.
    Returns: `stored`, with what changed.
    """
    changed = dict(stored)
    for name, holder, key in list(_convolutions(network)):
        conv = getattr(holder, key)
        setattr(holder, key, SubpixelConv2d(conv))
        path = f"{name}.{key}" if name else key
        changed[f"{path}.weight"] = dataclasses.replace(stored[f"{path}.weight"], folded=folded_weight)
        if conv.bias is not None:
            changed[f"{path}.bias"] = dataclasses.replace(stored[f"{path}.bias"], folded=folded_bias)
    return changed


def folded_weight(weight: Tensor) -> Tensor:
    """[O, C, 3, 3] to [4 O, C, 2, 2] float32."""
    folded = torch.einsum("apk,bql,ockl->oabcpq", PLACES, PLACES, weight.float())
    return folded.reshape(-1, weight.shape[1], 2, 2)


def folded_bias(bias: Tensor) -> Tensor:
    """[O] to [4 O] float32: `pixel_shuffle` takes four channels in a row for one."""
    return bias.float().repeat_interleave(4)


def _convolutions(network: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Every 3x3 convolution behind a doubling, which is turned off: the module that has it, by name, and its key there."""
    for name, module in network.named_modules():
        if isinstance(module, Upsample2D):
            if module.interpolate and _is_3x3(getattr(module, "conv", None)):
                module.interpolate = False
                yield name, module, "conv"
        elif isinstance(module, nn.Sequential):
            for (key, first), (next_key, second) in pairwise(list(module.named_children())):
                if isinstance(first, nn.Upsample) and first.scale_factor == 2 and first.mode == "nearest" and _is_3x3(second):
                    setattr(module, key, nn.Identity())
                    yield name, module, next_key


def _is_3x3(module: nn.Module | None) -> bool:
    return (
        isinstance(module, nn.Conv2d)
        and (module.kernel_size, module.padding, module.padding_mode) == ((3, 3), (1, 1), "zeros")
        and (module.stride, module.dilation, module.groups) == ((1, 1), (1, 1), 1)
    )

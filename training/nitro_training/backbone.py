"""The discriminator's frozen eyes: the encoder and mid-block of a pretrained UNet, with a feature at every skip level."""

from __future__ import annotations

import copy
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nitro_rt.errors import ConfigError
from nitro_training.model import LATENT_PX


class UNetFeatures(nn.Module):
    """A UNet without its decoder.

    The features are every skip tensor (conv_in, each residual layer, each downsampler) and the mid-block's output: ten in
    SDXL's topology. Parameters are frozen; gradients flow through to the latents.
    Source: arXiv:2412.02030, section 3.2; the list of tensors as in DMD2's classifier (arXiv:2405.14867).
    """

    def __init__(self, unet: UNet2DConditionModel, *, recompute: bool = False) -> None:
        """
        Args:
            unet: copied without its decoder; the caller's own stays whole and is not kept.
            recompute: run the blocks again in the backward pass instead of keeping their activations.
        Raises: ConfigError if the UNet is not conditioned as SDXL's (text_time).
        """
        super().__init__()
        if unet.config.addition_embed_type != "text_time":
            raise ConfigError(
                "the discriminator's backbone must be an SDXL-style UNet (addition_embed_type text_time), found "
                f"{unet.config.addition_embed_type!r}"
            )
        self.recompute = recompute
        decoder = unet.up_blocks, unet.conv_norm_out, unet.conv_out
        unet.up_blocks, unet.conv_norm_out, unet.conv_out = nn.ModuleList(), nn.Identity(), nn.Identity()
        try:
            kept = copy.deepcopy(unet)
        finally:
            unet.up_blocks, unet.conv_norm_out, unet.conv_out = decoder
        self.unet = kept.requires_grad_(False).eval()

    def channels(self) -> tuple[int, ...]:
        """The width of every feature, in order."""
        config = self.unet.config
        widths = [config.block_out_channels[0]]
        for level, width in enumerate(config.block_out_channels):
            last = level == len(config.block_out_channels) - 1
            widths += [width] * (config.layers_per_block + (0 if last else 1))
        return (*widths, config.block_out_channels[-1])

    def sides(self, latents: int) -> tuple[int, ...]:
        """The side of every feature for square latents of side `latents`, in order.

        Raises: ConfigError if the latents cannot be halved as often as the encoder does.
        """
        levels = len(self.unet.config.block_out_channels)
        if latents % 2 ** (levels - 1):
            raise ConfigError(f"latents of side {latents} cannot be halved {levels - 1} times by the discriminator's encoder")
        found = [latents]
        for level in range(levels):
            found += [latents] * self.unet.config.layers_per_block
            if level < levels - 1:
                latents //= 2
                found.append(latents)
        return (*found, latents)

    def forward(
        self, latents_B4hw: Tensor, times_B: Tensor, embeds_BTC: Tensor, pooled_BP: Tensor, time_ids_B6: Tensor
    ) -> tuple[Tensor, ...]:
        """The features of noisy latents at their noise level.

        Args:
            times_B: the noise level t* of every sample.
            time_ids_B6: SDXL's size conditioning in pixels (original size, crop offset, target size).
        Returns: [B, channels[i], ...] each, coarser with i.
        """
        unet = self.unet
        embedding = unet.time_embedding(unet.time_proj(times_B).to(latents_B4hw.dtype))
        sinusoids = unet.add_time_proj(time_ids_B6.flatten()).reshape(len(time_ids_B6), -1)
        added = torch.cat([pooled_BP.to(sinusoids.dtype), sinusoids], -1).to(latents_B4hw.dtype)
        embedding = embedding + unet.add_embedding(added)
        hidden = unet.conv_in(latents_B4hw)
        features = [hidden]
        for block in unet.down_blocks:
            hidden, skips = self._run(block, hidden, embedding, embeds_BTC)
            features += skips
        return (*features, self._run(unet.mid_block, hidden, embedding, embeds_BTC))

    def _run(self, block: nn.Module, hidden: Tensor, embedding: Tensor, embeds_BTC: Tensor) -> Any:
        arguments: dict[str, Any] = (
            {"encoder_hidden_states": embeds_BTC} if getattr(block, "has_cross_attention", False) else {}
        )
        if self.recompute and torch.is_grad_enabled() and hidden.requires_grad:
            return checkpoint(block, hidden, embedding, use_reentrant=False, **arguments)
        return block(hidden, embedding, **arguments)


def crop_time_ids(latents: int, corners_B2: Tensor, crop: int) -> Tensor:
    """SDXL's size conditioning of windows, [B, 6] float32 in pixels: the whole picture, the offset, the window's own size."""
    side, window = torch.full((len(corners_B2), 2), latents), torch.full((len(corners_B2), 2), crop)
    return torch.cat([side, corners_B2, window], dim=1).float() * LATENT_PX

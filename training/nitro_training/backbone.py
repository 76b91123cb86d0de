"""The discriminator's frozen eyes: the encoder and mid-block of a pretrained UNet, with a feature at every skip level."""

from __future__ import annotations

import copy

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from nitro_training.model import time_ids


class UNetFeatures(nn.Module):
    """A UNet without its decoder.

    The features are every skip tensor (conv_in, each residual layer, each downsampler) and the mid-block's output: ten in
    SDXL's topology. Parameters are frozen; gradients flow through to the latents.
    Source: arXiv:2412.02030, section 3.2; the list of tensors as in DMD2's classifier (arXiv:2405.14867).
    """

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        kept = copy.deepcopy(unet)
        kept.up_blocks = nn.ModuleList()
        kept.conv_norm_out = kept.conv_out = nn.Identity()
        self.unet = kept.requires_grad_(False).eval()

    def channels(self) -> tuple[int, ...]:
        """The width of every feature, in order."""
        config = self.unet.config
        widths = [config.block_out_channels[0]]
        for level, width in enumerate(config.block_out_channels):
            last = level == len(config.block_out_channels) - 1
            widths += [width] * (config.layers_per_block + (0 if last else 1))
        return (*widths, config.block_out_channels[-1])

    def forward(self, latents_B4hw: Tensor, times_B: Tensor, embeds_BTC: Tensor, pooled_BP: Tensor) -> tuple[Tensor, ...]:
        """The features of noisy latents at their noise level.

        Args:
            times_B: the noise level t* of every sample.
        Returns: [B, channels[i], ...] each, coarser with i.
        """
        unet = self.unet
        embedding = unet.time_embedding(unet.time_proj(times_B).to(latents_B4hw.dtype))
        ids = time_ids(len(latents_B4hw), latents_B4hw.shape[-1] * 8)
        sinusoids = unet.add_time_proj(ids.flatten()).reshape(len(ids), -1)
        embedding = embedding + unet.add_embedding(torch.cat([pooled_BP.float(), sinusoids], -1))
        hidden = unet.conv_in(latents_B4hw)
        features = [hidden]
        for block in unet.down_blocks:
            if getattr(block, "has_cross_attention", False):
                hidden, skips = block(hidden, temb=embedding, encoder_hidden_states=embeds_BTC)
            else:
                hidden, skips = block(hidden, temb=embedding)
            features += skips
        hidden = unet.mid_block(hidden, embedding, encoder_hidden_states=embeds_BTC)
        return (*features, hidden)

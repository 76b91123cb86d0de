"""Latents with their captions, in memory: what the teacher learns from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from nitro_training.emoji import EmojiDataset
from nitro_training.model import TextEncoders


@torch.no_grad()
def normalise(vae: AutoencoderKL, means_N4hw: Tensor) -> None:
    """Fold the latents' statistics into the VAE's 1x1 convolutions, so that every channel has mean 0 and deviation 1.

    With this the scaling factor stays 1 and no reader of the checkpoint has statistics to forget.
    """
    mean, deviation = means_N4hw.mean(dim=(0, 2, 3)), means_N4hw.std(dim=(0, 2, 3))
    encode, decode = vae.quant_conv, vae.post_quant_conv
    channels = len(mean)
    encode.bias[:channels].sub_(mean).div_(deviation)
    encode.weight[:channels].div_(deviation.view(-1, 1, 1, 1))
    encode.bias[channels:].sub_(2 * deviation.log())
    decode.bias.add_(decode.weight[:, :, 0, 0] @ mean)
    decode.weight.mul_(deviation.view(1, -1, 1, 1))


@dataclass(frozen=True)
class CaptionedLatents:
    """One split of the data set, encoded."""

    latents_N4hw: Tensor
    input_ids_MT: Tensor
    """Every distinct caption's token ids."""
    captions_of: list[Tensor]
    """Per image, the rows of its captions."""
    weights_N: Tensor
    """How often an image is drawn."""

    def draw(self, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """A random batch: latents [B, 4, h, w] and caption rows [B]."""
        index = torch.multinomial(self.weights_N, batch, replacement=True, generator=generator)
        return self.latents_N4hw[index], self.rows(index, generator)

    def rows(self, index_B: Tensor, generator: torch.Generator) -> Tensor:
        """One random caption row of each image."""
        picked = []
        for index in index_B.tolist():
            choices = self.captions_of[index]
            picked.append(choices[torch.randint(0, len(choices), (1,), generator=generator)])
        return torch.cat(picked)


def captioned_latents(
    dataset: EmojiDataset, latents_N4hw: Tensor, text: TextEncoders, *, recoloured_share: float
) -> CaptionedLatents:
    """The training split.

    Args:
        latents_N4hw: of every image of `dataset`, in its order.
        recoloured_share: how often a hue-shifted copy is drawn; there are more of them than originals, and they matter less.
    """
    kept = dataset.indices("train")
    rows: dict[str, int] = {}
    captions_of = []
    for index in kept:
        captions_of.append(torch.tensor([rows.setdefault(caption, len(rows)) for caption in dataset.records[index].captions]))
    recoloured = torch.tensor([dataset.records[index].recoloured for index in kept], dtype=torch.float64)
    num_recoloured = recoloured.sum().clamp(min=1)
    num_natural = (1 - recoloured).sum().clamp(min=1)
    weights = recoloured * recoloured_share / num_recoloured + (1 - recoloured) * (1 - recoloured_share) / num_natural
    return CaptionedLatents(latents_N4hw[kept], text.tokenize(list(rows)), captions_of, weights)

"""Normalised latents: the VAE draws the same pictures, and its latents have mean 0 and deviation 1."""

from __future__ import annotations

import torch

from nitro_training.autoencoder import AutoencoderConfig, build, encode_all, pixels_from_uint8
from nitro_training.latents import CaptionedLatents, normalise

CONFIG = AutoencoderConfig(channels=(8, 8, 16, 16), norm_groups=4)


def test_normalising_changes_the_latents_and_not_the_pictures() -> None:
    torch.manual_seed(0)
    vae = build(CONFIG, 32).eval()
    images = torch.randint(0, 256, (6, 32, 32, 3), dtype=torch.uint8)
    with torch.no_grad():
        before = vae.decode(vae.encode(pixels_from_uint8(images)).latent_dist.mean).sample
        normalise(vae, encode_all(vae, images))
        latents = encode_all(vae, images)
        after = vae.decode(latents / vae.config.scaling_factor).sample
    torch.testing.assert_close(latents.mean(dim=(0, 2, 3)), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(latents.std(dim=(0, 2, 3)), torch.ones(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)


def test_a_fresh_vae_already_has_the_scaling_factor_of_the_finished_one() -> None:
    """A resumed run loads normalised weights into a fresh VAE: its config must need no further change."""
    assert build(CONFIG, 32).config.scaling_factor == 1.0


def test_drawing_follows_the_weights_and_the_images_own_captions() -> None:
    data = CaptionedLatents(
        torch.arange(3.0).view(3, 1, 1, 1).expand(3, 4, 2, 2), torch.zeros(5, 77, dtype=torch.int64),
        [torch.tensor([0, 1]), torch.tensor([2]), torch.tensor([3, 4])], torch.tensor([0.5, 0.0, 0.5], dtype=torch.float64),
    )  # fmt: skip
    latents, rows = data.draw(64, torch.Generator().manual_seed(0))
    values = latents[:, 0, 0, 0].tolist()
    assert set(values) == {0.0, 2.0}, "an image of weight 0 is never drawn"
    assert all(row in ((0, 1) if value == 0 else (3, 4)) for value, row in zip(values, rows.tolist(), strict=True))

"""The judge of the evaluation: a small contrastive image-text encoder of the emoji domain, and the folder it ships in.

    encoder.safetensors     both towers, FP16
    reference.safetensors   mean and covariance of the real images' features, whole images and patches, FP32
    prompts.json            the (colour, concept) pairs, which are retrieval's candidates, and one caption of every image
    metric.json             shape, vocabulary, training, data digests, accuracy on real images, digests of the other files

With these four files a checkpoint is judged without the data set. The judge shares no weight and no feature with the
student's discriminator. Shapes: N images, H, W pixels, T words, P patches, D components of a feature.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file as load_arrays
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from nitro_rt.errors import ConfigError, ModelNotFound, ShapeError
from nitro_training import script
from nitro_training.captions import captions as captions_of
from nitro_training.emoji import EmojiDataset, file_sha256
from nitro_training.frechet import Moments

SCHEMA_VERSION = 1
FILES = ("encoder.safetensors", "reference.safetensors", "prompts.json")
PADDING = 0
NUM_PATCHES = 4
NUM_DETAILS = 3
SMALLEST_DETAIL = 0.002
"""Added before the logarithm, in units of [-1, 1]: a quarter of one grey level."""
DEFAULT_FOLDER = Path(__file__).resolve().parents[1] / "weights" / "nitro-emoji-metric"
"""Where a checkout of the repository has the shipped judge; a wheel has none."""


@dataclass(frozen=True, kw_only=True)
class MetricConfig:
    """Shape of the encoder."""

    size_px: int = 128
    """Side of the images; the image tower sees half of it: the whole image averaged over 2x2 pixels, or one quarter."""
    channels: tuple[int, ...] = (48, 96, 192)
    """Width of each level of the image tower; the first is a quarter of the view's side, every other half the one before."""
    blocks: tuple[int, ...] = (0, 1, 1)
    """Residual blocks of each level; on the fine maps they would cost most and tell least."""
    norm_groups: int = 8
    text_width: int = 96
    max_words: int = 16
    feature_dim: int = 64
    """Components that are compared with captions; few, because a covariance is taken from a few hundred images. An image's
    feature has D = feature_dim + 3: its `details` come after them."""

    def __post_init__(self) -> None:
        if len(self.blocks) != len(self.channels):
            raise ConfigError(f"blocks {list(self.blocks)} must have one number per level of channels {list(self.channels)}")
        halvings = len(self.channels) + 2
        if self.size_px % 2**halvings:
            raise ConfigError(f"size_px {self.size_px} cannot be halved {halvings} times, as {len(self.channels)} levels need")
        if any(width % self.norm_groups for width in self.channels):
            raise ConfigError(f"channels {list(self.channels)} must be multiples of norm_groups {self.norm_groups}")


class ResidualBlock(nn.Module):
    """Two normalised 3x3 convolutions beside the identity."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.GroupNorm(groups, width) for _ in range(2))
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(2))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y = x_BCHW
        for norm, conv in zip(self.norms, self.convs, strict=True):
            y = conv(functional.silu(norm(y)))
        return x_BCHW + y


class ImageTower(nn.Module):
    """[B, 3, S, S] in [-1, 1] to [B, feature_dim], S half the side of an image."""

    def __init__(self, config: MetricConfig) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        below = 3
        for width, num_blocks in zip(config.channels, config.blocks, strict=True):
            first = below == 3
            layers.append(nn.Conv2d(below, width, 8, stride=4, padding=2) if first else _halving(below, width))
            layers += [ResidualBlock(width, config.norm_groups) for _ in range(num_blocks)]
            layers += [nn.GroupNorm(config.norm_groups, width), nn.SiLU()]
            below = width
        self.layers = nn.Sequential(*layers)
        self.project = nn.Linear(config.channels[-1], config.feature_dim)

    def forward(self, x_B3SS: Tensor) -> Tensor:
        features: Tensor = self.project(self.layers(x_B3SS).mean((2, 3)))
        return features


def _halving(below: int, width: int) -> nn.Conv2d:
    return nn.Conv2d(below, width, 3, stride=2, padding=1)


class TextTower(nn.Module):
    """Word ids [B, T] to [B, feature_dim]: the mean of the words' vectors through a small network.

    Word order has no say. No two captions of the domain differ by it alone, and a colour that adds the same vector to
    every thing is what lets rare pairs be understood.
    """

    def __init__(self, config: MetricConfig, num_words: int) -> None:
        super().__init__()
        width = config.text_width
        self.words = nn.EmbeddingBag(num_words, width, mode="mean", padding_idx=PADDING)
        self.layers = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, config.feature_dim)
        )

    def forward(self, ids_BT: Tensor) -> Tensor:
        features: Tensor = self.layers(self.words(ids_BT))
        return features


class Encoder(nn.Module):
    """Both towers and the temperature of their comparison."""

    def __init__(self, config: MetricConfig, vocabulary: Sequence[str]) -> None:
        super().__init__()
        self.image = ImageTower(config)
        self.text = TextTower(config, len(vocabulary) + 1)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))


def pictures_sha256(dataset: EmojiDataset) -> dict[str, str]:
    """The digests that say which images and captions a judge was trained on; a data set may hold more than these."""
    digests = dataset.manifest["sha256"]
    assert isinstance(digests, dict)
    return {name: digests[name] for name in ("images.safetensors", "records.jsonl")}


def words_of(caption: str) -> list[str]:
    """The words of a caption, small and without punctuation: "A jack-o-lantern, flat style" -> a jack-o-lantern flat style."""
    return re.findall(r"[^\s,]+", caption.lower())


def word_ids(captions: Sequence[str], vocabulary: Sequence[str], max_words: int) -> Tensor:
    """[N, T] int64, padded.

    Raises: ConfigError for a word that the judge never saw: it would be judged by chance.
    """
    known = {word: index for index, word in enumerate(vocabulary, start=1)}
    rows = torch.full((len(captions), max_words), PADDING)
    for row, caption in zip(rows, captions, strict=True):
        words = words_of(caption)
        unknown = [word for word in words if word not in known]
        if unknown or len(words) > max_words:
            why = f"the words {', '.join(unknown)}" if unknown else f"captions of {len(words)} words"
            raise ConfigError(f"the metric does not know {why} (in {caption!r}); it judges the emoji domain's captions only")
        row[: len(words)] = torch.tensor([known[word] for word in words])
    return rows


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A (colour, concept) pair: one candidate of retrieval."""

    colour: str
    concept: str
    is_heldout: bool
    """Whether the models under test never saw it in training."""

    @property
    def prompt(self) -> str:
        """ "a <colour> <thing>"."""
        words = captions_of(self.concept, (), "any", self.colour, recoloured=True, is_default=True)
        return words[len(words) // 2 - 1]  # the last one that names no style


@dataclass(frozen=True)
class Metric:
    """The judge in memory."""

    config: MetricConfig
    vocabulary: tuple[str, ...]
    encoder: Encoder
    pairs: tuple[Pair, ...]
    captions: tuple[str, ...]
    """One caption of every real image: the prompts whose images are compared with the real ones."""
    reference: Moments
    """Of the real images."""
    patch_reference: Moments
    """Of their quarters."""
    manifest: dict[str, Any]

    @classmethod
    def load(cls, folder: Path = DEFAULT_FOLDER) -> Metric:
        """Read a folder and check its digests.

        Raises: ModelNotFound if there is none, ConfigError if it is damaged or of another version.
        """
        if not (folder / "metric.json").is_file():
            raise ModelNotFound(
                f"no metric encoder at {folder} (metric.json is missing); the repository has one in "
                "training/weights/nitro-emoji-metric, and `python -m nitro_training.metric --data DIR --out DIR` trains one: "
                "name its folder with --metric"
            )
        try:
            return cls._read(folder)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as exc:
            if isinstance(exc, ConfigError):
                raise
            raise ConfigError(f"the metric encoder at {folder} is damaged: {exc}; fetch or train it again") from exc

    @classmethod
    def _read(cls, folder: Path) -> Metric:
        manifest = json.loads((folder / "metric.json").read_text(encoding="utf-8"))
        if manifest["schema_version"] != SCHEMA_VERSION:
            raise ConfigError(f"{folder} has metric schema {manifest['schema_version']}, this version reads {SCHEMA_VERSION}")
        for name in FILES:
            if file_sha256(folder / name) != manifest["sha256"][name]:
                raise ConfigError(f"{folder / name} differs from its digest in metric.json; fetch or train the metric again")
        lists_as_tuples: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in manifest["config"].items()}
        config = MetricConfig(**lists_as_tuples)
        vocabulary = tuple(manifest["vocabulary"])
        with torch.device("meta"):  # draws no initial weights: the global generator stays as it is
            encoder = Encoder(config, vocabulary)
        weights = {key: value.float() for key, value in load_file(folder / "encoder.safetensors").items()}
        encoder.load_state_dict(weights, assign=True)
        prompts = json.loads((folder / "prompts.json").read_text(encoding="utf-8"))
        stored = {key: value.astype(np.float64) for key, value in load_arrays(folder / "reference.safetensors").items()}
        return cls(
            config,
            vocabulary,
            encoder.eval().requires_grad_(False),
            tuple(Pair(**pair) for pair in prompts["pairs"]),
            tuple(prompts["captions"]),
            Moments(stored["mean"], stored["covariance"]),
            Moments(stored["patch_mean"], stored["patch_covariance"]),
            manifest,
        )

    def image_features(self, images_NHW3: NDArray[np.uint8]) -> NDArray[np.float32]:
        """[N, D] of whole images, not normalised. Raises: ShapeError for images of another size than the judge's."""
        return self._features(images_NHW3, whole)

    def patch_features(self, images_NHW3: NDArray[np.uint8]) -> NDArray[np.float32]:
        """[N, P, D] of the four quarters of each image, at full resolution."""
        flat = self._features(images_NHW3, lambda pixels: quarters(pixels).flatten(0, 1))
        return flat.reshape(len(images_NHW3), NUM_PATCHES, -1)

    @torch.no_grad()
    def text_features(self, captions: Sequence[str]) -> NDArray[np.float32]:
        """[N, feature_dim], each of length 1."""
        ids = word_ids(captions, self.vocabulary, self.config.max_words)
        features: NDArray[np.float32] = functional.normalize(self.encoder.text(ids), dim=-1).numpy()
        return features

    @cached_property
    def candidates(self) -> NDArray[np.float32]:
        """[C, feature_dim]: the text features of every pair's prompt."""
        return self.text_features([pair.prompt for pair in self.pairs])

    def ranks(self, image_features_ND: NDArray[np.float32], targets_N: NDArray[np.int64]) -> NDArray[np.int64]:
        """[N]: the place of the right pair among all pairs, 0 being the best; equal scores count against it.

        Args:
            targets_N: the index of the right pair of each image.
        """
        candidates = self.candidates
        shown = image_features_ND[:, : candidates.shape[1]]  # its length would not change the order
        scores = shown @ candidates.T
        right = scores[np.arange(len(scores)), targets_N]
        return (scores >= right[:, None]).sum(1) - 1

    @torch.no_grad()
    def _features(self, images_NHW3: NDArray[np.uint8], view: Callable[[Tensor], Tensor]) -> NDArray[np.float32]:
        side = self.config.size_px
        if images_NHW3.dtype != np.uint8 or images_NHW3.ndim != 4 or images_NHW3.shape[1:] != (side, side, 3):
            raise ShapeError(
                f"the metric judges uint8 images [N, {side}, {side}, 3], got {images_NHW3.dtype} {list(images_NHW3.shape)}"
            )
        chunks = torch.from_numpy(np.ascontiguousarray(images_NHW3)).split(64)
        return torch.cat([self._feature(view(pixels_from_uint8(chunk))) for chunk in chunks]).numpy()

    def _feature(self, view_B3SS: Tensor) -> Tensor:
        return torch.cat([self.encoder.image(view_B3SS), details(view_B3SS)], dim=-1)


def pixels_from_uint8(images_NHW3: Tensor) -> Tensor:
    """[N, H, W, 3] uint8 to [N, 3, H, W] in [-1, 1]."""
    return images_NHW3.permute(0, 3, 1, 2).float().div(127.5).sub(1.0)


def details(view_B3SS: Tensor) -> Tensor:
    """How much there is of details of one, two and four pixels: [B, 3], the log of the mean size of each band of a Laplacian
    pyramid of the grey picture.

    The encoder is trained to see the same thing in a sharp and in a blurred picture, so in its features alone the Frechet
    distance would hardly see blur or noise: the first falls, the second rises here.
    Source: Burt & Adelson 1983, "The Laplacian pyramid as a compact image code".
    """
    grey = view_B3SS.mean(1, keepdim=True)
    bands = []
    for _ in range(NUM_DETAILS):
        low = blurred(grey)
        bands.append((grey - low).abs().mean((1, 2, 3)))
        grey = functional.avg_pool2d(low, 2)
    return (torch.stack(bands, dim=-1) + SMALLEST_DETAIL).log()


def blurred(pixels_BCHW: Tensor) -> Tensor:
    """Each pixel averaged with its neighbours by the weights 1-4-6-4-1 both ways: a deviation of one pixel."""
    x = functional.pad(pixels_BCHW, (2, 2, 2, 2), mode="replicate")
    x = (x[..., :-4] + x[..., 4:] + 4 * (x[..., 1:-3] + x[..., 3:-1]) + 6 * x[..., 2:-2]) / 16
    x = x.transpose(-1, -2)
    x = (x[..., :-4] + x[..., 4:] + 4 * (x[..., 1:-3] + x[..., 3:-1]) + 6 * x[..., 2:-2]) / 16
    return x.transpose(-1, -2)


def whole(pixels_N3HW: Tensor) -> Tensor:
    """The whole image at half its resolution, [N, 3, H/2, W/2]."""
    return functional.avg_pool2d(pixels_N3HW, 2)


def quarters(pixels_N3HW: Tensor) -> Tensor:
    """The four quarters at full resolution, [N, P, 3, H/2, W/2]."""
    halves = [part for band in pixels_N3HW.chunk(2, dim=2) for part in band.chunk(2, dim=3)]
    return torch.stack(halves, dim=1)


def main() -> None:
    """`python -m nitro_training.metric`: train the judge of the evaluation on a data set."""
    import argparse

    from nitro_training.contrastive import ContrastiveConfig, train_metric

    parser = argparse.ArgumentParser(prog="python -m nitro_training.metric", description=main.__doc__)
    parser.add_argument("--data", type=Path, required=True, help="the data set's folder")
    parser.add_argument("--out", type=Path, required=True, help="the metric's folder; must not be there yet")
    parser.add_argument("--steps", type=int, default=ContrastiveConfig.num_steps, help="optimiser steps (%(default)s)")
    parser.add_argument("--audit", action="store_true", help="keep the held-out pairs out, to see what it knows without them")
    options = parser.parse_args()
    config = ContrastiveConfig(num_steps=options.steps, with_heldout=not options.audit)
    accuracy = train_metric(config, options.data, options.out, report=lambda line: print(line, flush=True))
    for name, found in accuracy.items():
        print(f"{name}: top-1 {found['top1']:.1%}, top-5 {found['top5']:.1%} of {found['num_images']} images")
    print(options.out)


if __name__ == "__main__":
    script.run(main)

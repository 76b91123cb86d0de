"""Training of the judge in `metric.py`: images and captions that belong together are pulled together, all others apart.

Every image is shown degraded at random (moved, cropped, blurred, mottled as a small VAE mottles, noisy), because what the
judge will see are decoded latents, never clean renders.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from nitro_rt.errors import ConfigError, TrainingError
from nitro_training.emoji import EmojiDataset, Record, file_sha256
from nitro_training.frechet import Moments, moments
from nitro_training.loop import learning_rate, set_learning_rate
from nitro_training.metric import (
    FILES,
    SCHEMA_VERSION,
    Encoder,
    Metric,
    MetricConfig,
    Pair,
    blurred,
    pictures_sha256,
    pixels_from_uint8,
    whole,
    word_ids,
    words_of,
)

Accuracy = dict[str, dict[str, float]]
MAX_LOG_SCALE = 4.6
"""The logits' scale stays below 100, as in CLIP."""
REPORT_EVERY = 100


@dataclass(frozen=True, kw_only=True)
class ContrastiveConfig:
    """How the judge is trained."""

    num_steps: int = 2000
    batch: int = 64
    peak_lr: float = 2e-3
    warmup_steps: int = 50
    weight_decay: float = 0.05
    patch_share: float = 0.2
    """Share of images shown as a window of a quarter of their area, at full resolution: the view of the patch distance."""
    shift_px: int = 6
    max_noise: float = 0.06
    """Largest deviation of the pixel noise, in units of [-1, 1]."""
    max_mottle: float = 0.25
    """Largest deviation of the smooth colour errors."""
    with_heldout: bool = True
    """Also train on the pairs kept from the models under test: a judge should know what it is asked about."""
    seed: int = 71

    def __post_init__(self) -> None:
        if self.num_steps < 1 or self.batch < 2:
            raise ConfigError(f"training needs a step and two images a batch, got {self.num_steps} and {self.batch}")


def train_metric(
    config: ContrastiveConfig,
    data: Path,
    out: Path,
    *,
    shape: MetricConfig | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> Accuracy:
    """Train the judge on a data set and publish its folder by one rename; deterministic on one machine and thread count.

    Args:
        shape: of the encoder; by default `MetricConfig` with the data set's size.
    Returns: its accuracy on the real images.
    Raises: ConfigError for a wrong data set or an `out` that is there already, TrainingError if `out` cannot be written.
    """
    if out.exists():
        raise ConfigError(f"{out} is there already; remove it or name another --out")
    dataset = EmojiDataset.load(data)
    side = dataset.images_NHW3.shape[1]
    shape = replace(shape or MetricConfig(), size_px=side)
    said = {caption for record in dataset.records for caption in judged_captions(record)}
    vocabulary = sorted({word for caption in said for word in words_of(caption)})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        encoder = Encoder(shape, vocabulary)
    kept = [i for i, record in enumerate(dataset.records) if config.with_heldout or record.split == "train"]
    images, records = torch.from_numpy(dataset.images_NHW3[kept]), [dataset.records[i] for i in kept]
    fit(encoder, config, shape, images, records, vocabulary, report)
    partial = out.parent / f".{out.name}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        accuracy = write(partial, encoder, config, shape, vocabulary, dataset)
        os.replace(partial, out)
    except OSError as exc:
        raise TrainingError(f"cannot write the metric to {out}: {exc}") from exc
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return accuracy


def judged_captions(record: Record) -> list[str]:
    """The captions that are true of an image: its own, and the same without the style, which prompts leave out."""
    plain = [caption.removesuffix(f", {record.style} style") for caption in record.captions]
    return list(dict.fromkeys([*record.captions, *plain]))


def fit(
    encoder: Encoder,
    config: ContrastiveConfig,
    shape: MetricConfig,
    images_NHW3: Tensor,
    records: Sequence[Record],
    vocabulary: Sequence[str],
    report: Callable[[str], None],
) -> None:
    """Train `encoder` in place."""
    captions = [judged_captions(record) for record in records]
    distinct = {caption: row for row, caption in enumerate(dict.fromkeys(c for words in captions for c in words))}
    ids_MT = word_ids(list(distinct), vocabulary, shape.max_words)
    rows = [torch.tensor([distinct[caption] for caption in words]) for words in captions]
    true_of = [set(row.tolist()) for row in rows]
    pairs = pairs_of(records)
    pair_ids = word_ids([pair.prompt for pair in pairs], vocabulary, shape.max_words)
    pair_N = torch.from_numpy(pair_of_each(records, pairs))
    encoder.train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(encoder.parameters(), betas=(0.9, 0.98), weight_decay=config.weight_decay)
    generator = torch.Generator().manual_seed(config.seed)
    sums = [0.0, 0.0]
    for step in range(config.num_steps):
        rate = learning_rate(step, peak=config.peak_lr, num_steps=config.num_steps, warmup_steps=config.warmup_steps)
        set_learning_rate(optimizer, rate)
        index = torch.randint(0, len(rows), (config.batch,), generator=generator).tolist()
        row = [int(rows[i][torch.randint(0, len(rows[i]), (1,), generator=generator)]) for i in index]
        views = degrade(pixels_from_uint8(images_NHW3[index]), config, generator)
        with torch.autocast("cpu", torch.bfloat16):
            seen = encoder.image(views.contiguous(memory_format=torch.channels_last)).float()
        also_true = torch.tensor([[r in true_of[i] for r in row] for i in index])
        contrast = info_nce(seen, encoder.text(ids_MT[row]), encoder.log_scale, also_true)
        retrieval = retrieval_loss(seen, encoder.text(pair_ids), encoder.log_scale, pair_N[index])
        optimizer.zero_grad(set_to_none=True)
        (contrast + retrieval).backward()
        nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            encoder.log_scale.clamp_(max=MAX_LOG_SCALE)
        sums = [total + loss.item() for total, loss in zip(sums, (contrast, retrieval), strict=True)]
        if (step + 1) % REPORT_EVERY == 0:
            means = [value / REPORT_EVERY for value in sums]
            losses = f"contrast {means[0]:.3f}, retrieval {means[1]:.3f}"
            report(f"metric: {step + 1} of {config.num_steps}, {losses}")
            sums = [0.0, 0.0]
    encoder.eval().requires_grad_(False)


def info_nce(images_BD: Tensor, texts_BD: Tensor, log_scale: Tensor, also_true_BB: Tensor) -> Tensor:
    """The symmetric contrastive loss, a float32 scalar; row i of both belongs together.

    Args:
        also_true_BB: [image, caption] whether the caption is true of the image; such captions are no counter-examples.
    Source: Radford et al. 2021, "Learning transferable visual models from natural language supervision", arXiv:2103.00020.
    """
    own = torch.eye(len(images_BD), dtype=torch.bool)
    cosine = functional.normalize(images_BD, dim=-1) @ functional.normalize(texts_BD, dim=-1).T
    logits = (cosine * log_scale.exp()).masked_fill(also_true_BB & ~own, float("-inf"))
    target = torch.arange(len(images_BD))
    return (functional.cross_entropy(logits, target) + functional.cross_entropy(logits.T, target)) / 2


def retrieval_loss(images_BD: Tensor, pairs_CD: Tensor, log_scale: Tensor, pair_B: Tensor) -> Tensor:
    """Cross-entropy of the right pair among all pairs, a float32 scalar: what the judge will be asked.

    A batch of captions alone seldom holds the near misses, the same thing in another colour or the like thing in the same.

    Args:
        pair_B: index of the right pair; -1 for an image without one colour, which has no say.
    """
    logits = functional.normalize(images_BD, dim=-1) @ functional.normalize(pairs_CD, dim=-1).T * log_scale.exp()
    return functional.cross_entropy(logits, pair_B, ignore_index=-1, reduction="sum") / (pair_B >= 0).sum().clamp(min=1)


def degrade(pixels_B3HW: Tensor, config: ContrastiveConfig, generator: torch.Generator) -> Tensor:
    """Half-size views [B, 3, H/2, W/2] of randomly degraded images."""
    batch, _, side, _ = pixels_B3HW.shape
    half = side // 2
    blur, mottle, noise, contrast, brightness = torch.rand(5, batch, 1, 1, 1, generator=generator)
    x = moved(whole(pixels_B3HW), config.shift_px // 2, half, generator)
    is_patch = torch.rand(batch, generator=generator) < config.patch_share
    x[is_patch] = moved(pixels_B3HW[is_patch], config.shift_px, half, generator)
    for _ in range(2):
        x = torch.lerp(x, blurred(x), blur)
    # A small VAE keeps the white ground and errs in the icon: smoothly in place, and in the colour of the whole.
    ink = (1 - x.amin(1, keepdim=True)).clamp(max=1)
    coarse = torch.randn(batch, 3, half // 4, half // 4, generator=generator)
    coarse = coarse + 0.5 * torch.randn(batch, 3, 1, 1, generator=generator)
    x = x + config.max_mottle * mottle * ink * functional.interpolate(coarse, size=(half, half), mode="bilinear")
    x = x + config.max_noise * noise * torch.randn(x.shape, generator=generator)
    x = x * (1 - 0.1 * contrast) + 0.1 * (brightness - 0.5)
    return x.clamp(-1, 1)


def moved(pixels_B3HW: Tensor, border_px: int, side_px: int, generator: torch.Generator) -> Tensor:
    """A random window of `side_px` of each image, which has a white border of `border_px` added; [B, 3, side, side]."""
    padded = functional.pad(pixels_B3HW, (border_px,) * 4, value=1.0)
    room = padded.shape[-1] - side_px + 1
    corners = torch.randint(0, room, (len(padded), 2), generator=generator).tolist()
    windows = padded.new_empty(len(padded), 3, side_px, side_px)
    for window, image, (top, left) in zip(windows, padded, corners, strict=True):
        window.copy_(image[:, top : top + side_px, left : left + side_px])
    return windows


def write(
    folder: Path, encoder: Encoder, config: ContrastiveConfig, shape: MetricConfig, vocabulary: list[str], dataset: EmojiDataset
) -> Accuracy:
    """The four files of `metric.py`. The statistics and accuracies are those of the FP16 weights as they are shipped."""
    half = {key: value.half().contiguous() for key, value in encoder.state_dict().items()}
    save_file(half, folder / "encoder.safetensors")
    encoder.load_state_dict({key: value.float() for key, value in half.items()})
    pairs = pairs_of(dataset.records)
    shown = captions_shown(dataset, config.seed)
    prompts = {"pairs": [asdict(pair) for pair in pairs], "captions": shown}
    (folder / "prompts.json").write_text(json.dumps(prompts, indent=0, ensure_ascii=False) + "\n", encoding="utf-8")
    nothing = Moments(np.zeros(0), np.zeros((0, 0)))
    judge = Metric(shape, tuple(vocabulary), encoder, tuple(pairs), tuple(shown), nothing, nothing, {})
    features = judge.image_features(dataset.images_NHW3)
    images, patches = moments(features[:, None]), moments(judge.patch_features(dataset.images_NHW3))
    reference = {"mean": images.mean_D, "covariance": images.covariance_DD}
    reference |= {"patch_mean": patches.mean_D, "patch_covariance": patches.covariance_DD}
    save_arrays({key: value.astype(np.float32) for key, value in reference.items()}, folder / "reference.safetensors")
    accuracy = accuracy_on(judge, dataset)
    manifest: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "name": "nitro-emoji-metric",
        "licence": "Apache-2.0",
        "config": asdict(shape),
        "training": asdict(config),
        "num_parameters": sum(parameter.numel() for parameter in encoder.parameters()),
        "num_images": len(dataset.records),
        "data_sha256": pictures_sha256(dataset),
        "accuracy_on_real_images": accuracy,
        "versions": {name: metadata.version(name) for name in ("torch", "numpy", "safetensors")},
        "python": platform.python_version(),
        "num_threads": torch.get_num_threads(),
        "sha256": {name: file_sha256(folder / name) for name in FILES},
        "vocabulary": vocabulary,
    }
    (folder / "metric.json").write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return accuracy


def pairs_of(records: Sequence[Record]) -> list[Pair]:
    """Every (colour, concept) that a picture shows, sorted."""
    split = {(record.colour, record.concept): record.split for record in records if record.colour is not None}
    keys = sorted(split)
    return [Pair(colour=colour, concept=concept, is_heldout=split[colour, concept] == "heldout") for colour, concept in keys]


def pair_of_each(records: Sequence[Record], pairs: Sequence[Pair]) -> NDArray[np.int64]:
    """[N]: the index of each image's pair, -1 for an image without one colour."""
    index_of: dict[tuple[str | None, str], int] = {(pair.colour, pair.concept): index for index, pair in enumerate(pairs)}
    return np.array([index_of.get((record.colour, record.concept), -1) for record in records], dtype=np.int64)


def captions_shown(dataset: EmojiDataset, seed: int) -> list[str]:
    """One caption of every image, drawn with `seed`."""
    generator = np.random.default_rng(seed)
    return [record.captions[generator.integers(len(record.captions))] for record in dataset.records]


def accuracy_on(judge: Metric, dataset: EmojiDataset) -> Accuracy:
    """Retrieval of the right pair of real images that have one colour: of all, of those of held-out pairs, and blurred."""
    pair_N = pair_of_each(dataset.records, judge.pairs)
    coloured = np.flatnonzero(pair_N >= 0)
    heldout = [i for i in coloured if dataset.records[i].split == "heldout"]
    found: Accuracy = {}
    for name, kept, is_blurred in (("all", coloured, False), ("heldout", heldout, False), ("heldout, blurred", heldout, True)):
        if len(kept):
            images = dataset.images_NHW3[kept]
            ranks = judge.ranks(judge.image_features(soft(images) if is_blurred else images), pair_N[kept])
            found[name] = {"top1": float((ranks < 1).mean()), "top5": float((ranks < 5).mean()), "num_images": len(kept)}
    return found


def soft(images_NHW3: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Images blurred by one pixel, which is less than a small VAE does to them."""
    pixels = blurred(pixels_from_uint8(torch.from_numpy(images_NHW3)))
    softened: NDArray[np.uint8] = ((pixels + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return softened

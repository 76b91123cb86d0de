"""In-domain scores of a checkpoint, per step count, beside its teacher, with bootstrap intervals.

Two kinds of prompts, half of the images each:

* *pairs*, "a <colour> <thing>" for the pairs that training never saw: is the right pair found among all pairs
  (retrieval), and does the colour asked for dominate the picture (colour)?
* *captions* of real images: how far is the cloud of their features from the real images' (Frechet distance, of whole
  images and of quarters), and from the teacher's?

All of it is in-domain: the features are those of the judge in `metric.py`, trained on the emoji data set. The distance is
no FID and the retrieval no CLIP score. Definitions: docs/evaluation.md.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nitro_rt.bundle import Bundle, open_bundle
from nitro_rt.errors import ConfigError, EngineMismatch, ModelNotFound, ShapeError
from nitro_rt.executor import open_executor
from nitro_rt.manifest import BUNDLE_FILE
from nitro_rt.references import with_steps
from nitro_rt.schedule import MAX_STEPS
from nitro_rt.tokenizer import Tokenizer
from nitro_training import bootstrap, colours, frechet
from nitro_training.bootstrap import Array, Interval
from nitro_training.emoji import EmojiDataset, file_sha256
from nitro_training.generator import draw_student
from nitro_training.metric import DEFAULT_FOLDER, Metric, pictures_sha256
from nitro_training.samplers import sample
from nitro_training.sheet import Checkpoint, pixels

SCHEMA_VERSION = 1
NUM_IMAGES = 640
NUM_RESAMPLES = 1000
BATCH = 32
TEACHER_STEPS, TEACHER_GUIDANCE = 25, 3.0
BACKGROUND = 0.92
"""A pixel whose every channel is at least this bright is background (icons stand on white), and has no say in the colour."""
DISTANCES = ("frechet", "patch_frechet", "frechet_to_teacher", "patch_frechet_to_teacher")
"""The scores that are better when lower."""

Images = NDArray[np.uint8]
Report = Callable[[str, int, int, dict[str, float]], None]
"""Called with (column, images done, images in all, {})."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What one image is asked to show."""

    text: str
    pair: int | None = None
    """Index in `Metric.pairs`, of a prompt that is judged by retrieval and colour."""
    caption: int | None = None
    """Index in `Metric.captions`, of a prompt that is judged by the Frechet distances."""


@dataclass(frozen=True)
class Scores:
    """What the judge says of one set of images, image by image, in the order of the prompts."""

    pairs_N: NDArray[np.int64]
    ranks_N: NDArray[np.int64]
    """Place of the right pair among all pairs, 0 the best."""
    is_right_colour_N: NDArray[np.bool_]
    features_MD: NDArray[np.float32]
    patches_MPD: NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One column of images: a step count, the teacher, or real images."""

    name: str
    kind: str
    """student, teacher or real."""
    num_steps: int | None
    scores: dict[str, Interval]
    ratios_to_teacher: dict[str, Interval | None] = field(default_factory=dict)
    """Paired by prompt; None where the teacher's score is 0."""
    changes: dict[str, Interval] = field(default_factory=dict)
    """Difference to the fewest steps, paired by prompt."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The result of `evaluate`; `as_dict` is its JSON."""

    checkpoint: str
    """Folder of the student: a checkpoint or a bundle."""
    unet_sha256: str | None
    """Of a checkpoint's UNet; None for a bundle."""
    teacher: str | None
    teacher_unet_sha256: str | None
    metric_sha256: str
    """Of the judge's weights: scores of different judges must not be compared."""
    num_images: int
    num_pair_images: int
    num_caption_images: int
    """The Frechet distances fall as this grows: compare only equal numbers."""
    num_candidates: int
    seed: int
    num_resamples: int
    level: float
    rows: tuple[Row, ...]
    versions: dict[str, str]
    bundle_sha256: str | None = None
    """Of a bundle's manifest, which holds every file's digest; None for a checkpoint."""
    schema_version: int = SCHEMA_VERSION

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def evaluate(
    checkpoint: Path,
    *,
    teacher: Path | None = None,
    metric: Path = DEFAULT_FOLDER,
    steps: Sequence[int] = (1, 2, 4),
    num_images: int = NUM_IMAGES,
    seed: int = 0,
    data: Path | None = None,
    num_resamples: int = NUM_RESAMPLES,
    report: Report = lambda column, done, total, losses: None,
) -> Evaluation:
    """Draw images and score them.

    Args:
        checkpoint: the student, a diffusers SDXL folder with `run.json`, or an engine bundle of one. A bundle draws the same
            prompts from the same noise as its checkpoint, so that the two differ by the bundle alone.
        teacher: a folder of the same kind, drawn with 25 guided steps from the same noise; adds ratios and distances to it.
        metric: the judge's folder.
        steps: step counts of the student, each 1 to 4; of a bundle, those that it was built for.
        num_images: images per column, half of them of held-out pairs.
        data: the data set the judge was trained on; adds real images, as they are and through the checkpoint's VAE (a bundle
            has no encoder, so it is refused there).
    Raises: ModelNotFound or ConfigError for what is missing, damaged, or of another domain or size.
    """
    counts = _checked_steps(steps)
    _require_numbers(num_images, num_resamples)
    judge = Metric.load(metric)
    prompts = choose_prompts(judge, num_images, seed)
    # Everything is read before anything is drawn: a wrong path shows at once.
    bundle = _open_bundle(checkpoint, judge, counts, data) if (checkpoint / BUNDLE_FILE).is_file() else None
    student = None if bundle else _load(checkpoint, judge)
    teaching = None if teacher is None else _load(teacher, judge)
    real = None if data is None else real_images(EmojiDataset.load(data), judge, prompts)
    columns: list[tuple[str, str, int | None, Scores]] = []

    def add(name: str, kind: str, num_steps: int | None, images: Images) -> None:
        columns.append((name, kind, num_steps, score(images, prompts, judge)))

    if real is not None:
        assert student is not None
        add("real images", "real", None, real)
        add("real, through the VAE", "real", None, through_vae(student, real, report))
    if teaching is not None:
        images = draw(teaching, prompts, None, seed, _part(report, "teacher"))
        add(f"teacher, {TEACHER_STEPS} steps", "teacher", TEACHER_STEPS, images)
    for count in counts:
        name = f"{count} step{'s' if count > 1 else ''}"
        part = _part(report, name)
        if bundle:
            images = draw_with_bundle(bundle, prompts, count, seed, part)
        else:
            assert student is not None
            images = draw(student, prompts, count, seed, part)
        add(name, "student", count, images)
    return Evaluation(
        checkpoint=str(checkpoint),
        unet_sha256=None if bundle else _unet_sha256(checkpoint),
        bundle_sha256=bundle.digest if bundle else None,
        teacher=None if teacher is None else str(teacher),
        teacher_unet_sha256=None if teacher is None else _unet_sha256(teacher),
        metric_sha256=judge.manifest["sha256"]["encoder.safetensors"],
        num_images=num_images,
        num_pair_images=sum(prompt.pair is not None for prompt in prompts),
        num_caption_images=sum(prompt.caption is not None for prompt in prompts),
        num_candidates=len(judge.pairs),
        seed=seed,
        num_resamples=num_resamples,
        level=bootstrap.LEVEL,
        rows=tuple(rows_of(columns, judge, num_resamples, seed)),
        versions={name: metadata.version(name) for name in ("torch", "diffusers", "transformers", "numpy")},
    )


def choose_prompts(judge: Metric, num_images: int, seed: int) -> list[Prompt]:
    """Half held-out pairs, each as often as the others to within one, half captions of real images, drawn with `seed`.

    Raises: ConfigError if the judge has no held-out pair.
    """
    heldout = [index for index, pair in enumerate(judge.pairs) if pair.is_heldout]
    if not heldout:
        raise ConfigError("the metric knows no held-out pair, so there is nothing to retrieve; train it on data with some")
    generator = np.random.default_rng(seed)
    num_pairs = num_images // 2
    order = generator.permutation(heldout)
    pairs = [int(order[i % len(order)]) for i in range(num_pairs)]
    drawn = generator.permutation(len(judge.captions))
    captions = [int(drawn[i % len(drawn)]) for i in range(num_images - num_pairs)]
    prompts = [Prompt(text=judge.pairs[index].prompt, pair=index) for index in pairs]
    return prompts + [Prompt(text=judge.captions[index], caption=index) for index in captions]


def score(images_NHW3: Images, prompts: Sequence[Prompt], judge: Metric) -> Scores:
    """Judge images that are already drawn, one per prompt.

    Raises: ShapeError for another number of images than of prompts, or another size than the judge's.
    """
    if len(images_NHW3) != len(prompts):
        raise ShapeError(f"{len(images_NHW3)} images for {len(prompts)} prompts; every prompt needs one image")
    of_pairs = [index for index, prompt in enumerate(prompts) if prompt.pair is not None]
    of_captions = [index for index, prompt in enumerate(prompts) if prompt.caption is not None]
    targets = np.array([prompt.pair for prompt in prompts if prompt.pair is not None], dtype=np.int64)
    asked = [judge.pairs[pair].colour for pair in targets]
    pictures = images_NHW3[of_pairs]
    return Scores(
        pairs_N=targets,
        ranks_N=judge.ranks(judge.image_features(pictures), targets),
        is_right_colour_N=np.array([dominant_colour(image) == colour for image, colour in zip(pictures, asked, strict=True)]),
        features_MD=judge.image_features(images_NHW3[of_captions]),
        patches_MPD=judge.patch_features(images_NHW3[of_captions]),
    )


def dominant_colour(image_HW3: Images) -> str:
    """The colour name of most pixels that are not background; "none" for an empty picture."""
    rgb = image_HW3.astype(np.float32) / np.float32(255)
    return colours.dominant(rgb, rgb.min(-1) < BACKGROUND)[0]


def rows_of(columns: Sequence[tuple[str, str, int | None, Scores]], judge: Metric, num_resamples: int, seed: int) -> list[Row]:
    """The table of columns (name, kind, steps, scores) that were drawn for the same prompts."""
    first = columns[0][3]
    generator = np.random.default_rng(seed)
    pair_weights = bootstrap.resample(first.pairs_N, num_resamples, generator)
    caption_weights = bootstrap.resample(range(len(first.features_MD)), num_resamples, generator)
    teacher = next((scores for _, kind, _, scores in columns if kind == "teacher"), None)
    found = [statistics(scores, judge, teacher, pair_weights, caption_weights) for *_, scores in columns]
    kinds = [kind for _, kind, _, _ in columns]
    teacher_found = found[kinds.index("teacher")] if teacher is not None else {}
    fewest = found[kinds.index("student")] if "student" in kinds else {}
    rows = []
    for (name, kind, num_steps, _), own in zip(columns, found, strict=True):
        shared = [key for key in own if key in teacher_found] if kind == "student" else []
        rows.append(
            Row(
                name=name,
                kind=kind,
                num_steps=num_steps,
                scores={key: bootstrap.interval(value) for key, value in own.items()},
                ratios_to_teacher={key: bootstrap.ratio_interval(own[key], teacher_found[key]) for key in shared},
                changes={key: bootstrap.interval(own[key] - fewest[key]) for key in own}
                if kind == "student" and own is not fewest
                else {},
            )
        )
    return rows


def statistics(
    scores: Scores, judge: Metric, teacher: Scores | None, pair_weights_RN: Array, caption_weights_RM: Array
) -> dict[str, Array]:
    """Every score of one column as a statistic [1 + R] of `bootstrap`; without the distances to itself for the teacher."""
    found = {
        "retrieval_top1": bootstrap.mean(scores.ranks_N < 1, pair_weights_RN),
        "retrieval_top5": bootstrap.mean(scores.ranks_N < 5, pair_weights_RN),
        "colour": bootstrap.mean(scores.is_right_colour_N, pair_weights_RN),
    }
    images = frechet.moments(scores.features_MD[:, None], caption_weights_RM)
    patches = frechet.moments(scores.patches_MPD, caption_weights_RM)
    distances = {
        "frechet": frechet.distance(judge.reference, images),
        "patch_frechet": frechet.distance(judge.patch_reference, patches),
    }
    if teacher is not None and teacher is not scores:
        teacher_images = frechet.moments(teacher.features_MD[:, None], caption_weights_RM)
        teacher_patches = frechet.moments(teacher.patches_MPD, caption_weights_RM)
        distances["frechet_to_teacher"] = frechet.distance(teacher_images, images)
        distances["patch_frechet_to_teacher"] = frechet.distance(teacher_patches, patches)
    return found | {key: bootstrap.recentred(value) for key, value in distances.items()}


@torch.no_grad()
def draw(
    model: Checkpoint, prompts: Sequence[Prompt], num_steps: int | None, seed: int, report: Callable[[int, int], None]
) -> Images:
    """Images uint8 [N, H, W, 3] of the prompts; equal seeds give equal noise whatever the model and step count.

    Args:
        num_steps: of the student; None draws as a teacher, with guidance.
    """
    side = model.unet.config.sample_size
    start, between = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed + 1)
    images = []
    for first in range(0, len(prompts), BATCH):
        texts = [prompt.text for prompt in prompts[first : first + BATCH]]
        embeds, pooled = model.text.encode(model.text.tokenize(texts))
        noise = torch.randn(len(texts), 4, side, side, generator=start)
        if num_steps is None:
            latents = sample(model.unet, embeds, pooled, noise, num_steps=TEACHER_STEPS, guidance=TEACHER_GUIDANCE)
        else:
            latents = draw_student(
                model.unet, embeds, pooled, noise, num_steps=num_steps, shift=model.shifted_timestep, generator=between
            )
        images.append(pixels(model.vae, latents.float()))
        report(first + len(texts), len(prompts))
    return torch.cat(images).numpy()


def draw_with_bundle(
    bundle: Bundle, prompts: Sequence[Prompt], num_steps: int, seed: int, report: Callable[[int, int], None]
) -> Images:
    """Images uint8 [N, H, W, 3] of the prompts from a bundle's engines, from the very noise that `draw` gives its checkpoint.

    Raises: BackendUnavailable, EngineMismatch if its engines do not run here.
    """
    manifest, size, size_px = bundle.manifest, bundle.manifest.batch, bundle.manifest.sizes_px[0]
    tokenizers = [Tokenizer(bundle.path(spec.file), spec) for spec in manifest.tokenizers]
    images = []
    with closing(open_executor(with_steps(bundle, num_steps))) as executor:
        executor.prepare(num_steps, size_px)
        for first, noise_NBCHW in _noise(len(prompts), num_steps, bundle.latent_CHW, seed):
            for start in range(0, noise_NBCHW.shape[1], size):
                part_NBCHW = noise_NBCHW[:, start : start + size]
                count = part_NBCHW.shape[1]
                padded_NBCHW = np.zeros((num_steps, size, *bundle.latent_CHW), np.float32)
                padded_NBCHW[:, :count] = part_NBCHW
                texts = [prompt.text for prompt in prompts[first + start : first + start + count]]
                ids_BT, ids_2_BT = (tokenizer.encode_batch(texts, size) for tokenizer in tokenizers)
                drawing = executor.draw(num_steps, size_px, ids_BT, ids_2_BT, padded_NBCHW)
                if not drawing.finite:
                    raise EngineMismatch(f"{bundle.folder} gave latents that are not finite at {num_steps} steps")
                images.append(drawing.images_BHWC[:count])
            report(first + noise_NBCHW.shape[1], len(prompts))
    return np.concatenate(images)


def _noise(
    num_images: int, num_steps: int, latent_CHW: tuple[int, int, int], seed: int
) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """(index of the first image, noise [N, B, 4, h, w] of one batch) as `draw` takes it: [0] the first latents, then the
    fresh noise of each step but the last."""
    start, between = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed + 1)
    for first in range(0, num_images, BATCH):
        shape = (min(BATCH, num_images - first), *latent_CHW)
        noises = [torch.randn(shape, generator=start)]
        noises += [torch.randn(shape, generator=between) for _ in range(num_steps - 1)]
        yield first, torch.stack(noises).numpy()


def real_images(dataset: EmojiDataset, judge: Metric, prompts: Sequence[Prompt]) -> Images:
    """The real image of each prompt: a caption's own, and a pair's in the style that unstyled prompts mean, where there is one.

    Raises: ConfigError for another data set than the judge's.
    """
    if pictures_sha256(dataset) != judge.manifest["data_sha256"]:
        raise ConfigError("--data is not the data set that this metric was trained on; name that one, or leave --data out")
    config = dataset.manifest["config"]
    assert isinstance(config, dict)
    image_of: dict[tuple[str | None, str], int] = {}
    for index, record in enumerate(dataset.records):
        key = (record.colour, record.concept)
        if key not in image_of or record.style == config["default_style"]:
            image_of[key] = index
    rows = []
    for prompt in prompts:
        if prompt.pair is None:
            assert prompt.caption is not None
            rows.append(prompt.caption)
        else:
            rows.append(image_of[judge.pairs[prompt.pair].colour, judge.pairs[prompt.pair].concept])
    return dataset.images_NHW3[rows]


@torch.no_grad()
def through_vae(model: Checkpoint, images_NHW3: Images, report: Report) -> Images:
    """Images encoded and decoded: what the VAE alone costs."""
    decoded = []
    for chunk in torch.from_numpy(images_NHW3).split(BATCH):
        latents = model.vae.encode(chunk.permute(0, 3, 1, 2).float() / 127.5 - 1).latent_dist.mean
        decoded.append(pixels(model.vae, latents * model.vae.config.scaling_factor))
        report("real, through the VAE", sum(map(len, decoded)), len(images_NHW3), {})
    return torch.cat(decoded).numpy()


def _part(report: Report, name: str) -> Callable[[int, int], None]:
    return lambda done, total: report(name, done, total, {})


def _open_bundle(folder: Path, judge: Metric, steps: Sequence[int], data: Path | None) -> Bundle:
    bundle = open_bundle(folder)
    bundle.check_files()
    if data is not None:
        raise ConfigError(f"--data adds real images through the VAE's encoder, which the bundle {folder} lacks; leave it out")
    missing = [count for count in steps if count not in bundle.built_steps]
    if missing:
        built = ",".join(map(str, bundle.built_steps))
        raise ConfigError(f"{folder} was not built for {missing[0]} steps; say --steps {built}, or build it for more")
    _require_size(folder, bundle.manifest.sizes_px[0], judge)
    return bundle


def _load(folder: Path, judge: Metric) -> Checkpoint:
    _require_run_file(folder)
    try:
        model = Checkpoint.load(folder)
    except (OSError, ValueError) as exc:
        raise ConfigError(f"the checkpoint {folder} cannot be read: {' '.join(str(exc).split())[:300]}") from exc
    _require_size(folder, model.unet.config.sample_size * 8, judge)
    return model


def _require_size(folder: Path, side: int, judge: Metric) -> None:
    if side != judge.config.size_px:
        raise ConfigError(
            f"{folder} draws {side}x{side} pixels, the metric judges {judge.config.size_px}x{judge.config.size_px}: "
            "its scores hold for the emoji domain only; name a metric of that size with --metric"
        )


def _require_run_file(folder: Path) -> None:
    if not (folder / "model_index.json").is_file():
        raise ModelNotFound(f"no checkpoint at {folder}: model_index.json is missing; name a diffusers SDXL folder")
    path = folder / "run.json"
    try:
        shift = json.loads(path.read_text(encoding="utf-8"))["shifted_timestep"]
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise ConfigError(f"{path} does not say the shifted_timestep that the checkpoint was trained with") from exc
    if not isinstance(shift, int) or not 1 <= shift <= 1000:
        raise ConfigError(f"shifted_timestep in {path} is {shift!r}; it must be a whole number from 1 to 1000")


def _unet_sha256(folder: Path) -> str:
    return file_sha256(folder / "unet" / "diffusion_pytorch_model.safetensors")


def _checked_steps(steps: Sequence[int]) -> list[int]:
    counts = sorted(set(steps))
    if not counts or counts[0] < 1 or counts[-1] > MAX_STEPS:
        raise ConfigError(f"steps must be from 1 to {MAX_STEPS}, got {', '.join(map(str, steps)) or 'none'}")
    return counts


def _require_numbers(num_images: int, num_resamples: int) -> None:
    if num_images < 16:
        raise ConfigError(f"num_images must be at least 16, got {num_images}; intervals of fewer say nothing")
    if num_resamples < 100:
        raise ConfigError(f"num_resamples must be at least 100, got {num_resamples}")

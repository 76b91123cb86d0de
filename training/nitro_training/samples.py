"""What the teacher makes of noise and prompts: drawn on the fly, or read from a cache built once.

A cache is a folder with `cache.json`, which says what its samples depend on, and shards `00000.safetensors`, ... of
`shard_size` samples each: x0 in float16 and the number of the prompt. Sample `index` follows from the seed and its index
alone, so x_T is drawn again instead of being stored, a killed build goes on where it was, several processes build shards of
their own, and a cache can be made longer.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nitro_rt.errors import TrainingError
from nitro_training.adversary import Condition
from nitro_training.checkpoint import digest_of, write_tensors
from nitro_training.model import LATENT_PX, TextEncoders
from nitro_training.prompts import Prompts
from nitro_training.randomness import BatchRandom, generator
from nitro_training.samplers import sample
from nitro_training.sources import Teacher
from nitro_training.sources import TeacherSourceConfig as TeacherSourceConfig

MANIFEST = "cache.json"
_SCHEMA_VERSION = 1
_OPEN_SHARDS = 16
_HALF_BYTES = 2


@dataclass(frozen=True)
class Sample:
    """What the teacher made of noise and prompts, float32 on the device that trains."""

    noise_B4hw: Tensor
    """x_T, standard normal."""
    x0_B4hw: Tensor
    condition: Condition


class TeacherSamples(Protocol):
    """A source of the teacher's results."""

    def draw(self, random: BatchRandom) -> Sample:
        """One sample for each of the batch; the same for the same `random`."""


class LiveSamples:
    """The teacher draws each sample as it is needed."""

    def __init__(self, config: TeacherSourceConfig, prompts: Prompts, teacher: Teacher, device: torch.device) -> None:
        """Raises: ConfigError if the UNet cannot draw pictures of that size."""
        self.config, self.prompts, self.teacher, self.device = config, prompts, teacher, device
        self.side = teacher.latents_side(config.size_px)

    def draw(self, random: BatchRandom) -> Sample:
        texts = [self.prompts[index] for index in random.randint(len(self.prompts)).tolist()]
        noise = random.randn(4, self.side, self.side).to(self.device)
        condition = encode(self.teacher.text, texts, self.device)
        return Sample(noise, _draw(self.config, self.teacher, condition, noise, random.generators), condition)


class CachedSamples:
    """The teacher's results from a complete cache; prompts are encoded anew, which costs little (their embeddings would
    be as large as the cache many times over)."""

    def __init__(
        self, folder: Path, config: TeacherSourceConfig, prompts: Prompts, teacher: Teacher, device: torch.device
    ) -> None:
        """
        Raises: TrainingError naming what is missing, damaged, or was made with other options.
        """
        key = cache_key(config, prompts, teacher)
        _require_key(folder, key)
        layout = _Layout(folder, config, digest_of(key))
        missing = [shard.path.name for shard in layout.all() if not shard.is_complete()]
        if missing:
            raise TrainingError(
                f"the cache {folder} lacks {len(missing)} of {layout.num_shards} shards, first {missing[0]}; "
                "start again with the same recipe: what is missing is drawn, the rest is kept"
            )
        self.prompts, self.text, self.device = prompts, teacher.text, device
        self.seed, self.num_samples = config.seed, config.cache_samples
        self.side = teacher.latents_side(config.size_px)
        self._layout, self._open = layout, OrderedDict[int, Any]()

    def draw(self, random: BatchRandom) -> Sample:
        return self.at(random.randint(self.num_samples).tolist())

    def at(self, indices: Sequence[int]) -> Sample:
        """The samples of these indices.

        Raises: TrainingError naming the shard that cannot be read.
        """
        rows = [self._read(index) for index in indices]
        noise = torch.stack([start_noise(self.seed, index, self.side) for index in indices])
        condition = encode(self.text, [self.prompts[prompt] for _, prompt in rows], self.device)
        x0 = torch.stack([x0 for x0, _ in rows])
        return Sample(noise.to(self.device), x0.to(self.device, torch.float32), condition)

    def _read(self, index: int) -> tuple[Tensor, int]:
        """x0 [4, h, w] float16, and the number of its prompt."""
        number, row = divmod(index, self._layout.shard_size)
        try:
            x0, prompt = self._slices(number)
            return x0[row], int(prompt[row])
        except (SafetensorError, OSError) as exc:
            raise _damaged(self._layout.shard(number).path, exc) from exc

    def _slices(self, number: int) -> tuple[Any, Any]:
        """The open tensors of a shard; those used last stay open."""
        if number not in self._open:
            if len(self._open) >= _OPEN_SHARDS:
                self._open.popitem(last=False)
            file = safe_open(str(self._layout.shard(number).path), framework="pt")
            self._open[number] = file.get_slice("x0"), file.get_slice("prompt")
        self._open.move_to_end(number)
        slices: tuple[Any, Any] = self._open[number]
        return slices


def build_cache(
    folder: Path, config: TeacherSourceConfig, prompts: Prompts, teacher: Teacher, *,
    rank: int = 0, num_processes: int = 1, report: Callable[[int, int], None] = lambda done, total: None,
) -> None:  # fmt: skip
    """Draw what the cache lacks of `config.cache_samples` samples; this process every `num_processes`-th shard.

    Every shard appears by one rename, so a killed build loses at most the shard it was at. All prompts are used once before
    any is used again.

    Args:
        report: called with (samples done, samples of this process).
    Raises: TrainingError if the folder's cache was made with other options (it names them), a shard is damaged, the teacher
        gives numbers that are not finite, or space runs out; what is complete is kept.
    """
    key = cache_key(config, prompts, teacher)
    layout = _Layout(folder, config, digest_of(key))
    if (folder / MANIFEST).exists():
        _require_key(folder, key)
    else:
        _write_manifest(folder, key, rank)
    own = [layout.shard(number) for number in range(rank, layout.num_shards, num_processes)]
    lacking = [shard for shard in own if not shard.is_complete()]
    total = sum(shard.num_samples for shard in own)
    done = total - sum(shard.num_samples for shard in lacking)
    side = teacher.latents_side(config.size_px)
    _require_space(folder, sum(shard.num_samples for shard in lacking) * 4 * side * side * _HALF_BYTES * num_processes)
    report(done, total)
    for shard in lacking:
        parts = []
        for indices in shard.batches(config.batch):
            parts.append(_draw_cached(config, prompts, teacher, indices))
            done += len(indices)
            report(done, total)
        x0, prompt = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        write_tensors(shard.path, {"x0": x0, "prompt": prompt}, {"samples": shard.name})


def cache_key(config: TeacherSourceConfig, prompts: Prompts, teacher: Teacher) -> dict[str, Any]:
    """Everything that the samples of a cache, and their places in its files, follow from."""
    return {
        **{f"{part} (SHA-256)": digest for part, digest in teacher.digests.items()},
        "teacher.sampler": config.sampler,
        "teacher.num_steps": config.num_steps,
        "teacher.guidance": config.guidance,
        "teacher.size_px": teacher.latents_side(config.size_px) * LATENT_PX,
        "teacher.seed": config.seed,
        "teacher.shard_size": config.shard_size,
        "prompts (SHA-256)": prompts.sha256,
        "weights' dtype": str(teacher.unet.dtype).removeprefix("torch."),
    }


def start_noise(seed: int, index: int, side: int) -> Tensor:
    """x_T [4, side, side] of a cached sample."""
    return torch.randn(4, side, side, generator=generator(seed, "noise", index))


def prompt_index(seed: int, index: int, num_prompts: int) -> int:
    """The prompt of a cached sample: all of them in random order, then again in another."""
    epoch, place = divmod(index, num_prompts)
    return int(_order(seed, epoch, num_prompts)[place])


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, num_prompts: int) -> Tensor:
    return torch.randperm(num_prompts, generator=generator(seed, "prompts", epoch))


@torch.no_grad()
def encode(text: TextEncoders, texts: Sequence[str], device: torch.device) -> Condition:
    """What prompts tell a UNet, float32."""
    embeds, pooled = text.encode(text.tokenize(list(texts)))
    return Condition(embeds.to(device, torch.float32), pooled.to(device, torch.float32))


def _draw(
    config: TeacherSourceConfig, teacher: Teacher, condition: Condition, noise: Tensor, generators: Sequence[torch.Generator]
) -> Tensor:
    return sample(
        teacher.unet, condition.embeds_BTC, condition.pooled_BP, noise, sampler=config.sampler, num_steps=config.num_steps,
        guidance=config.guidance, generators=generators,
    )  # fmt: skip


def _draw_cached(
    config: TeacherSourceConfig, prompts: Prompts, teacher: Teacher, indices: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """x0 [B, 4, h, w] float16 and the prompts' numbers [B], on the host."""
    chosen = [prompt_index(config.seed, index, len(prompts)) for index in indices]
    device = teacher.unet.device
    condition = encode(teacher.text, [prompts[prompt] for prompt in chosen], device)
    side = teacher.latents_side(config.size_px)
    noise = torch.stack([start_noise(config.seed, index, side) for index in indices]).to(device)
    generators = [generator(config.seed, "sampler", index) for index in indices]
    x0 = _draw(config, teacher, condition, noise, generators).to("cpu", torch.float16)
    finite = x0.isfinite().flatten(1).all(dim=1)
    if not finite.all():
        worst = int(finite.int().argmin())
        raise TrainingError(
            f"the teacher's sample {indices[worst]} (prompt {prompts[chosen[worst]]!r}) is not finite in float16; "
            "check the teacher's weights and its sampler, or load it in another dtype"
        )
    return x0, torch.tensor(chosen)


@dataclass(frozen=True)
class _Shard:
    """One file of a cache."""

    path: Path
    key: str
    first: int
    num_samples: int

    @property
    def name(self) -> str:
        """What is written into the file: of which cache it is, and where there."""
        return f"{self.first} onwards of {self.key}"

    def batches(self, size: int) -> list[range]:
        end = self.first + self.num_samples
        return [range(first, min(first + size, end)) for first in range(self.first, end, size)]

    def is_complete(self) -> bool:
        """Whether the file holds its samples. Raises: TrainingError if it is damaged or another cache's."""
        if not self.path.is_file():
            return False
        try:
            with safe_open(str(self.path), framework="pt") as file:
                if (file.metadata() or {}).get("samples") != self.name:
                    raise TrainingError(f"{self.path} belongs to another cache; remove it, and it is drawn anew")
                rows: int = file.get_slice("x0").get_shape()[0]
                return rows >= self.num_samples  # fewer where the cache was shorter once
        except (SafetensorError, OSError) as exc:
            raise _damaged(self.path, exc) from exc


class _Layout:
    """Which shards a cache consists of."""

    def __init__(self, folder: Path, config: TeacherSourceConfig, key: str) -> None:
        self.folder, self.key, self.shard_size, self.num_samples = folder, key, config.shard_size, config.cache_samples
        self.num_shards = -(-self.num_samples // self.shard_size)

    def shard(self, number: int) -> _Shard:
        first = number * self.shard_size
        path = self.folder / f"{number:05d}.safetensors"
        return _Shard(path, self.key, first, min(self.shard_size, self.num_samples - first))

    def all(self) -> list[_Shard]:
        return [self.shard(number) for number in range(self.num_shards)]


def _damaged(path: Path, exc: Exception) -> TrainingError:
    return TrainingError(f"{path} cannot be read: {exc}; remove it and start again, and it is drawn anew")


def _require_key(folder: Path, key: dict[str, Any]) -> None:
    """Raises: TrainingError naming what the cache in `folder` was made with instead."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version, found = manifest["schema_version"], dict(manifest["key"])
    except FileNotFoundError as exc:
        raise TrainingError(f"there is no cache at {folder}: {MANIFEST} is missing; it is made from the start") from exc
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise TrainingError(f"{path} is damaged ({exc!r}); remove the folder, and the cache is made anew") from exc
    if version != _SCHEMA_VERSION:
        raise TrainingError(
            f"{path} has version {version}, this nitro-rt reads {_SCHEMA_VERSION}; remove the folder to have it made anew"
        )
    differing = [name for name in sorted(found.keys() | key.keys()) if found.get(name) != key.get(name)]
    if differing:
        changes = "; ".join(f"{name} was {_short(found.get(name))}, now {_short(key.get(name))}" for name in differing)
        raise TrainingError(
            f"the cache {folder} was made with other options: {changes}; use the options it was made with, name another "
            "folder in teacher.cache, or remove this one to have it made anew"
        )


def _short(value: object) -> str:
    text = "none" if value is None else str(value)
    return text[:12] + "..." if len(text) > 60 else text


def _write_manifest(folder: Path, key: dict[str, Any], rank: int) -> None:
    temporary = folder / f".{MANIFEST}.{rank}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps({"schema_version": _SCHEMA_VERSION, "key": key}, indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, folder / MANIFEST)
    except OSError as exc:
        raise TrainingError(f"cannot write {folder / MANIFEST}: {exc}; name another folder in teacher.cache") from exc


def _require_space(folder: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise TrainingError(
            f"the cache needs {num_bytes / 2**30:.2f} GiB more in {folder}, where {free / 2**30:.2f} GiB are free; make room, "
            "name another folder in teacher.cache, or lower teacher.cache_samples; what is there is kept"
        )

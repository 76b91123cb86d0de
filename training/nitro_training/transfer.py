"""Another checkpoint of the same base learns one-to-four-step drawing by arithmetic on weights, without training.

    W_new = W_custom + scale * (W_nitro - W_base)        tensor by tensor, over the UNet

Source: arXiv:2412.02030, section 4.6 (there with scale 1).
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nitro_export.checkpoint import PART_CLASSES, TOKENIZER_FILES, WEIGHT_STEMS, Checkpoint, read_checkpoint
from nitro_export.weights import STEM, UNetWeights, open_unet, require_same_layout, shift_of, write_safetensors
from nitro_rt.errors import ConfigError
from nitro_training.publish import published, require_free

Report = Callable[[str, int, int, Mapping[str, float]], None]
"""Called with (stage, tensors done, tensors in all, figures)."""

PART = 1 << 20
"""Elements that are worked on at a time, so that memory does not grow with the tensors (13 million in SDXL's largest)."""


@dataclass(frozen=True, kw_only=True)
class TransferResult:
    """What a transfer made."""

    out: Path
    shifted_timestep: int | None
    """What the result is to be drawn with; None where nobody said."""
    num_tensors: int
    num_from_nitro: int
    """Tensors in which custom = base, so that the result is nitro's own, bit for bit."""
    num_from_custom: int
    """Tensors in which nitro = base, so that the result is custom's own, bit for bit."""
    custom_distance: float
    """|W_custom - W_base| / |W_base|, Frobenius norms over all tensors. Near 1 or above, custom is not of this base."""
    nitro_distance: float
    """|W_nitro - W_base| / |W_base|."""
    provenance: dict[str, Any]
    """Names, licences and digests of the three, and the scale."""


def transfer(
    custom: Path,
    nitro: Path,
    base: Path,
    out: Path,
    *,
    scale: float = 1.0,
    shift: int | None = None,
    force: bool = False,
    dry_run: bool = False,
    report: Report = lambda stage, done, total, figures: None,
) -> TransferResult | None:
    """Give `custom` what distinguishes `nitro` from `base`.

    Exact, bit for bit, wherever one of the three does not matter: an element in which custom = base becomes nitro's (with
    scale 1), one in which nitro = base stays custom's. All else is computed in float32 (float64 where an input is) and
    rounded once to custom's number type.

    Args:
        custom, nitro, base: each a checkpoint folder, a `unet` folder, or a .safetensors file, as `open_unet` reads.
        out: a .safetensors file for the UNet alone; or, where `custom` is a checkpoint folder, a folder that becomes a
            checkpoint with custom's other parts.
        shift: timestep shift to draw the result with; nitro's own if None. A checkpoint folder must have one.
        force: replace what is at `out`.
        dry_run: check everything and write nothing.
    Returns: what was made; None after a dry run.
    Raises: ConfigError if the three do not fit together or an option is wrong, ModelNotFound if one is not there,
        ExportError if custom's other parts are not SDXL's or a file is damaged, TrainingError if `out` cannot be written.
    """
    if not math.isfinite(scale) or scale == 0:
        raise ConfigError(f"--scale {scale} must be a number other than 0; 1 transfers all of it")
    place = require_free(out, force=force, inputs=(custom, nitro, base))
    with open_unet(custom) as customs, open_unet(nitro) as nitros, open_unet(base) as bases:
        require_same_layout({"custom": customs, "nitro": nitros, "base": bases})
        shifted_timestep = shift_of(nitros, shift)
        parts = None if place.suffix == ".safetensors" else _other_parts(customs, out, shifted_timestep)
        if dry_run:
            return None
        provenance = {"scale": scale} | {
            role: unet.facts() for role, unet in (("custom", customs), ("nitro", nitros), ("base", bases))
        }
        work = _Sum(customs, nitros, bases, scale, report)
        with published(place, num_bytes=customs.num_bytes + _num_bytes(parts)) as hidden:
            if parts is None:
                work.write(hidden, _metadata(provenance, shifted_timestep))
            else:
                _copy_parts(parts, hidden)
                work.write(hidden / "unet" / f"{STEM}.safetensors", {"format": "pt"})
                _write_run(hidden / "run.json", place.name, provenance, shifted_timestep)
    return TransferResult(
        out=out,
        shifted_timestep=shifted_timestep,
        num_tensors=len(work.customs.specs),
        num_from_nitro=work.num_from_nitro,
        num_from_custom=work.num_from_custom,
        custom_distance=work.custom_distance,
        nitro_distance=work.nitro_distance,
        provenance=provenance,
    )


def add_difference(custom: Tensor, nitro: Tensor, base: Tensor, scale: float = 1.0) -> Tensor:
    """custom + scale * (nitro - base) in custom's dtype; elementwise, all of one shape.

    Exact where custom's bits are base's (scale 1: nitro's, if custom's dtype holds them) and where nitro's are base's.
    """
    wide = torch.float64 if torch.float64 in (custom.dtype, nitro.dtype, base.dtype) else torch.float32
    c, n, b = custom.to(wide), nitro.to(wide), base.to(wide)
    result = torch.where(_same_bits(n, b), c, c + scale * (n - b))
    if scale == 1:
        result = torch.where(_same_bits(c, b), n, result)
    return result.to(custom.dtype)


def _same_bits(first: Tensor, second: Tensor) -> Tensor:
    """Element by element. Unlike ==, tells 0 from -0, so that what is copied is copied bit for bit."""
    return _bits(first) == _bits(second)


def _equal(first: Tensor, second: Tensor) -> bool:
    """The two are of one type and the same, bit for bit."""
    return first.dtype == second.dtype and torch.equal(_bits(first), _bits(second))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.dtype.itemsize])


@dataclass
class _Sum:
    """The arithmetic over all tensors, and what is learnt about them on the way."""

    customs: UNetWeights
    nitros: UNetWeights
    bases: UNetWeights
    scale: float
    report: Report
    num_from_nitro: int = 0
    num_from_custom: int = 0
    _squares: Tensor = field(default_factory=lambda: torch.zeros(3, dtype=torch.float64))
    """Of W_custom - W_base, W_nitro - W_base, W_base."""
    _num_done: int = 0

    def write(self, path: Path, metadata: dict[str, str]) -> None:
        write_safetensors(path, self.customs.specs, self._parts, metadata)

    def _parts(self, key: str) -> Iterator[Tensor]:
        custom, nitro, base = (unet.tensor(key) for unet in (self.customs, self.nitros, self.bases))
        self.num_from_nitro += self.scale == 1 and custom.dtype == nitro.dtype and _equal(custom, base)
        self.num_from_custom += _equal(nitro, base)
        for c, n, b in zip(*(tensor.reshape(-1).split(PART) for tensor in (custom, nitro, base)), strict=True):
            result = add_difference(c, n, b, self.scale)
            if not result.isfinite().all():
                raise ConfigError(
                    f"{key} would hold infinite or undefined numbers in {result.dtype}: one of the inputs holds them, or the "
                    "sum is too large for that type; take a custom checkpoint in float32 or bfloat16"
                )
            for index, difference in enumerate((c.float() - b.float(), n.float() - b.float(), b.float())):
                self._squares[index] += difference.square().sum(dtype=torch.float64)
            yield result
        self._num_done += 1
        self.report("transfer", self._num_done, len(self.customs.specs), {})

    @property
    def custom_distance(self) -> float:
        return float((self._squares[0] / self._squares[2]).sqrt())

    @property
    def nitro_distance(self) -> float:
        return float((self._squares[1] / self._squares[2]).sqrt())


def _other_parts(custom: UNetWeights, out: Path, shift: int | None) -> dict[Path, Path]:
    """Where each file of the new checkpoint beside the UNet's weights comes from: path inside -> path now."""
    if custom.checkpoint is None:
        raise ConfigError(
            f"--out {out} is a folder, but {custom.name} is a UNet alone, without the other parts of a checkpoint; "
            f"write the UNet to {out}.safetensors, or give --custom as a checkpoint folder"
        )
    if shift is None:
        raise ConfigError(
            "a checkpoint must say its timestep shift, and nitro has no run.json with a shifted_timestep; say --shift "
            "(NitroSD-Realism: 250, NitroSD-Vibrant: 500)"
        )
    return dict(_files_of(read_checkpoint(custom.checkpoint)))


def _files_of(checkpoint: Checkpoint) -> Iterator[tuple[Path, Path]]:
    """The files that a checkpoint needs, and nothing else: a hub's folder often holds several copies of each part.

    A part that is there as fp16 only takes the plain name, as the UNet does: diffusers asks for one variant of all parts.
    """
    folder = checkpoint.folder
    names = [Path("model_index.json"), Path("scheduler/scheduler_config.json")]
    names += [Path(part) / "config.json" for part in WEIGHT_STEMS]
    names += [Path(part) / name for part in PART_CLASSES for name in TOKENIZER_FILES]
    for name in names:
        if (folder / name).is_file():
            yield name, folder / name
    for part, stem in WEIGHT_STEMS.items():
        if part == "unet":
            continue
        dotted = f".{checkpoint.variants[part]}" if checkpoint.variants[part] else ""
        single, index = folder / part / f"{stem}{dotted}.safetensors", folder / part / f"{stem}.safetensors.index{dotted}.json"
        if single.is_file():
            yield Path(part) / f"{stem}.safetensors", single
        else:
            yield Path(part) / f"{stem}.safetensors.index.json", index
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            yield from ((Path(part) / name, folder / part / name) for name in sorted(shards))


def _num_bytes(parts: dict[Path, Path] | None) -> int:
    return sum(path.stat().st_size for path in parts.values()) if parts else 0


def _copy_parts(parts: dict[Path, Path], folder: Path) -> None:
    for inside, source in parts.items():
        (folder / inside).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, folder / inside)


def _write_run(path: Path, name: str, provenance: dict[str, Any], shift: int | None) -> None:
    licences = dict.fromkeys(str(provenance[role]["licence"]) for role in ("custom", "nitro", "base"))
    run = {
        "schema_version": 1,
        "name": name,
        "licence": " and ".join(licences),  # the result is made of all three
        "shifted_timestep": shift,
        "transfer": provenance,
    }
    path.write_text(json.dumps(run, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _metadata(provenance: dict[str, Any], shift: int | None) -> dict[str, str]:
    """As run.json, for a file that stands alone; safetensors' metadata are strings."""
    known = {} if shift is None else {"shifted_timestep": str(shift)}
    return {"format": "pt", "transfer": json.dumps(provenance, sort_keys=True)} | known

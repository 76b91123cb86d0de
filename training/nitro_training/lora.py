"""A student as a LoRA: what training changed in a base checkpoint's UNet, cut to a low rank, for any model of that base.

Per Linear or Conv layer the difference D = W_student - W_base, as a matrix [out, in * kh * kw], is cut to its r largest
singular values, D = U S V' ~ (U sqrt(S)) (sqrt(S) V') = B A: the nearest of that rank in the Frobenius norm (Eckart & Young
1936).

The file has the keys of PEFT (`unet.<layer>.lora_A.weight` [r, in, kh, kw], `.lora_B.weight` [out, r, 1, 1]) and no alpha,
which means a scale of 1. All layers have one rank, small ones filled up with zeros: readers disagree about mixed ranks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from nitro_export.weights import TensorSpec, UNetWeights, open_unet, require_same_layout, shift_of, write_safetensors
from nitro_rt.errors import BackendUnavailable, ConfigError
from nitro_rt.manifest import sha256_of
from nitro_training.likeness import Gallery, Likeness, likeness
from nitro_training.publish import published, require_free
from nitro_training.sheet import HELDOUT, read_prompts

Report = Callable[[str, int, int, Mapping[str, float]], None]
"""Called with (stage, done, in all, figures)."""
Device = Literal["cpu", "cuda"]

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
EXACT_UP_TO = 512
"""Matrices with a side of at most this are decomposed exactly; larger ones by random projection (Halko et al. 2011,
arXiv:0909.4061), which takes a fifth of the time at SDXL's 1280 and rank 64."""
OVERSAMPLING, POWER_ITERATIONS = 64, 4
"""Of the random projection: the error is within 0.3 % of the best even for white noise, whose spectrum is the worst case."""
NUM_WORST = 5


@dataclass(frozen=True, kw_only=True)
class LayerError:
    """A layer and what is missing of its difference."""

    layer: str
    relative_error: float


@dataclass(frozen=True, kw_only=True)
class RankError:
    """The LoRA cut to one rank (a LoRA of lower rank is a prefix of one of higher rank)."""

    rank: int
    num_bytes: int
    """Of its weights in the file's number type."""
    layers_error: float
    """|D - B A| / |D| over the layers that a LoRA carries, with B and A as stored."""
    total_error: float
    """The same over all tensors, biases and norms among them, which a LoRA leaves out."""
    worst_layers: tuple[LayerError, ...]
    likeness: Likeness | None
    """Of one-step pictures with base + LoRA to the student's; None where no prompts were given."""


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """A tensor that differs and that a LoRA cannot carry."""

    name: str
    relative_change: float | None
    """|D| / |W_base|; None where the base's is zero."""
    share: float
    """Of the whole squared difference."""


@dataclass(frozen=True, kw_only=True)
class LoraReport:
    """What was extracted, and what it cannot say."""

    out: Path
    rank: int
    dtype: str
    num_layers: int
    num_layers_unchanged: int
    """Layers that are the same in both and so not in the file."""
    num_left_out: int
    """Biases and norms that differ."""
    left_out_error: float
    """Their |D| / |D of all tensors|: no rank goes below this total error."""
    most_left_out: tuple[LeftOut, ...]
    other_parts_that_differ: tuple[str, ...]
    """Text encoders and VAE whose files differ between the checkpoints; empty too where one of them is a UNet alone."""
    ranks: tuple[RankError, ...]
    base_likeness: Likeness | None
    """Of the base's own one-step pictures to the student's: a LoRA of rank 0."""
    full_likeness: Likeness | None
    """With all layers exact, biases and norms the base's: a LoRA of full rank."""
    provenance: dict[str, Any]


def extract_lora(
    student: Path,
    base: Path,
    out: Path,
    *,
    rank: int,
    report_ranks: Sequence[int] = (),
    dtype: str = "fp16",
    device: Device = "cpu",
    prompts: Path | None = None,
    seed: int = 0,
    shift: int | None = None,
    force: bool = False,
    dry_run: bool = False,
    report: Report = lambda stage, done, total, figures: None,
) -> LoraReport | None:
    """Write the difference of two UNets as a LoRA that diffusers loads.

    Args:
        student, base: each a checkpoint folder, a `unet` folder, or a .safetensors file, as `weights.open_unet` reads.
        out: the .safetensors file.
        report_ranks: lower ranks to report on beside `rank`.
        dtype: fp32, fp16 or bf16: the number type of the file.
        prompts: file of prompts, one a line; with it, pictures are compared, and the student must be a checkpoint folder.
        seed: of the random projections and of the pictures' noise.
        shift: timestep shift of the pictures, and the file's; the student's own if None.
        dry_run: check everything and write nothing.
    Returns: the report; None after a dry run.
    Raises: ConfigError if the two do not fit together or an option is wrong, ModelNotFound if one is not there,
        BackendUnavailable if there is no such device, ExportError if a file is damaged, TrainingError if `out` cannot be
        written.
    """
    ranks = _checked_ranks(rank, report_ranks)
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise BackendUnavailable("--device cuda was asked for, but torch finds no GPU here; use --device cpu")
    if out.suffix != ".safetensors":
        raise ConfigError(f"--out {out} must end in .safetensors: a LoRA is one file")
    place = require_free(out, force=force, inputs=(student, base))
    with open_unet(student) as students, open_unet(base) as bases:
        require_same_layout({"student": students, "base": bases})
        _require_useful(rank, students.specs)
        shifted_timestep = shift_of(students, shift)
        words = _read_prompts(prompts, students, shifted_timestep)
        if dry_run:
            return None
        found = _Extraction(students, bases, ranks, DTYPES[dtype], torch.device(device), seed)
        found.run(report)
        base_likeness, likenesses, full_likeness = _likenesses(found, words, shifted_timestep, seed, report)
        provenance = {"student": students.facts(), "base": bases.facts(), "seed": seed, "shifted_timestep": shifted_timestep}
        result = LoraReport(
            out=out,
            rank=rank,
            dtype=dtype,
            num_layers=len(found.factors),
            num_layers_unchanged=found.num_unchanged,
            num_left_out=len(found.left_out),
            left_out_error=(found.left_out_square / found.total_square) ** 0.5,
            most_left_out=found.most_left_out(),
            other_parts_that_differ=_other_parts_that_differ(students, bases),
            ranks=tuple(found.rank_error(r, likenesses.get(r)) for r in ranks),
            base_likeness=base_likeness,
            full_likeness=full_likeness,
            provenance=provenance,
        )
        _write(place, found.tensors(), _metadata(result))
    return result


def low_rank(matrix_MN: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """B [M, r] and A [r, N] in float32 with B A nearest to the matrix; r is `rank`, the rest zeros where a side is shorter.

    Both factors carry the square roots of the singular values, so that neither leaves float16's range. The first k columns of B
    and rows of A are the factors of rank k.
    """
    num_rows, num_columns = matrix_MN.shape
    side = min(num_rows, num_columns)
    if side <= max(EXACT_UP_TO, rank + OVERSAMPLING):
        u, s, vh = torch.linalg.svd(matrix_MN, full_matrices=False)
    else:
        devices = [matrix_MN.device] if matrix_MN.is_cuda else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            u, s, v = torch.svd_lowrank(matrix_MN, q=rank + OVERSAMPLING, niter=POWER_ITERATIONS)
        vh = v.mT
    kept = min(rank, side)
    root = s[:kept].sqrt()
    b, a = matrix_MN.new_zeros(num_rows, rank), matrix_MN.new_zeros(rank, num_columns)
    b[:, :kept], a[:kept] = u[:, :kept] * root, root[:, None] * vh[:kept]
    return b, a


@dataclass
class _Extraction:
    """The factors of all layers, and the squared errors of every rank."""

    students: UNetWeights
    bases: UNetWeights
    ranks: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    seed: int
    factors: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Weight's name -> B [out, r], A [r, in * kh * kw], in the file's number type."""
    squares: dict[str, float] = field(default_factory=dict)
    """Weight's name -> |D|^2."""
    residuals: dict[int, dict[str, float]] = field(default_factory=dict)
    """Rank -> weight's name -> |D - B A|^2."""
    left_out: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Name of a bias or norm -> |D|^2, |W_base|^2."""
    num_unchanged: int = 0

    def run(self, report: Report) -> None:
        self.residuals = {rank: {} for rank in self.ranks}
        for done, key in enumerate(self.students.specs, start=1):
            base = self.bases.tensor(key).to(self.device, torch.float32)
            difference = self.students.tensor(key).to(self.device, torch.float32) - base
            if not difference.isfinite().all():
                raise ConfigError(f"{key} holds infinite or undefined numbers in the student or the base; take sound weights")
            square = _square(difference)
            if is_layer(key, self.students.specs[key]):
                self._decompose(key, difference.flatten(1), square)
            elif square:
                self.left_out[key] = square, _square(base)
            report("svd", done, len(self.students.specs), {})
        if not self.total_square:
            raise ConfigError(
                f"the UNets of {self.students.name} and {self.bases.name} are the same: there is nothing to extract"
            )

    def _decompose(self, key: str, difference: Tensor, square: float) -> None:
        if not square:
            self.num_unchanged += 1
            return
        b, a = (factor.to(self.dtype) for factor in low_rank(difference, self.ranks[-1], self.seed))
        self.factors[key], self.squares[key] = (b.cpu(), a.cpu()), square
        before = 0
        for rank in self.ranks:  # ascending: each takes away what the one before left
            difference = difference - b[:, before:rank].float() @ a[before:rank].float()
            self.residuals[rank][key] = _square(difference)
            before = rank

    @property
    def layers_square(self) -> float:
        return sum(self.squares.values())

    @property
    def left_out_square(self) -> float:
        return sum(square for square, _ in self.left_out.values())

    @property
    def total_square(self) -> float:
        return self.layers_square + self.left_out_square

    def rank_error(self, rank: int, pictures: Likeness | None) -> RankError:
        residuals = self.residuals[rank]
        errors = {key: (square / self.squares[key]) ** 0.5 for key, square in residuals.items()}
        worst = sorted(errors, key=lambda key: -errors[key])[:NUM_WORST]
        residual = sum(residuals.values())
        elements = sum(rank * (b.shape[0] + a.shape[1]) for b, a in self.factors.values())
        return RankError(
            rank=rank,
            num_bytes=elements * self.dtype.itemsize,
            layers_error=(residual / self.layers_square) ** 0.5 if self.layers_square else 0.0,
            total_error=((residual + self.left_out_square) / self.total_square) ** 0.5,
            worst_layers=tuple(LayerError(layer=_layer(key), relative_error=errors[key]) for key in worst),
            likeness=pictures,
        )

    def most_left_out(self) -> tuple[LeftOut, ...]:
        largest = sorted(self.left_out, key=lambda key: -self.left_out[key][0])[:NUM_WORST]
        return tuple(self._left_out(key) for key in largest)

    def _left_out(self, key: str) -> LeftOut:
        square, base_square = self.left_out[key]
        change = (square / base_square) ** 0.5 if base_square else None
        return LeftOut(name=key, relative_change=change, share=square / self.total_square)

    def weights(self, rank: int | None) -> dict[str, Tensor]:
        """The base's weights with the LoRA cut to `rank`; None means every layer as the student has it. Float32."""
        found = {key: self.bases.tensor(key).float() for key in self.bases.specs}
        for key, (b, a) in self.factors.items():
            if rank is None:
                found[key] = self.students.tensor(key).float()
            else:
                found[key] = found[key] + (b[:, :rank].float() @ a[:rank].float()).view(found[key].shape)
        return found

    def tensors(self) -> dict[str, Tensor]:
        """The LoRA under PEFT's names and shapes."""
        found = {}
        for key, (b, a) in self.factors.items():
            shape, rank = self.students.specs[key].shape, self.ranks[-1]
            ones = (1,) * (len(shape) - 2)
            found[f"unet.{_layer(key)}.lora_A.weight"] = a.view(rank, *shape[1:])
            found[f"unet.{_layer(key)}.lora_B.weight"] = b.view(shape[0], rank, *ones)
        return found


def is_layer(key: str, spec: TensorSpec) -> bool:
    """True for the weight of a Linear or Conv layer, which a LoRA carries.

    PEFT could carry their biases too, but wants one for every layer then, also for those that have none (SDXL's queries, keys
    and values), and other readers of LoRAs ignore them.
    """
    return key.endswith(".weight") and len(spec.shape) in (2, 4) and not key.startswith("class_embedding.")


def _layer(key: str) -> str:
    return key.removesuffix(".weight")


def _square(tensor: Tensor) -> float:
    """The sum of squares, in float64."""
    return float(tensor.square().sum(dtype=torch.float64))


def _checked_ranks(rank: int, report_ranks: Sequence[int]) -> tuple[int, ...]:
    """All ranks to report on, ascending, the extracted one last."""
    if rank < 1:
        raise ConfigError(f"--rank {rank} must be at least 1")
    if wrong := [other for other in report_ranks if not 1 <= other <= rank]:
        raise ConfigError(f"--report-ranks has {wrong[0]}, each must be from 1 to --rank {rank}")
    return tuple(sorted({*report_ranks, rank}))


def _require_useful(rank: int, specs: Mapping[str, TensorSpec]) -> None:
    matrices = {key: (spec.shape[0], _columns(spec)) for key, spec in specs.items() if is_layer(key, spec)}
    most = max(min(shape) for shape in matrices.values())
    if rank > most:
        raise ConfigError(f"--rank {rank} is more than the full rank of every layer here, which is at most {most}")


def _columns(spec: TensorSpec) -> int:
    return int(torch.Size(spec.shape[1:]).numel())


def _read_prompts(path: Path | None, students: UNetWeights, shift: int | None) -> list[str]:
    if path is None:
        return []
    if students.checkpoint is None:
        raise ConfigError(
            f"--prompts asks for pictures, but {students.name} is a UNet alone; give --student as a checkpoint folder"
        )
    if shift is None:
        raise ConfigError(f"--prompts asks for pictures, but {students.name} does not say its timestep shift; say --shift")
    if not path.is_file():
        raise ConfigError(f"there is no file of prompts {path}; write one prompt a line")
    words = [line.removeprefix(HELDOUT).strip() for line in read_prompts(path)]
    if not words:
        raise ConfigError(f"{path} holds no prompts; write one a line")
    return words


def _likenesses(
    found: _Extraction, prompts: list[str], shift: int | None, seed: int, report: Report
) -> tuple[Likeness | None, dict[int, Likeness], Likeness | None]:
    """Of base, of base + LoRA by rank, and of base + all layers, each to the student."""
    if not prompts:
        return None, {}, None
    assert found.students.checkpoint is not None and shift is not None
    gallery = Gallery.load(found.students.checkpoint, prompts, shift=shift, seed=seed)
    wanted = gallery.draw({key: found.students.tensor(key).float() for key in found.students.specs})
    results: dict[int | None, Likeness] = {}
    cuts: tuple[int | None, ...] = (0, *found.ranks, None)
    for done, rank in enumerate(cuts, start=1):
        results[rank] = likeness(gallery.draw(found.weights(rank)), wanted)
        report("pictures", done, len(cuts), {})
    return results[0], {rank: results[rank] for rank in found.ranks}, results[None]


def _other_parts_that_differ(students: UNetWeights, bases: UNetWeights) -> tuple[str, ...]:
    first, second = students.checkpoint, bases.checkpoint
    if first is None or second is None:
        return ()
    parts = ("text_encoder", "text_encoder_2", "vae")
    return tuple(part for part in parts if _digests(first / part) != _digests(second / part))


def _digests(folder: Path) -> list[str]:
    return sorted(sha256_of(path) for path in folder.glob("*.safetensors"))


def _metadata(report: LoraReport) -> dict[str, str]:
    """What the file says about itself; safetensors' metadata are strings."""
    shift = report.provenance["shifted_timestep"]
    return {
        "format": "pt",
        "base": report.provenance["base"]["name"],
        "student": report.provenance["student"]["name"],
        "rank": str(report.rank),
        "layers_error": f"{report.ranks[-1].layers_error:.6g}",
        "total_error": f"{report.ranks[-1].total_error:.6g}",
        "provenance": json.dumps(report.provenance, sort_keys=True),
    } | ({} if shift is None else {"shifted_timestep": str(shift)})


def _write(place: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    specs = {key: TensorSpec(tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()}
    with published(place, num_bytes=sum(spec.num_bytes for spec in specs.values())) as hidden:
        write_safetensors(hidden, specs, lambda key: (tensors[key],), metadata)

"""`export_checkpoint`: a checkpoint in, a graphs folder with export.json out, whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from nitro_export.checkpoint import WEIGHT_STEMS, Checkpoint, checkpoint_sha256, read_checkpoint, weight_files
from nitro_export.stored import sha256_of_finite
from nitro_export.toolchain import toolchain
from nitro_rt.errors import ConfigError, ExportError
from nitro_rt.manifest import (
    EXPORT_FILE,
    SCHEMA_VERSION,
    FileRef,
    Graph,
    GraphsManifest,
    ScheduleSpec,
    Source,
    TensorSpec,
    sha256_of,
    to_json,
)
from nitro_rt.schedule import StepSchedule, alphas_cumprod_from_config, step_schedule

if TYPE_CHECKING:
    from torch import Tensor

    from nitro_export.graph import WeightFiles
    from nitro_export.stages import Stage
    from nitro_export.stored import StoredTensor

PRECISIONS = ("fp32", "fp16", "bf16")
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
WEIGHT_SUFFIXES = (".safetensors", ".data")
PARITY_BYTES = 1 << 30
"""Networks with more weights than this are not run after their export: torch would need minutes and all the memory.
Weights that meet every pixel count once for each 64x64 of them: a decoder is small and does more than a UNet."""
Report = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class _Request:
    """What to export, resolved and checked."""

    checkpoint: Checkpoint
    schedules: dict[int, StepSchedule]
    shift: int
    precision: str
    size_px: int
    batch: int

    @property
    def latent_size(self) -> int:
        return self.size_px // self.checkpoint.vae_factor


def export_checkpoint(
    checkpoint: Path,
    out: Path,
    *,
    steps: Sequence[int],
    shift: int | None = None,
    precision: str = "fp32",
    size_px: int | None = None,
    batch: int = 1,
    name: str | None = None,
    origin: str | None = None,
    licence: str | None = None,
    report: Report = lambda line: None,
) -> GraphsManifest:
    """Turn a diffusers SDXL folder into ONNX graphs and check each against torch.

    Args:
        checkpoint: the folder; see `read_checkpoint` for what it must hold.
        out: the graphs folder, not there yet. It is assembled in a hidden sibling and published by one rename.
        steps: step counts from 1 to 4, one denoiser for each.
        shift: `shifted_timestep`; None means the one in the checkpoint's run.json.
        precision: "fp32", "fp16" or "bf16"; latents, noise and the schedule stay float32 in all. With fp16 the decoder
            computes in float32 where the VAE's config says `force_upcast`; the manifest and `report` say so.
        size_px: the side of the images; None means the checkpoint's own.
        batch: images per call.
        name, licence: for the manifest; None means run.json's, else the folder's name and "unknown".
        origin: what the user asked for; None means the folder's name.
        report: called with one line per finished part.
    Raises: ModelNotFound, ConfigError, ExportError, BackendUnavailable; `out` is then as it was.
    """
    model = read_checkpoint(checkpoint)
    request = _resolve(model, steps=steps, shift=shift, precision=precision, size_px=size_px, batch=batch)
    versions = toolchain()
    _require_finite(model)
    source = Source(
        name=name or str(model.run.get("name") or checkpoint.resolve().name),
        checkpoint_sha256=checkpoint_sha256(checkpoint),
        licence=licence or str(model.run.get("licence") or "unknown"),
        origin=origin or checkpoint.resolve().name,
    )
    try:
        with assembled(out) as folder:
            manifest = _write(request, folder, source, versions, report)
            (folder / EXPORT_FILE).write_text(to_json(manifest), encoding="utf-8")
    except OSError as exc:
        raise ExportError(f"cannot write the graphs folder {out}: {exc}; nothing was left there") from exc
    report(f"graphs in {out}")
    return manifest


def _resolve(
    checkpoint: Checkpoint, *, steps: Sequence[int], shift: int | None, precision: str, size_px: int | None, batch: int
) -> _Request:
    if precision not in PRECISIONS:
        raise ConfigError(f"precision {precision!r} cannot be exported; available: {', '.join(PRECISIONS)}")
    if batch < 1:
        raise ConfigError(f"batch must be 1 or more, got {batch}")
    if not steps or len(set(steps)) != len(steps):
        raise ConfigError(f"steps must name each step count once, got {tuple(steps)}; available: 1, 2, 3, 4")
    size = checkpoint.native_size_px if size_px is None else size_px
    multiple = checkpoint.size_multiple
    if size < multiple or size % multiple:
        below = max(multiple, size // multiple * multiple)
        raise ConfigError(f"size {size} is not a multiple of {multiple}, which this UNet and VAE need; nearest: {below}")
    resolved = _shift(checkpoint) if shift is None else shift
    alphas = alphas_cumprod_from_config(checkpoint.scheduler)
    return _Request(
        checkpoint=checkpoint,
        schedules={count: step_schedule(count, resolved, alphas) for count in sorted(steps)},
        shift=resolved,
        precision=precision,
        size_px=size,
        batch=batch,
    )


def _require_finite(checkpoint: Checkpoint) -> None:
    """Before any network computes: a NaN among the weights would look like an overflow in the graph's number type.

    Files that were looked at are remembered, so that this costs no second reading. Raises: ExportError naming the tensors.
    """
    for part in WEIGHT_STEMS:
        for path in weight_files(checkpoint, part):
            sha256_of_finite(path)


def _shift(checkpoint: Checkpoint) -> int:
    shift = checkpoint.run.get("shifted_timestep")
    if shift is None:
        raise ConfigError(
            f"{checkpoint.folder} has no run.json with a shifted_timestep, and no shift was given; "
            "say which it was trained with (250 for NitroSD-Realism, 500 for NitroSD-Vibrant)"
        )
    if not isinstance(shift, int) or isinstance(shift, bool):
        raise ConfigError(f"{checkpoint.folder / 'run.json'}: shifted_timestep must be a whole number, found {shift!r}")
    return shift


@contextmanager
def assembled(out: Path) -> Iterator[Path]:
    """A hidden sibling of `out` to write into; it becomes `out` at the end, or vanishes if the body fails.

    What a killed export left is removed by the next one. Exports to the same `out` wait for each other.
    """
    parent = out.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    with FileLock(parent / f".{out.name}.lock"):
        if out.exists():
            raise ExportError(f"{out} is there already; remove it or choose another folder")
        for leftover in parent.glob(f".{out.name}.*.partial"):
            shutil.rmtree(leftover)
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=parent))
        try:
            yield folder
            folder.chmod(0o755)  # mkdtemp's is private
            os.replace(folder, out)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _write(request: _Request, folder: Path, source: Source, versions: dict[str, str], report: Report) -> GraphsManifest:
    # Loaded here, not above: a wrong request is refused before torch takes seconds to load.
    from nitro_export.graph import WeightFiles
    from nitro_export.tokenizer import write_tokenizer

    model, files = request.checkpoint, WeightFiles(folder=folder)
    tokenizers = tuple(
        write_tokenizer(
            model.folder / part, folder / f"{part}.json", num_tokens=model.num_tokens, vocab_size=config["vocab_size"]
        )
        for part, config in zip(("tokenizer", "tokenizer_2"), model.text_encoders, strict=True)
    )
    manifest = GraphsManifest(
        schema_version=SCHEMA_VERSION,
        source=source,
        schedule=ScheduleSpec(shift=request.shift, steps=request.schedules),
        size_px=request.size_px,
        batch=request.batch,
        precision=request.precision,
        text=_text(request, files, report),
        denoise=_denoise(request, files, report),
        decode=_decode(request, files, report),
        tokenizers=tokenizers,
        toolchain=versions,
    )
    report(files.summary())
    return manifest


def _text(request: _Request, files: WeightFiles, report: Report) -> Graph:
    from nitro_export.stages import TextStage

    model = request.checkpoint
    parts = _Parts.of(model, "text_encoder", "text_encoder_2")
    stage = TextStage(*parts.modules, batch=request.batch, num_tokens=model.num_tokens).eval()
    inputs = [_token_ids(stage.inputs, model.text_encoders)]
    return _graphs(files, parts, {"text": (stage, inputs)}, request.precision, report)["text"]


def _denoise(request: _Request, files: WeightFiles, report: Report) -> dict[int, Graph]:
    import torch

    from nitro_export.loading import fill
    from nitro_export.stages import DenoiseNetwork, DenoiseStage

    parts = _Parts.of(request.checkpoint, "unet", size_px=request.size_px)
    if not parts.compared:
        fill(parts.modules[0], parts.stored["unet"], torch.float32, "time_embedding.")  # the tables are made of it
    network = DenoiseNetwork(parts.modules[0])
    stages = {}
    for count, schedule in request.schedules.items():
        stage = DenoiseStage(
            network,
            schedule,
            size_px=request.size_px,
            latent_size=request.latent_size,
            batch=request.batch,
            num_tokens=request.checkpoint.num_tokens,
        ).eval()
        stages[f"denoise-{count}"] = (stage, [_step_inputs(stage.inputs, index) for index in range(count)])
    graphs = _graphs(files, parts, stages, request.precision, report)
    return {count: graphs[f"denoise-{count}"] for count in request.schedules}


def _decode(request: _Request, files: WeightFiles, report: Report) -> Graph:
    from nitro_export.stages import DecodeStage

    parts = _Parts.of(request.checkpoint, "vae", size_px=request.size_px)
    (vae,) = parts.modules
    stage = DecodeStage(vae, latent_size=request.latent_size, size_px=request.size_px, batch=request.batch).eval()
    precision, note = request.precision, ""
    if precision == "fp16" and vae.config.force_upcast:
        precision, note = "fp32", "float32: force_upcast in the VAE's config says that it overflows in float16"
        report(f"decode: computes in {note}")
    inputs = [_seeded(stage.inputs, seed) for seed in (0, 1)]
    return _graphs(files, parts, {"decode": (stage, inputs)}, precision, report, note=note)["decode"]


@dataclass(frozen=True, kw_only=True)
class _Parts:
    """The networks of one kind of stage: modules without values, and where their values are stored."""

    modules: tuple[Any, ...]
    stored: dict[str, dict[str, StoredTensor]]
    num_tiles: float
    """How often the weights are used, in 64x64 pixels of image; 1 for text."""

    @classmethod
    def of(cls, checkpoint: Checkpoint, *names: str, size_px: int = 64) -> _Parts:
        import torch

        from nitro_export.loading import empty_part_of_graph, fill

        found = {name: empty_part_of_graph(checkpoint, name) for name in names}
        parts = cls(
            modules=tuple(module for module, _ in found.values()),
            stored={name: stored for name, (_, stored) in found.items()},
            num_tiles=(size_px / 64) ** 2,
        )
        if parts.compared:
            for module, stored in found.values():
                fill(module, stored, torch.float32)
        return parts

    @property
    def num_bytes(self) -> int:
        return sum(tensor.num_bytes for stored in self.stored.values() for tensor in stored.values())

    @property
    def compared(self) -> bool:
        """Whether the modules get their values, so that the graphs can be compared with them."""
        return self.num_bytes * self.num_tiles <= PARITY_BYTES

    def of_stage(self, stage: Stage) -> dict[str, StoredTensor]:
        """By the names that the stage has for its parameters."""
        return {prefix + name: tensor for prefix, part in stage.parts.items() for name, tensor in self.stored[part].items()}


def _graphs(
    files: WeightFiles,
    parts: _Parts,
    stages: Mapping[str, tuple[Stage, list[tuple[Tensor, ...]]]],
    precision: str,
    report: Report,
    *,
    note: str = "",
) -> dict[str, Graph]:
    """Export the graphs of one kind, all from one network, and compare each with torch on its inputs."""
    import torch

    from nitro_export import parity
    from nitro_export.graph import graphs_from_stages

    started = time.perf_counter()
    dtype = getattr(torch, DTYPES[precision])
    expected = {}
    if parts.compared:
        expected = {name: parity.references(stage, inputs) for name, (stage, inputs) in stages.items()}
    if precision != "fp32":
        for name, (stage, inputs) in stages.items():
            stage.narrow(dtype)
            if parts.compared:
                parity.check_narrow(name, stage, inputs, expected[name], precision=precision)
    only_stages = {name: stage for name, (stage, _) in stages.items()}
    files_by_name = graphs_from_stages(files, only_stages, parts.of_stage(next(iter(only_stages.values()))), dtype)
    graphs = {}
    for name, (stage, inputs) in stages.items():
        paths = files_by_name[name]
        if parts.compared:
            worst = parity.check_graph(name, paths[0], stage, inputs, expected[name], precision=precision)
            report(f"{name}: exported in {precision}, largest difference from torch {worst:.2g}")
        else:
            worst, unchecked = None, "too large to be compared with torch after its export"
            report(f"{name}: exported in {precision}; {unchecked}")
        graphs[name] = Graph(
            files=tuple(_reference(path) for path in paths),
            inputs=stage.inputs,
            outputs=stage.outputs,
            parity_max_abs=worst,
            compute_dtype=DTYPES[precision],
            note=note if parts.compared else "; ".join(filter(None, (note, unchecked))),
        )
    report(f"{', '.join(stages)}: {time.perf_counter() - started:.1f} s")
    return graphs


def _reference(path: Path) -> FileRef:
    # Weight files are named by their content already, and may have gigabytes.
    digest = path.stem if path.suffix in WEIGHT_SUFFIXES else sha256_of(path)
    return FileRef(path=path.name, sha256=digest, num_bytes=path.stat().st_size)


def _seeded(specs: Sequence[TensorSpec], seed: int) -> tuple[Tensor, ...]:
    """Standard normal float32 tensors: what latents, noise and normalised embeddings look like."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(spec.shape, generator=generator) for spec in specs)


def _step_inputs(specs: Sequence[TensorSpec], step_index: int) -> tuple[Tensor, ...]:
    import torch

    drawn = _seeded(specs, step_index)
    return tuple(torch.tensor([step_index]) if spec.name == "step_index" else t for spec, t in zip(specs, drawn, strict=True))


def _token_ids(specs: Sequence[TensorSpec], configs: Sequence[Mapping[str, Any]]) -> tuple[Tensor, ...]:
    """Ids from all over both vocabularies; the end mark, where the pooled text is read, stands in the middle."""
    import torch

    generator = torch.Generator().manual_seed(0)
    ids = []
    for spec, config in zip(specs, configs, strict=True):
        rows = torch.randint(0, config["vocab_size"] - 2, spec.shape, generator=generator)
        # Old configs say 2, and CLIPTextModel then takes the highest id of the row.
        end = config.get("eos_token_id", config["vocab_size"] - 1)
        rows[:, spec.shape[1] // 2] = config["vocab_size"] - 1 if end == 2 else end
        ids.append(rows)
    return tuple(ids)

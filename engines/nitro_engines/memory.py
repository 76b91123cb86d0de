"""What a build will need, before any work: memory of each step, disk, and what this machine and the GPU have.

Computed from the checkpoint's configs and weight headers in a few milliseconds; no weight is read and torch is not loaded.
Sizes of networks come from the headers, sizes of activations from the architecture's shapes. What a library adds is
measured (docs/memory.md says how) and stands here as a constant.

A step's memory has two halves. Held memory must be there. Mapped memory is pages of weight files: they count in the
process's resident peak, and the system takes them back where it needs them, so they decide nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nitro_engines.files import free_mib
from nitro_engines.host import available_bytes
from nitro_engines.quantisation import MAX_CALIBRATION_PX, QUANTISED, calibration_batch
from nitro_export.export import PARITY_BYTES
from nitro_rt.device import RUNTIMES
from nitro_rt.errors import BuildError

if TYPE_CHECKING:
    from nitro_export import Checkpoint

MIB, GIB = 1 << 20, 1 << 30
FLOAT_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
WEIGHT_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1, "fp8": 1}
PARTS = {"text": ("text_encoder", "text_encoder_2"), "denoise": ("unet",), "decode": ("vae",)}
UNUSED = ("encoder.", "quant_conv.")
"""Of a VAE: the decoder reads latents."""

INTERPRETER = 60 * MIB
"""Python with NumPy and OpenVINO or ONNX Runtime."""
EXPORTER = 500 * MIB
"""Python with torch, diffusers, transformers and the exporter."""
TRACE = 24 << 10
"""Per weight tensor of the UNet: its part of the trace and of the graph."""
LIBRARIES = 130 * MIB
"""Mapped code of torch, or of the TensorRT-RTX compiler."""
BUILT_WHERE_THEY_RUN = ("tensorrt",)
"""GPU backends whose engines the gate runs themselves."""
COMPILER = 230 * MIB
"""TensorRT-RTX without a network. TensorRT's own was not measured and is taken to be the same."""
COMPILER_COPIES = {"text": 1.4, "denoise": 1.95, "decode": 1.95}
"""TensorRT-RTX holds the weights that it read and the plan that it writes; embedding tables are not held twice."""
GRAPH = {"text": 60 * MIB, "denoise": 350 * MIB, "decode": 40 * MIB}
"""OpenVINO's own model of a network, beside its weights."""
COPIES = {"text": 1, "denoise": 1, "decode": 2}
"""How often OpenVINO keeps the weights: those of a decoder are of convolutions, widened and packed beside that."""
PACKING = {"onnxruntime": 1.45}
"""What loading holds at its peak, in packed weights; 1 for OpenVINO, which packs from the mapped files."""

CARDS_GIB = {"sm75": 48, "sm80": 80, "sm86": 48, "sm89": 48, "sm120": 96, "sm121": 128}
"""Memory of the largest card of an architecture: Quadro RTX 8000, A100, RTX A6000, RTX 6000 Ada, RTX PRO 6000, GB10."""
COMMON_CARDS_GIB = (6, 8, 10, 12, 16, 24, 32, 48, 80, 96, 128)


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step of a build, or one stage of a run."""

    name: str
    held_bytes: int
    mapped_bytes: int = 0

    @property
    def peak_bytes(self) -> int:
        """What the process's resident peak will be."""
        return self.held_bytes + self.mapped_bytes


@dataclass(frozen=True, kw_only=True)
class MemoryForecast:
    """The plan, and what there is."""

    weight_bytes: dict[str, int]
    """By stage, in the types that the graphs have."""
    activation_bytes: dict[str, int]
    """By stage: the largest sum of tensors that live at once."""
    steps: tuple[Step, ...]
    """Those that will take place on this machine, in order."""
    disk_bytes: int
    """New on the cache's disk; links to files that are there already take nothing."""
    available_bytes: int
    free_disk_bytes: int
    gpu_bytes: int | None
    """Weights, activations and workspace on the GPU; None for a CPU."""
    targets: tuple[str, ...] = ()

    @property
    def refusals(self) -> tuple[str, ...]:
        """Why it is no go, a sentence each; empty: go."""
        found = [
            f"{step.name} needs {_gib(step.held_bytes)}, {_gib(self.available_bytes)} are available"
            for step in self.steps
            if step.held_bytes > self.available_bytes
        ]
        if self.disk_bytes > self.free_disk_bytes:
            found.append(f"the cache's disk needs {_gib(self.disk_bytes)}, {_gib(self.free_disk_bytes)} are free")
        for target in self.targets:
            if self.gpu_bytes and self.gpu_bytes > CARDS_GIB[target] * GIB:
                found.append(
                    f"running needs {_gib(self.gpu_bytes)} of GPU memory, the largest {target} card has {CARDS_GIB[target]} GiB"
                )
        return tuple(found)

    @property
    def fits(self) -> bool:
        return not self.refusals

    def require(self) -> None:
        """Raises: BuildError with the steps that do not fit, what they need and have, and what to do."""
        if self.refusals:
            raise BuildError(
                f"this build does not fit: {'; '.join(self.refusals)}. Nothing was done. Choose a smaller --size or --batch, "
                "another --precision or --backend, free some memory or disk, or build on a larger machine"
            )

    def lines(self) -> list[str]:
        """For people."""
        weights = ", ".join(f"{stage} {_gib(count)}" for stage, count in self.weight_bytes.items())
        activations = ", ".join(f"{stage} {_gib(count)}" for stage, count in self.activation_bytes.items())
        lines = [f"weights     {weights}", f"activations {activations}"]
        for step in self.steps:
            mapped = f", and maps {_gib(step.mapped_bytes)} of files" if step.mapped_bytes >= GIB // 10 else ""
            lines.append(f"memory      {step.name}: holds {_gib(step.held_bytes)}{mapped}")
        if self.gpu_bytes is not None:
            card = next((size for size in COMMON_CARDS_GIB if size * GIB * 0.92 >= self.gpu_bytes), None)
            lines.append(f"GPU         {_gib(self.gpu_bytes)}: {f'fits a card of {card} GiB' if card else 'fits no card'}")
        lines.append(f"disk        {_gib(self.disk_bytes)} new, {_gib(self.free_disk_bytes)} free")
        verdict = "go" if self.fits else "NO GO: " + "; ".join(self.refusals)
        lines.append(f"available   {_gib(self.available_bytes)} of memory: {verdict}")
        return lines

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        steps = [{"name": s.name, "held_bytes": s.held_bytes, "mapped_bytes": s.mapped_bytes} for s in self.steps]
        return {
            "weight_bytes": self.weight_bytes,
            "activation_bytes": self.activation_bytes,
            "steps": steps,
            "disk_bytes": self.disk_bytes,
            "gpu_bytes": self.gpu_bytes,
            "available_bytes": self.available_bytes,
            "free_disk_bytes": self.free_disk_bytes,
            "fits": self.fits,
            "refusals": list(self.refusals),
        }


def plan_memory(
    checkpoint: Checkpoint,
    *,
    precision: str,
    num_steps: tuple[int, ...],
    size_px: int,
    batch: int,
    backend: str,
    compute_dtype: str,
    provider: str | None = None,
    targets: tuple[str, ...] = (),
    cache_root: Path,
    exported: bool = False,
    built: frozenset[str] = frozenset(),
    gated: bool = False,
    available: int | None = None,
    stored_at: Path | None = None,
    assembled_bytes: int = 0,
) -> MemoryForecast:
    """The plan of one build.

    Args:
        precision: fp32, fp16, bf16, int8 or fp8.
        num_steps: the step counts that the bundle serves.
        backend: openvino, onnxruntime, tensorrt or tensorrt-rtx.
        compute_dtype: what the backend computes in on its target.
        provider: what ONNX Runtime runs on; None stands for cpu.
        cache_root: where files are written.
        exported: the graphs are in the cache already.
        built: stages whose engines are: `text`, `denoise/1`, ..., `decode`.
        gated: the bundle and its float32 parent draw before it is published.
        available: bytes of memory; None: as this machine says now.
        stored_at: on which file system the weight files will be when they are exported; None: where `checkpoint` is.
        assembled_bytes: what is written there before, to make the checkpoint of its parts.
    Raises: ExportError if a weight file's header is damaged.
    """
    networks = {stage: _network(checkpoint, stage) for stage in PARTS}
    numbers = {stage: network.numbers for stage, network in networks.items()}
    quantised = precision in QUANTISED
    floats = {stage: count * WEIGHT_BYTES["fp16" if quantised else precision] for stage, count in numbers.items()}
    weights = {stage: count if quantised and stage != "text" else floats[stage] for stage, count in numbers.items()}
    activations = activation_numbers(checkpoint, size_px=size_px, batch=batch)
    on_cpu = backend not in RUNTIMES and provider in (None, "cpu")
    width = FLOAT_BYTES[compute_dtype]
    steps: list[Step] = []
    if not exported:
        steps += _export_steps(networks, floats, activations, size_px)
        if quantised:
            watched_px = min(size_px, MAX_CALIBRATION_PX)
            watched = activation_numbers(checkpoint, size_px=watched_px, batch=calibration_batch(watched_px))
            steps.append(_parent("calibrating the denoiser", networks, watched, ("text", "denoise")))
            steps.append(_parent("calibrating the decoder", networks, watched, ("decode",)))
            steps.append(_quantise(networks))
    if gated:
        steps.append(_parent("drawing the references", networks, activations, tuple(PARTS)))  # all stay for the next picture
    denoisers = {f"denoise/{count}" for count in num_steps} - built
    # One engine for all step counts, with the weights once.
    denoise = [f"denoise/{','.join(map(str, num_steps))}"] if denoisers else []
    to_build = [stage for stage in ("text", *denoise, "decode") if stage not in built]
    steps += [_build(backend, stage, weights) for stage in to_build]
    if on_cpu or (gated and backend not in BUILT_WHERE_THEY_RUN):
        # Where the bundle's own engines cannot run here, the gate runs its graphs on OpenVINO.
        steps.append(_run(backend, numbers, weights, activations, width if on_cpu else 4, precision))
    return MemoryForecast(
        weight_bytes=weights,
        activation_bytes={stage: count * width for stage, count in activations.items()},
        steps=tuple(steps),
        disk_bytes=assembled_bytes
        + _disk(checkpoint, stored_at or checkpoint.folder, floats, weights, backend, to_build, cache_root, exported),
        available_bytes=available_bytes() if available is None else available,
        free_disk_bytes=free_mib(cache_root) * MIB,
        gpu_bytes=None if on_cpu else sum(weights.values()) + max(activations.values()) * width * 2,
        targets=() if on_cpu else targets,
    )


def activation_numbers(checkpoint: Checkpoint, *, size_px: int, batch: int) -> dict[str, int]:
    """By stage, the most numbers that live at once while it runs, with attention that keeps no matrix of scores.

    text: the widest layer's states. denoise: everything that skips to the way up, and the widest feed-forward's two halves
    and their product. decode: the input of the last block at full resolution, its normalised copy, and the way around.
    """
    side = size_px // checkpoint.vae_factor
    tokens = batch * checkpoint.num_tokens
    wide = [int(config["hidden_size"]) for config in checkpoint.text_encoders]
    hidden = [int(c.get("intermediate_size", 4 * w)) for c, w in zip(checkpoint.text_encoders, wide, strict=True)]
    text = max(tokens * (inner + 4 * outer) for inner, outer in zip(hidden, wide, strict=True))
    widths = [int(width) for width in checkpoint.unet["block_out_channels"]]
    layers = int(checkpoint.unet.get("layers_per_block", 2))
    places = [batch * (side >> level) ** 2 for level in range(len(widths))]
    skips = widths[0] * places[0]
    for level, width in enumerate(widths):
        last = level == len(widths) - 1
        skips += layers * width * places[level] + (0 if last else width * places[level + 1])
    widest = max(2 * 8 * width * place for width, place in zip(widths[1:] or widths, places[1:] or places, strict=True))
    joined = 3 * (widths[0] + widths[min(1, len(widths) - 1)]) * places[0]
    return {"text": text, "denoise": skips + max(widest, joined), "decode": _decode_numbers(checkpoint.vae, size_px, batch)}


def _decode_numbers(vae: Mapping[str, Any], size_px: int, batch: int) -> int:
    pixels = batch * size_px**2
    if "decoder_block_out_channels" in vae:  # AutoencoderTiny: one width throughout
        return 3 * int(vae["decoder_block_out_channels"][0]) * pixels
    widths = [int(width) for width in vae["block_out_channels"]]
    entering = widths[min(1, len(widths) - 1)]  # what the last upsampling gives to the last block
    return 3 * entering * pixels


@dataclass(frozen=True, kw_only=True)
class _Network:
    """One stage's networks, from the headers of their weight files."""

    numbers: int
    num_tensors: int
    largest: int
    """Numbers in the largest tensor."""
    stored_bytes: int


def _network(checkpoint: Checkpoint, stage: str) -> _Network:
    from nitro_export.checkpoint import weight_files
    from nitro_export.stored import stored_tensors

    tensors = [
        tensor
        for part in PARTS[stage]
        for name, tensor in stored_tensors(weight_files(checkpoint, part)).items()
        if part != "vae" or not name.startswith(UNUSED)
    ]
    sizes = [math.prod(tensor.shape) for tensor in tensors]
    return _Network(
        numbers=sum(sizes),
        num_tensors=len(sizes),
        largest=max(sizes, default=0),
        stored_bytes=sum(tensor.num_bytes for tensor in tensors),
    )


def _file_bytes(checkpoint: Checkpoint) -> int:
    from nitro_export.checkpoint import weight_files

    return sum(path.stat().st_size for names in PARTS.values() for part in names for path in weight_files(checkpoint, part))


def _export_steps(
    networks: Mapping[str, _Network], weights: Mapping[str, int], activations: Mapping[str, int], size_px: int
) -> Iterator[Step]:
    largest = max(network.largest for network in networks.values())
    tracing = EXPORTER + TRACE * networks["denoise"].num_tensors
    compared = 0
    for stage, network in networks.items():
        tiles = 1.0 if stage == "text" else (size_px / 64) ** 2
        if network.stored_bytes * tiles <= PARITY_BYTES:  # compared: once in torch, once in ONNX Runtime
            compared = max(compared, 2 * 4 * (network.numbers + activations[stage]))
    same_type = all(0.9 * weights[stage] < network.stored_bytes < 1.1 * weights[stage] for stage, network in networks.items())
    yield Step(name="exporting", held_bytes=tracing + max(compared, 0 if same_type else 10 * largest), mapped_bytes=LIBRARIES)


def _quantise(networks: Mapping[str, _Network]) -> Step:
    """One tensor at a time: as it is stored, widened, rounded, and its codes."""
    largest = max(network.largest for stage, network in networks.items() if stage != "text")
    return Step(name="quantising", held_bytes=EXPORTER + 8 * largest, mapped_bytes=LIBRARIES)


def _parent(name: str, networks: Mapping[str, _Network], activations: Mapping[str, int], stages: tuple[str, ...]) -> Step:
    """The checkpoint in float32 under torch: weights mapped, the largest layer widened, activations once more beside.

    Args:
        stages: those whose weights are mapped at once.
    """
    largest = max(network.largest for network in networks.values())
    held = EXPORTER + 4 * largest + 4 * 2 * max(activations[stage] for stage in stages)
    return Step(name=name, held_bytes=held, mapped_bytes=LIBRARIES + sum(networks[stage].stored_bytes for stage in stages))


def _build(backend: str, stage: str, weights: Mapping[str, int]) -> Step:
    kind = stage.partition("/")[0]
    if backend in RUNTIMES:
        held = COMPILER + int(COMPILER_COPIES[kind] * weights[kind])
        return Step(name=f"compiling {stage}", held_bytes=held, mapped_bytes=LIBRARIES + weights[kind])
    return Step(name=f"checking {stage}", held_bytes=INTERPRETER + GRAPH[kind] // 3)  # both map the weights and read none


def _run(
    backend: str,
    numbers: Mapping[str, int],
    weights: Mapping[str, int],
    activations: Mapping[str, int],
    width: int,
    precision: str,
) -> Step:
    """All stages loaded, the largest running. A CPU backend packs every weight in the type that it computes in."""
    packed = sum(
        GRAPH[stage] + COPIES[stage] * numbers[stage] * (1 if precision == "int8" and stage != "text" else width)
        for stage in PARTS
    )
    packed = int(packed * PACKING.get(backend, 1.0))
    live = sum(activations[stage] * width for stage in PARTS)
    return Step(name="running on this CPU", held_bytes=INTERPRETER + packed + live, mapped_bytes=sum(weights.values()))


def _disk(
    checkpoint: Checkpoint,
    stored_at: Path,
    floats: Mapping[str, int],
    weights: Mapping[str, int],
    backend: str,
    to_build: list[str],
    cache_root: Path,
    exported: bool,
) -> int:
    new = 0
    if not exported:
        stored, total = _file_bytes(checkpoint), sum(floats.values())
        linked = _existing(cache_root).stat().st_dev == _existing(stored_at).stat().st_dev
        same_type = 0.9 * stored < total < 1.1 * stored
        new += (0 if linked else stored) if same_type else total
        new += sum(weights[stage] for stage in PARTS if weights[stage] != floats[stage])
    if backend in RUNTIMES:
        new += sum(weights[stage.partition("/")[0]] for stage in to_build)
    return new


def _existing(path: Path) -> Path:
    return next(found for found in (path, *path.parents) if found.exists())


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.1f} GiB" if num_bytes >= GIB // 10 else f"{num_bytes / MIB:.0f} MiB"

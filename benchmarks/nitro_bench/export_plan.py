"""The measurements of `export`: which child processes run, in which order, and what each needs of others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nitro_rt.errors import ConfigError

NATIVE_PX = {"full": 1024, "half": 512, "tiny": 64}
SAMPLES = (("a red apple on the table", 7), ("a city at night, oil painting", 8))
"""Prompt and seed of the images that graphs are compared on."""
FLOOR_DB = {"fp32": 40.0, "fp16": 30.0, "bf16": 20.0, "int8": 10.0, "fp8": 8.0}
"""How near to float32 a stage must be, by precision, before it is timed."""
FLOAT_SIDES = ("diffusers-fp32", "diffusers-compile-fp32")
"""The peers in the precision that a processor without BF16 runs best."""
OUR_SIDES = ("openvino-fp16", "openvino-fp32", "openvino-int8", "onnxruntime-fp32")
"""Our graphs on both runtimes that bundles for a CPU have."""
OPTIMUM = "_export_optimum"
"""The child that runs under optimum's interpreter."""


@dataclass(frozen=True, kw_only=True)
class ExportBenchConfig:
    """Everything that is to be measured."""

    work: Path
    """Checkpoints, graphs, bundles and results."""
    sizes: tuple[str, ...] = ("half", "full")
    latency_px: tuple[int, ...] = (512, 1024)
    """Only those up to a checkpoint's own size are timed on it."""
    rounds: int = 2
    """Processes per side, in turns."""
    num_calls: int = 1
    """Timed in each process, after one that is compared with the reference."""
    num_prompts: int = 2
    """Of the calibration."""
    bf16_sizes: tuple[str, ...] = ("half",)
    """Checkpoints on which the peers are also timed in bfloat16; `full` too on a processor that has it."""
    weight_bits: int = 8
    """Of INT8; 7 on processors whose 8-bit multiplication saturates (x86 without VNNI or AMX)."""
    optimum_python: Path | None = None
    """Of an environment with export-peer-requirements.txt; None: optimum is not measured now."""
    limit_gib: float = 21.0
    """Memory of its own that optimum's process may have."""
    limit_s: float = 3600.0
    """Of any one process."""

    def __post_init__(self) -> None:
        unknown = sorted(set(self.sizes) - set(NATIVE_PX))
        if unknown or not self.sizes:
            raise ConfigError(f"sizes must be of {', '.join(NATIVE_PX)}, got {', '.join(self.sizes) or 'none'}")
        if self.rounds < 1 or self.num_calls < 1 or self.num_prompts < 1:
            raise ConfigError("rounds, num_calls and num_prompts must be 1 or more")
        if self.weight_bits not in (7, 8):
            raise ConfigError(f"weight_bits must be 7 or 8, got {self.weight_bits}")


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One child process."""

    name: str
    """<size>/<kind>/...; also the path of its result."""
    child: str
    """Module in this package, without the package."""
    request: dict[str, Any]
    needs: tuple[str, ...] = ()
    """Measurements whose files it reads."""
    out: Path | None = None
    """What it makes; a leftover of a process that was killed is removed first."""


def measurements(config: ExportBenchConfig) -> list[Measurement]:
    """All that the report speaks of, in the order in which they run."""
    return [measurement for size in config.sizes for measurement in _Plan(config, size).measurements()]


@dataclass(frozen=True)
class _Plan:
    """The measurements of one checkpoint."""

    config: ExportBenchConfig
    size: str

    @property
    def checkpoint(self) -> Path:
        return self.config.work / "checkpoints" / f"sdxl-{self.size}"

    @property
    def native_px(self) -> int:
        return NATIVE_PX[self.size]

    @property
    def latency_px(self) -> list[int]:
        return [px for px in self.config.latency_px if px <= self.native_px] or [self.native_px]

    def measurements(self) -> Iterator[Measurement]:
        yield self._measurement("checkpoint", "_export_ours", {"job": "checkpoint", "size": self.size}, out=self.checkpoint)
        sizes_px = sorted({self.native_px, *self.latency_px}, reverse=True)
        for px in sizes_px:
            for precision in ("fp16", "fp32"):
                yield self._ours(f"export/nitro-rt-{precision}@{px}", "export", {"precision": precision, "size_px": px})
        yield from self._peers()
        yield from self._quantised(sizes_px)
        builds = [("openvino", "fp16"), ("openvino", "int8"), ("tensorrt-rtx", "fp16"), ("tensorrt-rtx", "int8-symmetric")]
        for backend, precision in builds:
            graphs = self._graphs(precision, self.native_px)
            targets = ("sm89",) if backend == "tensorrt-rtx" else ()
            request = {"backend": backend, "targets": targets, "graphs": str(self._path(graphs))}
            yield self._ours(f"build/{backend}-{precision}", "build", request, (graphs,))
        for px in sizes_px:
            yield self._reference(px)
            if px in self.latency_px:
                yield from self._latencies(px)
        yield from self._qualities(self.native_px)

    def _quantised(self, sizes_px: list[int]) -> Iterator[Measurement]:
        """A recipe of each kind, and the graphs in it: INT8 for this processor, INT8 for TensorRT, FP8."""
        kinds = {
            "int8": {"precision": "int8", "symmetric": False, "weight_bits": self.config.weight_bits},
            "int8-symmetric": {"precision": "int8", "symmetric": True, "weight_bits": 8},
            "fp8": {"precision": "fp8", "symmetric": True, "weight_bits": 8},
        }
        for kind, options in kinds.items():
            # The smallest size that is served: ranges hardly depend on it, and the parent runs in float32.
            request = options | {"size_px": min(sizes_px), "num_prompts": self.config.num_prompts}
            yield self._ours(f"calibrate/{kind}", "calibrate", request)
            for px in sizes_px if kind == "int8" else [self.native_px]:  # only that one is also timed
                needs = (f"calibrate/{kind}", f"export/nitro-rt-fp16@{px}")
                paths = {"recipe": str(self._path(needs[0])), "graphs": str(self._path(needs[1]))}
                yield self._ours(f"quantise/{kind}@{px}", "quantise", paths, needs)

    def _peers(self) -> Iterator[Measurement]:
        for part in ("unet", "decode"):
            request = {"part": part, "precision": "fp16", "size_px": self.native_px, "checkpoint": str(self.checkpoint)}
            yield self._measurement(f"export/torch-{part}", "_export_plain", request, ("checkpoint",))
        # It runs the network that it traces, which no CPU without float16 arithmetic does in hours (0.1 GFLOP/s were measured).
        request = {"checkpoint": str(self.checkpoint), "dtype": "fp32", "limit_bytes": int(self.config.limit_gib * 2**30)}
        yield self._measurement("export/optimum-fp32", OPTIMUM, request, ("checkpoint",))

    def _reference(self, px: int) -> Measurement:
        request = {
            "checkpoint": str(self.checkpoint),
            "size_px": px,
            "samples": SAMPLES if px == self.native_px else SAMPLES[:1],
        }
        out = self._path(f"reference@{px}").with_suffix(".npz")
        return self._measurement(f"reference@{px}", "_export_reference", request, ("checkpoint",), out=out)

    def _latencies(self, px: int) -> Iterator[Measurement]:
        sides = (*OUR_SIDES, *FLOAT_SIDES, *(("diffusers-bf16",) if self.size in self.config.bf16_sizes else ()))
        for stage in ("denoise", "decode"):
            for round_ in range(1, self.config.rounds + 1):
                for name in sides:
                    side, _, precision = name.rpartition("-")
                    request = {
                        "side": side,
                        "precision": precision,
                        "stage": stage,
                        "size_px": px,
                        "checkpoint": str(self.checkpoint),
                        "reference": str(self._path(f"reference@{px}").with_suffix(".npz")),
                        "floor_db": FLOOR_DB[precision],
                        "num_calls": self.config.num_calls,
                    }
                    needs: tuple[str, ...] = ("checkpoint", f"reference@{px}")
                    if not side.startswith("diffusers"):
                        graphs = self._graphs(precision, px)
                        request["graphs"], needs = str(self._path(graphs)), (*needs, graphs)
                    yield self._measurement(f"latency@{px}/{stage}/{name}/{round_}", "_export_latency", request, needs)

    def _qualities(self, px: int) -> Iterator[Measurement]:
        reference = f"reference@{px}"
        for precision in ("fp16", "int8", "fp8"):
            for side in ("openvino", "onnxruntime-as-written"):
                graphs = self._graphs(precision, px)
                request = {
                    "side": side,
                    "graphs": str(self._path(graphs)),
                    "reference": str(self._path(reference).with_suffix(".npz")),
                    "num_images": len(SAMPLES),
                }
                yield self._measurement(f"quality/{precision}/{side}", "_export_quality", request, (reference, graphs))

    @staticmethod
    def _graphs(precision: str, px: int) -> str:
        return f"export/nitro-rt-{precision}@{px}" if precision in ("fp16", "fp32") else f"quantise/{precision}@{px}"

    def _ours(self, name: str, job: str, request: dict[str, Any], needs: tuple[str, ...] = ()) -> Measurement:
        given = request | {"job": job, "checkpoint": str(self.checkpoint)}
        return self._measurement(name, "_export_ours", given, ("checkpoint", *needs))

    def _measurement(
        self, name: str, child: str, request: dict[str, Any], needs: tuple[str, ...] = (), *, out: Path | None = None
    ) -> Measurement:
        place = out or self._path(name)
        return Measurement(
            name=f"{self.size}/{name}",
            child=child,
            request=request | {"out": str(place)},
            needs=tuple(f"{self.size}/{need}" for need in needs),
            out=None if child in ("_export_latency", "_export_quality") else place,
        )

    def _path(self, name: str) -> Path:
        return self.config.work / self.size / name

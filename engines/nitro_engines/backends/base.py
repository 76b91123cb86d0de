"""What a backend is, and the mapping from its name to the factory that imports its library."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Protocol

from nitro_engines.progress import Progress
from nitro_rt.device import RUNTIMES
from nitro_rt.errors import BackendUnavailable, BuildError, ConfigError
from nitro_rt.manifest import Graph, TensorSpec

SEED_TIMING = "seed.timing"
TIMING_SUFFIX = ".timing"
"""Of an engine's file that is no part of what runs: the times that its kernels were chosen by."""


class Backend(Protocol):
    """Turns one ONNX graph into engine files. Everything but `compile` is cheap: it goes into keys and plans."""

    name: str

    def toolchain(self) -> dict[str, str]:
        """Package -> version, of everything that shapes the engine."""
        ...

    def target(self) -> dict[str, str]:
        """The machine or GPUs that the engine is for: only what decides it."""
        ...

    def options(self, graph_dtype: str) -> dict[str, str]:
        """What the executor must set when it loads the engine."""
        ...

    def compute_dtype(self, graph_dtype: str) -> str:
        """What the engine of a graph in float32 or float16 computes in: float32, float16, bfloat16.

        Raises: ConfigError if the backend cannot run such graphs on its target.
        """
        ...

    def compile(self, onnx_path: Path, graph: Graph, work: Path, progress: Progress | None = None) -> list[Path]:
        """Write the engine's files into `work`, the one to load first.

        Args:
            work: empty, but perhaps for `SEED_TIMING`: the timing cache of an earlier build, to choose the same kernels again.
            progress: takes the phases of a long compilation.
        Raises: BuildError if the graph is refused, its inputs and outputs differ from the manifest's, or the engine would
            compute in another type than the graph.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What is said about a backend beside its name."""

    targets: tuple[str, ...]
    provider: str | None
    refit: bool


def load_backend(name: str, targets: Sequence[str] = (), *, provider: str | None = None, refit: bool = False) -> Backend:
    """The backend of this name, its library imported.

    Args:
        targets: GPU architectures (`sm89`) for backends that build for another machine.
        provider: what ONNX Runtime is to run on: cpu (its default), cuda, tensorrt.
        refit: engines of TensorRT and TensorRT-RTX that take new weights when they are loaded.
    Raises: ConfigError for an unknown name, target or provider, and for what means nothing to this backend;
        BackendUnavailable if the library is missing.
    """
    factory = _FACTORIES.get(name)
    if factory is None:
        raise ConfigError(f"--backend {name!r} is unknown; available: {', '.join(available_backends())}")
    if provider is not None and name != "onnxruntime":
        raise ConfigError(f"--provider {provider} means nothing to --backend {name}; it is of --backend onnxruntime")
    if refit and name not in RUNTIMES:
        raise ConfigError(
            f"--refit means nothing to --backend {name}, whose engines keep their weights; it is of {', '.join(RUNTIMES)}. "
            "A LoRA is fused by --lora"
        )
    return factory(Choices(targets=tuple(targets), provider=provider, refit=refit))


def available_backends() -> tuple[str, ...]:
    return tuple(_FACTORIES)


def _openvino(choices: Choices) -> Backend:
    _refuse_targets("openvino", choices.targets)
    try:
        from nitro_engines.backends.openvino_graph import OpenVinoBackend
    except ImportError as exc:
        raise _missing("openvino", "cpu,export", exc) from exc
    return OpenVinoBackend()


def _onnxruntime(choices: Choices) -> Backend:
    provider = choices.provider or "cpu"
    _refuse_targets("onnxruntime", choices.targets, "this CPU" if provider == "cpu" else "every GPU")
    try:
        from nitro_engines.backends.onnx_file import OnnxRuntimeBackend
    except ImportError as exc:
        raise _missing("onnxruntime", "cpu,export", exc) from exc
    return OnnxRuntimeBackend(provider)


def _tensorrt_rtx(choices: Choices) -> Backend:
    # The targets are checked without the library, so that a wrong one is named wherever it is asked for.
    from nitro_engines.backends.rtx_targets import capabilities

    wanted = capabilities(choices.targets)
    try:
        from nitro_engines.backends.rtx_plan import TensorRtRtxBackend
    except ImportError as exc:
        raise _missing("tensorrt-rtx", "tensorrt-rtx,export", exc) from exc
    return TensorRtRtxBackend(wanted, refit=choices.refit)


def _tensorrt(choices: Choices) -> Backend:
    _refuse_targets("tensorrt", choices.targets, "the GPU of this machine")
    try:
        from nitro_engines.backends.trt_plan import TensorRtBackend
    except ImportError as exc:
        elsewhere = "; tensorrt-rtx builds for RTX cards on any machine: --backend tensorrt-rtx --target sm89"
        raise BackendUnavailable(f"{_missing('tensorrt', 'tensorrt,export', exc)}{elsewhere}") from exc
    return TensorRtBackend(refit=choices.refit)


_FACTORIES: dict[str, Callable[[Choices], Backend]] = {
    "openvino": _openvino,
    "onnxruntime": _onnxruntime,
    "tensorrt-rtx": _tensorrt_rtx,
    "tensorrt": _tensorrt,
}


def version(*distributions: str) -> str:
    """The version of the first of these distributions that is installed."""
    for name in distributions:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    raise BackendUnavailable(f"none of {', '.join(distributions)} is installed")


def check_bindings(found: Sequence[TensorSpec], expected: Sequence[TensorSpec], kind: str, onnx_path: Path) -> None:
    """The compiled engine's inputs or outputs are the manifest's, in name, type, shape and order."""
    if tuple(found) == tuple(expected):
        return
    raise BuildError(
        f"{onnx_path.name}: the backend sees the {kind} {_listed(found)}, export.json says {_listed(expected)}; export again"
    )


def _listed(specs: Sequence[TensorSpec]) -> str:
    return ", ".join(f"{spec.name} {spec.dtype}{list(spec.shape)}" for spec in specs)


def _refuse_targets(name: str, targets: tuple[str, ...], builds_for: str = "this CPU") -> None:
    if targets:
        asked = ",".join(targets)
        raise ConfigError(f"--target {asked} means nothing to --backend {name}, which builds for {builds_for}; leave it out")


def _missing(name: str, extras: str, exc: ImportError) -> BackendUnavailable:
    library = exc.name or name
    return BackendUnavailable(f"--backend {name} needs {library}, which is not installed: pip install 'nitro-rt[{extras}]'")

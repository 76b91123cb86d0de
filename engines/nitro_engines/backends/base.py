"""What a backend is, and the mapping from its name to the factory that imports its library."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Protocol

from nitro_rt.errors import BackendUnavailable, BuildError, ConfigError
from nitro_rt.manifest import Graph, TensorSpec


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

    def compile(self, onnx_path: Path, graph: Graph, work: Path) -> list[Path]:
        """Write the engine's files into `work`, the one to load first.

        Raises: BuildError if the graph is refused or its inputs and outputs differ from the manifest's.
        """
        ...


def load_backend(name: str, targets: Sequence[str] = ()) -> Backend:
    """The backend of this name, its library imported.

    Args:
        targets: GPU architectures (`sm89`) for backends that build for another machine.
    Raises: ConfigError for an unknown name or target; BackendUnavailable if the library is missing.
    """
    factory = _FACTORIES.get(name)
    if factory is None:
        raise ConfigError(f"--backend {name!r} is unknown; available: {', '.join(available_backends())}")
    return factory(tuple(targets))


def available_backends() -> tuple[str, ...]:
    return tuple(name for name in _FACTORIES if name != "tensorrt")


def _openvino(targets: tuple[str, ...]) -> Backend:
    _refuse_targets("openvino", targets)
    try:
        from nitro_engines.backends.openvino_graph import OpenVinoBackend
    except ImportError as exc:
        raise _missing("openvino", "cpu,export", exc) from exc
    return OpenVinoBackend()


def _onnxruntime(targets: tuple[str, ...]) -> Backend:
    _refuse_targets("onnxruntime", targets)
    try:
        from nitro_engines.backends.onnx_file import OnnxRuntimeBackend
    except ImportError as exc:
        raise _missing("onnxruntime", "cpu,export", exc) from exc
    return OnnxRuntimeBackend()


def _tensorrt_rtx(targets: tuple[str, ...]) -> Backend:
    # The targets are checked without the library, so that a wrong one is named wherever it is asked for.
    from nitro_engines.backends.rtx_targets import capabilities

    wanted = capabilities(targets)
    try:
        from nitro_engines.backends.rtx_plan import TensorRtRtxBackend
    except ImportError as exc:
        raise _missing("tensorrt-rtx", "tensorrt-rtx,export", exc) from exc
    return TensorRtRtxBackend(wanted)


def _tensorrt(targets: tuple[str, ...]) -> Backend:
    raise BackendUnavailable(
        f"--backend tensorrt is not built yet; available: {', '.join(available_backends())} "
        "(tensorrt-rtx builds for RTX cards without having one: --target sm89)"
    )


_FACTORIES: dict[str, Callable[[tuple[str, ...]], Backend]] = {
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


def _refuse_targets(name: str, targets: tuple[str, ...]) -> None:
    if targets:
        asked = ",".join(targets)
        raise ConfigError(f"--target {asked} means nothing to --backend {name}, which builds for this CPU; leave it out")


def _missing(name: str, extras: str, exc: ImportError) -> BackendUnavailable:
    library = exc.name or name
    return BackendUnavailable(f"--backend {name} needs {library}, which is not installed: pip install 'nitro-rt[{extras}]'")

"""The JSON manifests at which the stages meet: `export.json` of a graphs folder and `bundle.json` of a bundle.

Reading is strict: an unknown or missing field, a wrong type, another schema version or a path that leaves the folder is
refused by name. Files are found relative to the manifest's folder and never outside it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from nitro_rt.errors import BundleError
from nitro_rt.quality import QualityResult
from nitro_rt.schedule import StepSchedule

SCHEMA_VERSION = 1
BUNDLE_FILE = "bundle.json"
EXPORT_FILE = "export.json"

REMEMBERED_BYTES = 1 << 26
"""Digests of files of this size on are remembered. (Reading one takes longer than a tick of the file system's clock.)"""
_DIGESTS: dict[tuple[int, int, int, int], str] = {}

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One input or output of a graph or an engine."""

    name: str
    dtype: str
    """NumPy's name: float32, float16, int64, uint8."""
    shape: tuple[int, ...]
    """Static: batch and size are built in."""


@dataclass(frozen=True, kw_only=True)
class FileRef:
    """A file of the folder, named by content."""

    path: str
    """Relative to the manifest, with forward slashes."""
    sha256: str
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class TokenizerSpec:
    """One CLIP tokenizer in the `tokenizers` library's JSON form."""

    file: FileRef
    max_length: int
    """Tokens per prompt, padding and both end marks counted (77 in SDXL)."""
    bos_id: int
    eos_id: int
    pad_id: int


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where the weights come from."""

    name: str
    """`nitro-emoji`, a hub id, or the folder's name."""
    checkpoint_sha256: str
    """Digest over the checkpoint's weight and config files."""
    licence: str
    origin: str
    """What --model was, without paths of the building machine."""


@dataclass(frozen=True, kw_only=True)
class ScheduleSpec:
    """The shift, and the constants of every step count built."""

    shift: int
    steps: dict[int, StepSchedule]


@dataclass(frozen=True, kw_only=True)
class Graph:
    """One ONNX graph. `files[0]` is the graph, the rest its external data."""

    files: tuple[FileRef, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    parity_max_abs: float | None
    """Largest difference from torch, measured right after export on seeded inputs; None where `note` says why not."""
    compute_dtype: str = "float32"
    """What this stage's network computes in: float16, bfloat16 or float32 (a decoder may stay at float32)."""
    note: str = ""
    """Why, where it is not what `precision` asked for."""


@dataclass(frozen=True, kw_only=True)
class GraphsManifest:
    """`export.json`: a checkpoint as ONNX."""

    schema_version: int
    source: Source
    schedule: ScheduleSpec
    size_px: int
    batch: int
    precision: str
    """fp32, fp16 or bf16: the type that the graphs compute in; int8 or fp8: of their quantised operators."""
    text: Graph
    denoise: dict[int, Graph]
    """By number of steps."""
    decode: Graph
    tokenizers: tuple[TokenizerSpec, ...]
    toolchain: dict[str, str]
    """Package -> version, of everything that shaped the graphs."""
    quantisation: dict[str, Any] | None = None
    """The recipe: amax, prompt-set hash, seed, layers kept high; None where nothing is quantised."""


@dataclass(frozen=True, kw_only=True)
class Engine:
    """One stage, compiled. `files[0]` is what the backend loads; the rest lies beside it."""

    backend: str
    """openvino, onnxruntime, tensorrt-rtx, ..."""
    precision: str
    """What was asked for: fp32, fp16, ..."""
    compute_dtype: str
    """What the backend computes in on the building machine: float32, float16, bfloat16."""
    files: tuple[FileRef, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    key: str
    """Digest over everything that decides this engine."""
    options: dict[str, str] = field(default_factory=dict)
    """Backend options that the executor must set when it loads the engine."""
    first_row: int = 0
    """Of a denoiser: what `step_index` is for its first step. Step counts share an engine, whose tables stand in rows."""


@dataclass(frozen=True, kw_only=True)
class SizeEngines:
    """The engines of one image size. `text` knows no size and is shared."""

    denoise: dict[int, Engine]
    """By number of steps."""
    decode: Engine


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """What the bundle needs."""

    disk_bytes: int
    weight_bytes: int
    io_bytes: int
    """Buffers between the stages."""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A picture that the float32 parent drew, which the bundle must come near to."""

    prompt: str
    seed: int
    steps: int
    file: FileRef
    """A PNG."""
    size_px: int = 0
    """Edge in pixels; 0 stands for the bundle's first size."""


@dataclass(frozen=True, kw_only=True)
class SpeedResult:
    """One stage in the quantised and in the float engine, timed in turn on one machine."""

    stage: str
    """`denoise/1`, ..., `decode`."""
    precision: str
    """Of the quantised engine."""
    parent_precision: str
    """Of the float engine it was compared with."""
    milliseconds: float
    """Median of the quantised engine's calls."""
    parent_milliseconds: float
    ratio: float
    """Quantised to float, the median over pairs of calls that followed each other; below 1 is faster."""
    ratio_low: float
    ratio_high: float
    """The 95 % interval of the median ratio."""
    num_pairs: int
    device: str
    chosen: str
    """The precision that the bundle has."""
    reason: str


@dataclass(frozen=True, kw_only=True)
class BundleManifest:
    """`bundle.json`: all that is needed to draw."""

    schema_version: int
    name: str
    engine_key: str
    """Digest of `engine_key_fields`."""
    engine_key_fields: dict[str, Any]
    """Everything that decides the engines, by name, so that two keys can be compared."""
    source: Source
    schedule: ScheduleSpec
    sizes_px: tuple[int, ...]
    """Edges of the images that it draws, in pixels: first the size of `denoise` and `decode`, then those of `more_sizes`."""
    batch: int
    """The largest number of images per call; smaller requests are padded."""
    text: Engine
    denoise: dict[int, Engine]
    """By number of steps."""
    decode: Engine
    tokenizers: tuple[TokenizerSpec, ...]
    target: dict[str, str]
    """The machine or GPU the engines are for: device, compute capability, driver, CPU features."""
    toolchain: dict[str, str]
    memory_plan: MemoryPlan
    quantisation: dict[str, Any] | None = None
    """Recipe: amax, prompt-set hash, seed; None where nothing is quantised."""
    references: tuple[Reference, ...] = ()
    """What the float32 parent drew; empty for a bundle of graphs whose checkpoint was not at hand."""
    quality_gate: tuple[QualityResult, ...] = ()
    """How near to the references the bundle came where it was built, one result per step count."""
    speed_gate: tuple[SpeedResult, ...] = ()
    """How stages were chosen where `--precision auto` was asked for."""
    more_sizes: dict[int, SizeEngines] = field(default_factory=dict)
    """Edge in pixels -> engines, of every size but the first."""
    manifest_sha256: str = ""
    """Digest of this manifest without this field: see `sealed`."""


def sealed(manifest: BundleManifest) -> BundleManifest:
    """The manifest with its own digest, so that an edit of any field shows. It guards against accidents, not attackers."""
    return dataclasses.replace(manifest, manifest_sha256=seal_of(manifest))


def seal_of(manifest: BundleManifest) -> str:
    """sha256 of the manifest's canonical JSON with `manifest_sha256` empty, in hex."""
    text = to_json(dataclasses.replace(manifest, manifest_sha256=""))
    as_read = from_json(BundleManifest, text, where=manifest.name)  # a whole number in a float's place is read as a float
    return hashlib.sha256(to_json(as_read).encode()).hexdigest()


def to_json(manifest: object) -> str:
    """Canonical JSON: sorted keys, two spaces, a final newline; equal manifests give equal bytes."""
    assert dataclasses.is_dataclass(manifest) and not isinstance(manifest, type)
    return json.dumps(dataclasses.asdict(manifest), indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def from_json(kind: type[T], text: str, *, where: str) -> T:
    """Read a manifest of dataclass `kind`.

    Raises: BundleError naming the first field that is wrong; `where` says which file.
    """
    try:
        data = json.loads(text)
    except ValueError as exc:
        raise BundleError(f"{where} is not valid JSON: {exc}; it was cut or edited, build again") from exc
    version = data.get("schema_version") if isinstance(data, dict) else None
    if version != SCHEMA_VERSION:
        raise BundleError(
            f"{where} has schema version {version!r}, this nitro-rt reads {SCHEMA_VERSION}; "
            "build it again with this version, or install the one that wrote it"
        )
    return typing.cast(T, _convert(kind, data, where, "manifest"))


def resolve(folder: Path, reference: FileRef) -> Path:
    """The path of a manifest's file. Raises: BundleError if it would leave `folder`."""
    pure = PurePosixPath(reference.path)
    inside = not pure.is_absolute() and ".." not in pure.parts and "\\" not in reference.path and pure.parts
    path = folder.joinpath(*pure.parts)
    if not inside or not path.resolve().is_relative_to(folder.resolve()):
        raise BundleError(f"the manifest of {folder} names the file {reference.path!r}, which leaves the folder; refused")
    return path


def check_file(folder: Path, reference: FileRef) -> Path:
    """The path of a manifest's file, after comparing its size and digest.

    Raises: BundleError saying what is missing, cut or changed.
    """
    path = resolve(folder, reference)
    if not path.is_file():
        raise BundleError(f"{path} is missing; build the bundle again")
    size = path.stat().st_size
    if size != reference.num_bytes:
        raise BundleError(f"{path} has {size} bytes, its manifest says {reference.num_bytes}: cut or changed, build again")
    digest = sha256_of(path)
    if digest != reference.sha256:
        raise BundleError(f"{path} has sha256 {digest[:12]}, its manifest says {reference.sha256[:12]}: changed, build again")
    return path


def sha256_of(path: Path) -> str:
    """The file's digest. A large one that has not changed since is not read again by this process, whatever its name:
    graphs, cache and bundle hold hard links to one file of gigabytes."""
    with path.open("rb") as file:
        facts = os.fstat(file.fileno())
        key = facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns
        digest = _DIGESTS.get(key)
        if digest is None:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            after = os.fstat(file.fileno())
            if facts.st_size >= REMEMBERED_BYTES and (after.st_size, after.st_mtime_ns) == key[2:]:
                _DIGESTS[key] = digest
    return digest


def _convert(kind: Any, value: Any, where: str, name: str) -> Any:
    """`value` as `kind`, strictly."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin is types.UnionType or origin is typing.Union:
        if value is None and type(None) in arguments:
            return None
        return _convert(next(a for a in arguments if a is not type(None)), value, where, name)
    if dataclasses.is_dataclass(kind):
        return _convert_dataclass(typing.cast(type[Any], kind), value, where, name)
    if origin is tuple:
        _require(isinstance(value, list), where, name, "a list", value)
        return tuple(_convert(arguments[0], item, where, f"{name}[{index}]") for index, item in enumerate(value))
    if origin is dict:
        _require(isinstance(value, dict), where, name, "an object", value)
        return {
            _key(arguments[0], key, where, name): _convert(arguments[1], v, where, f"{name}.{key}") for key, v in value.items()
        }
    if kind is float:
        _require(isinstance(value, int | float) and not isinstance(value, bool), where, name, "a number", value)
        return float(value)
    _require(isinstance(value, kind) and not (kind is int and isinstance(value, bool)), where, name, kind.__name__, value)
    return value


def _convert_dataclass(kind: type[Any], value: Any, where: str, name: str) -> Any:
    _require(isinstance(value, dict), where, name, "an object", value)
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    unknown = sorted(set(value) - set(fields))
    if unknown:
        raise BundleError(f"{where}: {name} has the unknown field {unknown[0]!r}; known: {', '.join(fields)}")
    for key, f in fields.items():
        has_default = f.default is not dataclasses.MISSING or f.default_factory is not dataclasses.MISSING
        if key not in value and not has_default:
            raise BundleError(f"{where}: {name} lacks the field {key!r}; it was edited or cut, build again")
    return kind(**{key: _convert(hints[key], item, where, f"{name}.{key}") for key, item in value.items()})


def _key(kind: Any, key: str, where: str, name: str) -> Any:
    if kind is not int:
        return key
    _require(key.isdecimal(), where, name, "whole numbers as keys", key)
    return int(key)


def _require(fits: bool, where: str, name: str, expected: str, value: Any) -> None:
    if not fits:
        raise BundleError(f"{where}: {name} must be {expected}, found {value!r}; it was edited or cut, build again")

"""Simulated plan files, and bundles of them made from bundles of ONNX graphs.

A plan is `HEADER_BYTES` of header (a line of magic, a line of JSON, spaces) and the graph, whole, as ONNX.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import tensorrt_rtx
from onnx.external_data_helper import uses_external_data

from nitro_rt import manifest as m

MAGIC = b"NITRO-RT SIMULATED PLAN\n"
HEADER_BYTES = 1024
VERSIONS = {"tensorrt-rtx": tensorrt_rtx.__version__, "tensorrt": "11.4.0.0"}
FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)
"""What can be refitted."""


@dataclass(frozen=True, kw_only=True)
class PlanHeader:
    """What a runtime looks at before it loads."""

    backend: str = "tensorrt-rtx"
    version: str
    compute_capabilities: tuple[str, ...]
    """8.9 and the like."""
    scratch_bytes: int
    """Device memory that an execution needs for itself."""
    refittable: bool
    duration_ms: float
    """What an execution takes on the device's clock."""
    min_driver_version: int
    graph_bytes: int
    graph_sha256: str


class BadPlan(Exception):
    """Not a plan, or one that was cut or changed."""


def write_plan(
    graph: Path | bytes,
    *,
    backend: str = "tensorrt-rtx",
    version: str | None = None,
    compute_capabilities: tuple[str, ...] = ("8.9",),
    scratch_bytes: int = 4096,
    refittable: bool = False,
    duration_ms: float = 1.0,
    min_driver_version: int = 13000,
) -> bytes:
    """A plan that runs an ONNX graph, whose external weights it takes in."""
    model = whole_graph(graph) if isinstance(graph, Path) else onnx.load_from_string(graph)
    content = model.SerializeToString(deterministic=True)
    header = PlanHeader(
        backend=backend,
        version=version or VERSIONS[backend],
        compute_capabilities=compute_capabilities,
        scratch_bytes=scratch_bytes,
        refittable=refittable,
        duration_ms=duration_ms,
        min_driver_version=min_driver_version,
        graph_bytes=len(content),
        graph_sha256=hashlib.sha256(content).hexdigest(),
    )
    written = MAGIC + json.dumps(dataclasses.asdict(header), sort_keys=True).encode()
    assert len(written) <= HEADER_BYTES, "too many compute capabilities"
    return written.ljust(HEADER_BYTES) + content


def whole_graph(path: Path) -> onnx.ModelProto:
    """The graph with its external weights inside. onnx's own loader takes our bundles' hard links for an attack."""
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        if uses_external_data(tensor):
            entries = {entry.key: entry.value for entry in tensor.external_data}
            with (path.parent / entries["location"]).open("rb") as file:
                file.seek(int(entries.get("offset", 0)))
                tensor.raw_data = file.read(int(entries.get("length", -1)))
            tensor.ClearField("external_data")
            tensor.data_location = onnx.TensorProto.DEFAULT
    return model


def read_header(content: bytes) -> PlanHeader:
    """From the first `HEADER_BYTES` of a plan. Raises: BadPlan."""
    if not content.startswith(MAGIC):
        raise BadPlan("no simulated plan")
    try:
        fields: dict[str, Any] = json.loads(content[len(MAGIC) : HEADER_BYTES])
        return PlanHeader(**{**fields, "compute_capabilities": tuple(fields["compute_capabilities"])})
    except (ValueError, TypeError, KeyError) as exc:
        raise BadPlan(f"its header is damaged: {exc}") from exc


def read_graph(header: PlanHeader, content: bytes) -> bytes:
    """The graph behind the header. Raises: BadPlan."""
    graph = content[HEADER_BYTES:]
    if len(graph) != header.graph_bytes or hashlib.sha256(graph).hexdigest() != header.graph_sha256:
        raise BadPlan("its graph was cut or changed")
    return graph


def device_bundle(source: Path, out: Path, *, backend: str = "tensorrt-rtx", targets: str = "sm89", **plan: Any) -> Path:
    """A bundle of simulated plans, made from a bundle whose engines are ONNX graphs.

    Args:
        targets: `sm89`, or several with spaces between.
        plan: passed on to `write_plan`.
    """
    manifest = m.from_json(m.BundleManifest, (source / m.BUNDLE_FILE).read_text(encoding="utf-8"), where=str(source))
    files = out / "files"
    files.mkdir(parents=True)
    capabilities = tuple(f"{name[2:-1]}.{name[-1]}" for name in targets.split())

    def as_plan(engine: m.Engine) -> m.Engine:
        content = whole_graph(source / engine.files[0].path).SerializeToString(deterministic=True)
        written = write_plan(content, backend=backend, compute_capabilities=capabilities, **plan)
        return dataclasses.replace(engine, backend=backend, files=(_store(files, written, ".plan"),), options={})

    def as_plans(engines: m.BundleManifest | m.SizeEngines) -> dict[str, Any]:
        denoise = {steps: as_plan(engine) for steps, engine in engines.denoise.items()}
        return {"denoise": denoise, "decode": as_plan(engines.decode)}

    for reference in (*(spec.file for spec in manifest.tokenizers), *(picture.file for picture in manifest.references)):
        (out / reference.path).write_bytes((source / reference.path).read_bytes())
    fields = manifest.engine_key_fields | {"backend": backend, "targets": targets}
    canonical = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    made = dataclasses.replace(
        manifest,
        text=as_plan(manifest.text),
        **as_plans(manifest),
        more_sizes={edge: m.SizeEngines(**as_plans(engines)) for edge, engines in manifest.more_sizes.items()},
        engine_key_fields=fields,
        engine_key=hashlib.sha256(canonical.encode()).hexdigest(),
        target={"device": "cuda", "targets": targets, "compute_capabilities": " ".join(capabilities)},
        toolchain=manifest.toolchain | {backend: VERSIONS[backend]},
    )
    (out / m.BUNDLE_FILE).write_text(m.to_json(m.sealed(made)), encoding="utf-8")
    return out


def _store(files: Path, content: bytes, suffix: str) -> m.FileRef:
    digest = hashlib.sha256(content).hexdigest()
    (files / f"{digest}{suffix}").write_bytes(content)
    return m.FileRef(path=f"files/{digest}{suffix}", sha256=digest, num_bytes=len(content))

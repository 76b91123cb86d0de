"""ONNX graphs from torch stages: exported once per network, with weights in one file that all step counts share.

The denoisers of a checkpoint differ in a few small tables only (the stage's own buffers), so one export serves all: the
tables are exchanged in its graph. The weights go to one file beside the graphs, each tensor once, named by its content
(`<sha256>.data`): a bundle that stores files by content takes it over without touching the graphs that point into it.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import onnx
import onnx_ir as ir
import torch
from torch import Tensor

from nitro_export.stages import Stage
from nitro_export.toolchain import OPSET
from nitro_rt.errors import ExportError
from nitro_rt.manifest import TensorSpec

INLINE_BYTES = 1024
"""Smaller tensors stay in the graph: shapes and scalars, which optimisers want to see."""
ALIGNMENT = 256
"""Offsets in the weight file, for readers that map it into memory."""


def graphs_from_stages(folder: Path, stages: Mapping[str, Stage], example: Sequence[Tensor]) -> dict[str, tuple[Path, ...]]:
    """Write `<name>.onnx` for each stage, all of them over one network.

    Args:
        stages: by name; they may differ in their own buffers only, not in their submodules' weights.
        example: inputs for any of them.
    Returns: by name, the graph's path and the weight file's.
    Raises: ExportError if torch cannot export the network, or the graph has other inputs or outputs than the stage.
    """
    first, *_ = stages
    model = _model_from_stage(first, stages[first], example)
    _check_contract(first, model, stages[first])
    _strip(model)
    tables = {name: dict(stage.named_buffers(recurse=False)) for name, stage in stages.items()}
    data = _externalise(model, folder, keep=set(tables[first]))
    written: dict[str, tuple[Path, ...]] = {}
    varied: set[str] = set()
    for name in stages:
        path = folder / f"{name}.onnx"
        # Equal tables may be folded: the graph holds the first stage's already.
        changed = {key for key, table in tables[name].items() if not torch.equal(table, tables[first][key])}
        varied |= changed
        _set_tables(name, model, {key: tables[name][key] for key in varied})
        ir.save(model, path)
        try:
            onnx.checker.check_model(str(path))
        except onnx.checker.ValidationError as exc:
            raise ExportError(f"{path.name}: the ONNX checker refuses the graph: {exc}") from exc
        written[name] = (path, data) if data is not None else (path,)
    return written


def _model_from_stage(name: str, stage: Stage, example: Sequence[Tensor]) -> ir.Model:
    try:
        with _quiet(), torch.no_grad():
            program: Any = torch.onnx.export(
                stage,  # type: ignore[arg-type]
                tuple(example),
                input_names=[spec.name for spec in stage.inputs],
                output_names=[spec.name for spec in stage.outputs],
                opset_version=OPSET,
                dynamo=True,
                optimize=True,
                verbose=False,
            )
    except Exception as exc:  # torch.export raises many kinds; each means that this network cannot be turned into a graph
        raise ExportError(f"{name}: torch cannot export this network: {exc}") from exc
    return program.model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter warns of its own internals and of packages that it could use; nobody can act upon that here."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _check_contract(name: str, model: ir.Model, stage: Stage) -> None:
    """Raises: ExportError unless inputs and outputs are exactly the stage's: names, order, types, static shapes."""
    for what, values, specs in (
        ("inputs", model.graph.inputs, stage.inputs),
        ("outputs", model.graph.outputs, stage.outputs),
    ):
        found = tuple(map(_spec_of, values))
        if found != specs:
            raise ExportError(f"{name}: the exported graph has the {what} {found}, expected {specs}")


def _spec_of(value: ir.Value) -> TensorSpec:
    assert value.dtype is not None and value.shape is not None and value.name is not None
    shape = tuple(size if isinstance(size, int) else -1 for size in value.shape)
    return TensorSpec(name=value.name, dtype=str(value.dtype.numpy()), shape=shape)


def _strip(model: ir.Model) -> None:
    """Drop the exporter's notes: stack traces with paths of this machine, larger than the graph, never twice the same."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.graph.doc_string = None
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in [*model.graph.inputs, *model.graph.initializers.values()]:
        value.metadata_props.clear()


def _externalise(model: ir.Model, folder: Path, *, keep: set[str]) -> Path | None:
    """Move the large initializers but those named in `keep` to a file; None if there are none."""
    large = {
        name: value.const_value
        for name, value in model.graph.initializers.items()
        if name not in keep and value.const_value is not None and value.const_value.nbytes >= INLINE_BYTES
    }
    if not large:
        return None
    partial = folder / "weights.partial"
    with partial.open("wb") as file:
        spans = _write_tensors(file, large)
    with partial.open("rb") as file:
        data = folder / f"{hashlib.file_digest(file, 'sha256').hexdigest()}.data"
    os.replace(partial, data)
    for name, tensor in large.items():
        offset, length = spans[name]
        model.graph.initializers[name].const_value = ir.ExternalTensor(
            data.name, offset, length, tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=name, base_dir=folder
        )
    return data


def _write_tensors(file: BinaryIO, tensors: Mapping[str, ir.TensorProtocol]) -> dict[str, tuple[int, int]]:
    """Each content once; returns name -> (offset, length)."""
    by_content: dict[bytes, tuple[int, int]] = {}
    spans = {}
    for name, tensor in tensors.items():
        content = tensor.tobytes()
        digest = hashlib.sha256(content).digest()
        if digest not in by_content:
            file.write(b"\0" * (-file.tell() % ALIGNMENT))
            by_content[digest] = (file.tell(), len(content))
            file.write(content)
        spans[name] = by_content[digest]
    return spans


def _set_tables(name: str, model: ir.Model, tables: Mapping[str, Tensor]) -> None:
    """Exchange the stage's own buffers. Raises: ExportError if the exporter folded one away: it would keep old values."""
    for key, table in tables.items():
        value = model.graph.initializers.get(key)
        if value is None:
            raise ExportError(f"{name}: the exporter folded the table {key} into other constants; this torch is not supported")
        array = table.detach().numpy()
        value.const_value = ir.tensor(array, name=key)
        value.shape = ir.Shape(array.shape)

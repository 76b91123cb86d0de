"""ONNX graphs from torch stages, without the weights passing through the exporter.

A stage is traced over fake tensors, so a full SDXL UNet costs no more memory than its graph. Its weights then become ONNX
external data: they point into the checkpoint's own safetensors files, which lie beside the graph as hard links (or copies,
where the file system has no links), or, where their type changes or they are folded, into one file written tensor by
tensor. Both kinds are named by content (`<sha256>.safetensors`, `<sha256>.data`): a bundle that stores files by content
takes them over without touching the graphs that point into them.

The denoisers of a checkpoint differ in a few small tables only (the stage's own buffers), so one export serves all: the
tables are exchanged in its graph.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import logging
import os
import shutil
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import onnx_ir.passes.common as passes
import onnxscript.optimizer
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from nitro_export.repeat import Row, lengthen, shorten
from nitro_export.stages import Stage
from nitro_export.stored import StoredTensor, sha256_of_finite
from nitro_export.structure import check_structure
from nitro_export.toolchain import OPSET
from nitro_rt.errors import ExportError
from nitro_rt.manifest import TensorSpec

INLINE_BYTES = 1024
"""Smaller tensors stay in the graph: shapes and scalars, which optimisers want to see."""
ALIGNMENT = 256
"""Offsets in a weight file of ours, for readers that map it into memory."""
NO_HARD_LINK = {errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}


@dataclass(kw_only=True)
class WeightFiles:
    """The weight files of a graphs folder: what was linked, what was copied, what was written anew and why."""

    folder: Path
    linked: set[str] = field(default_factory=set)
    copied: set[str] = field(default_factory=set)
    written: set[str] = field(default_factory=set)
    converted: Counter[tuple[str, str]] = field(default_factory=Counter)
    """(type in the checkpoint, type in the graph) -> number of tensors, where the two differ."""
    num_folded: int = 0
    """Tensors that other ones were made of."""

    def adopt(self, source: Path) -> str:
        """A checkpoint's file, under its content's name. Raises: ExportError if it holds NaN or infinity."""
        name = f"{sha256_of_finite(source)}.safetensors"
        target = self.folder / name
        if not target.exists():
            try:
                os.link(source.resolve(), target)
                self.linked.add(name)
            except OSError as exc:
                if exc.errno not in NO_HARD_LINK:
                    raise
                shutil.copyfile(source, target)
                self.copied.add(name)
        return name

    def summary(self) -> str:
        """One line for people."""
        why = " (no hard links to the checkpoint's files)" if self.copied else ""
        line = f"weight files: {len(self.linked)} linked, {len(self.copied)} copied{why}, {len(self.written)} written"
        kinds = [f"{count} tensors converted from {stored} to {dtype}" for (stored, dtype), count in self.converted.items()]
        kinds += [f"{self.num_folded} tensors folded"] * (self.num_folded > 0)
        return "; ".join([line, *kinds])


def graphs_from_stages(
    files: WeightFiles, stages: Mapping[str, Stage], stored: Mapping[str, StoredTensor], dtype: torch.dtype
) -> dict[str, tuple[Path, ...]]:
    """Write `<name>.onnx` for each stage, all of them over one network, which is of no use afterwards.

    Args:
        stages: by name; they may differ in their own buffers only, not in their submodules' weights.
        stored: where the value of each of the stages' parameters is, by the parameter's name.
        dtype: of the network's weights in the graph.
    Returns: by name, the graph's path and those of its weight files.
    Raises: ExportError if torch cannot export the network, the graph has other inputs or outputs than the stage, or weights
        do not survive the change of type.
    """
    first, *_ = stages
    tables = {name: _values(dict(stage.named_buffers(recurse=False))) for name, stage in stages.items()}
    constants = _values({name: b for name, b in stages[first].named_buffers() if name not in tables[first]})
    rows = shorten(stages[first])
    model = _model_from_stage(first, stages[first], dtype)
    _check_contract(first, model, stages[first])
    _simplify(model, rows)
    _strip(model)
    data = _set_weights(model, files, stored, constants | tables[first], dtype)
    written: dict[str, tuple[Path, ...]] = {}
    for name in stages:
        path = files.folder / f"{name}.onnx"
        # Tables of no graph were folded by nobody: they are equal in all stages, or `_set_tables` misses them.
        _set_tables(name, model, {key: v for key, v in tables[name].items() if not _same(tables, key)})
        ir.save(model, path)
        try:
            check_structure(path)
        except onnx.checker.ValidationError as exc:
            raise ExportError(f"{path.name}: the ONNX checker refuses the graph: {exc}") from exc
        written[name] = (path, *(files.folder / file for file in data))
    return written


def _same(tables: Mapping[str, Mapping[str, Tensor]], key: str) -> bool:
    first, *others = tables.values()
    return all(torch.equal(first[key], other[key]) for other in others)


def _values(buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: buffer.detach().clone() for name, buffer in buffers.items()}


def _model_from_stage(name: str, stage: Stage, dtype: torch.dtype) -> ir.Model:
    """The graph, its initializers without values. The stage's weights become fakes in `dtype`."""
    try:
        with _quiet(), torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
            _make_fake(stage, dtype)
            example = tuple(torch.empty(spec.shape, dtype=getattr(torch, spec.dtype)) for spec in stage.inputs)
            traced = torch.export.export(stage, example, strict=False)
            program: Any = torch.onnx.export(
                traced,
                input_names=[spec.name for spec in stage.inputs],
                output_names=[spec.name for spec in stage.outputs],
                opset_version=OPSET,
                dynamo=True,
                optimize=False,
                verbose=False,
            )
    except Exception as exc:  # torch.export raises many kinds; each means that this network cannot be turned into a graph
        raise ExportError(f"{name}: torch cannot export this network: {exc}") from exc
    return program.model


def _make_fake(stage: nn.Module, dtype: torch.dtype) -> None:
    """Call it under a FakeTensorMode. Tied weights stay tied."""
    fakes: dict[int, nn.Parameter] = {}
    for module in stage.modules():
        for key, value in module._parameters.items():
            if value is not None:
                fake = fakes.setdefault(id(value), nn.Parameter(torch.empty(value.shape, dtype=dtype), requires_grad=False))
                module._parameters[key] = fake
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = torch.empty(buffer.shape, dtype=buffer.dtype)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter warns of its own internals, of packages that it could use, and of each weight without a value."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnx_ir", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
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


def _simplify(model: ir.Model, rows: list[Row]) -> None:
    """Inline functions and fold constants; weights have no values, so nothing that depends on them can be folded.

    The optimiser's rewrite rules are left out: on a UNet they take longer than the whole export and change next to nothing.
    """
    for value in model.graph.initializers.values():
        value.const_value = None
    with _quiet():
        passes.InlinePass()(model)
        passes.ShapeInferencePass()(model)
        _name_casts(model)
        onnxscript.optimizer.fold_constants(model, onnx_shape_inference=False)
        passes.IdentityEliminationPass()(model)
        passes.RemoveUnusedNodesPass()(model)
        lengthen(model, rows)
        passes.CommonSubexpressionEliminationPass()(model)
        passes.RemoveUnusedNodesPass()(model)


def _name_casts(model: ir.Model) -> None:
    """CastLike becomes Cast: every type is known here, and not every reader of graphs infers it."""
    for node in list(model.graph.all_nodes()):
        if node.op_type == "CastLike":
            dtype = _dtype_of(node.inputs[1])
            node.op_type = "Cast"
            node.attributes["to"] = ir.AttrInt64("to", dtype)
            node.resize_inputs(1)


def _dtype_of(value: ir.Value | None) -> ir.DataType:
    """A value's type; where ONNX's inference stopped (it knows no bfloat16 in some operators), its source's."""
    assert value is not None
    if value.dtype is not None:
        return value.dtype
    node = value.producer()
    assert node is not None, value
    if node.op_type == "Cast":
        return ir.DataType(node.attributes["to"].as_int())
    return _dtype_of(node.inputs[1 if node.op_type == "CastLike" else 0])


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


def _set_weights(
    model: ir.Model,
    files: WeightFiles,
    stored: Mapping[str, StoredTensor],
    constants: Mapping[str, Tensor],
    dtype: torch.dtype,
) -> list[str]:
    """Give every initializer its value; returns the names of the files that hold them."""
    kind = str(dtype).removeprefix("torch.")
    for path in dict.fromkeys(stored[name].path for name in model.graph.initializers if name in stored):
        sha256_of_finite(path)
    used: dict[str, None] = {}
    changed: dict[str, StoredTensor] = {}
    for name, value in model.graph.initializers.items():
        if value.const_value is not None:  # made by folding
            continue
        if name in constants:
            value.const_value = _inline(name, constants[name])
            continue
        if stored[name].dtype != kind:
            files.converted[stored[name].dtype, kind] += 1
        files.num_folded += stored[name].folded is not None
        if stored[name].num_bytes < INLINE_BYTES:
            value.const_value = _inline(name, _converted(stored[name], dtype))
        elif stored[name].dtype == kind and stored[name].folded is None:
            file = files.adopt(stored[name].path)
            used[file] = None
            _point(value, files.folder, file, stored[name].offset, stored[name].num_bytes)
        else:
            changed[name] = stored[name]
    if changed:
        file, spans = _write_converted(files, changed, dtype)
        used[file] = None
        for name, (offset, length) in spans.items():
            _point(model.graph.initializers[name], files.folder, file, offset, length)
    return list(used)


def _point(value: ir.Value, folder: Path, file: str, offset: int, length: int) -> None:
    assert value.dtype is not None and isinstance(value.shape, ir.Shape)
    value.const_value = ir.ExternalTensor(
        file, offset, length, value.dtype, shape=ir.Shape(value.shape.numpy()), name=str(value.name), base_dir=folder
    )


def _write_converted(
    files: WeightFiles, tensors: Mapping[str, StoredTensor], dtype: torch.dtype
) -> tuple[str, dict[str, tuple[int, int]]]:
    """One file of ours with these tensors in `dtype`, one in memory at a time; name -> (offset, length)."""
    partial = files.folder / "weights.partial"
    digest, spans, end = hashlib.sha256(), {}, 0
    with partial.open("wb") as out:
        for name, tensor in tensors.items():
            content = bytes(_converted(tensor, dtype).contiguous().view(-1).view(torch.uint8).numpy().data)
            padding = b"\0" * (-end % ALIGNMENT)
            spans[name] = (end + len(padding), len(content))
            for part in (padding, content):
                out.write(part)
                digest.update(part)
            end = sum(spans[name])
    file = f"{digest.hexdigest()}.data"
    os.replace(partial, files.folder / file)
    files.written.add(file)
    return file, spans


def _converted(stored: StoredTensor, dtype: torch.dtype) -> Tensor:
    """Raises: ExportError if a weight is too large for `dtype`."""
    value = stored.read()
    converted = value.to(dtype)
    if not converted.isfinite().all():
        raise ExportError(
            f"{stored.path}: {stored.key} reaches {value.abs().max().item():.3g}, "
            f"which {str(dtype).removeprefix('torch.')} cannot hold; export with precision bf16 or fp32"
        )
    return converted


def _inline(name: str, tensor: Tensor) -> ir.TensorProtocol:
    if tensor.dtype != torch.bfloat16:
        return ir.tensor(tensor.numpy(), name=name)
    content = tensor.contiguous().view(torch.uint16).numpy()
    return ir.tensor(content.view(ir.DataType.BFLOAT16.numpy()), name=name)


def _set_tables(name: str, model: ir.Model, tables: Mapping[str, Tensor]) -> None:
    """Exchange the stage's own buffers. Raises: ExportError if the exporter folded one away: it would keep old values."""
    for key, table in tables.items():
        value = model.graph.initializers.get(key)
        if value is None:
            raise ExportError(f"{name}: the exporter folded the table {key} into other constants; this torch is not supported")
        value.const_value = _inline(key, table)
        value.shape = ir.Shape(table.shape)

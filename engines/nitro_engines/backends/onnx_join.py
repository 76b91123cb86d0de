"""One denoiser for several step counts: their graphs differ only in the tables that `step_index` selects a row of.

The tables are put under one another, so that one engine, with the weights once, serves all of them: a step count's first
step reads the row after the last one of the step count before.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx

from nitro_engines.backends.onnx_graph import load_structure
from nitro_rt.errors import BuildError

STEP_INDEX = "step_index"


def join_graphs(paths: Sequence[Path], out: Path) -> None:
    """Write the graph of all step counts to `out`; its external weights are still to be put beside it.

    Args:
        paths: graphs of one checkpoint and size, in the order in which their rows are to stand.
    Raises: BuildError if they differ in more than the rows of their tables.
    """
    models = [load_structure(path) for path in paths]
    tables = [_tables(path, model) for path, model in zip(paths, models, strict=True)]
    joined = models[0]
    rows = {name: [table[name] for table in tables if name in table] for name in tables[0]}
    for name, parts in rows.items():
        table = tables[0][name]
        content, num_rows = b"".join(part.raw_data for part in parts), sum(part.dims[0] for part in parts)
        is_like = {(part.data_type, tuple(part.dims[1:])) for part in parts}
        if len(parts) != len(paths) or len(is_like) != 1:
            raise BuildError(f"{', '.join(path.name for path in paths)} differ in the shape of {name}; export them again")
        table.raw_data, table.dims[0] = content, num_rows
    stripped = [_without(model, set(rows)) for model in (joined, *models[1:])]
    for path, other in zip(paths[1:], stripped[1:], strict=True):
        if other != stripped[0]:
            raise BuildError(f"{paths[0].name} and {path.name} differ in more than their steps' tables; export them again")
    for info in joined.graph.value_info:
        if info.name in rows:
            info.type.tensor_type.shape.dim[0].dim_value = tables[0][info.name].dims[0]
    onnx.save(joined, str(out))


def _tables(path: Path, model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    """The initializers that rows are selected of by the step's number, all with one row per step.

    Raises: BuildError if the number is used for anything else, or a table lies in another file.
    """
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    numbers, tables = {STEP_INDEX}, dict[str, onnx.TensorProto]()
    for node in model.graph.node:
        used = numbers.intersection(node.input)
        if not used:
            continue
        if node.op_type == "Reshape" and node.input[0] in used:  # what torch's index_select begins with
            numbers.add(node.output[0])
        elif node.input[0] in weights and _selects_rows(node):
            tables[node.input[0]] = weights[node.input[0]]
        else:
            raise BuildError(f"{path.name} uses {STEP_INDEX} in {node.op_type}, not only to select rows; export it again")
    if not all(table.raw_data for table in tables.values()) or len({table.dims[0] for table in tables.values()}) != 1:
        raise BuildError(f"{path.name} has no tables with one row per step inside itself; export it again")
    return tables


def _selects_rows(node: onnx.NodeProto) -> bool:
    axes = [attribute.i for attribute in node.attribute if attribute.name == "axis"]
    return node.op_type == "Gather" and not any(axes)


def _without(model: onnx.ModelProto, tables: set[str]) -> onnx.ModelProto:
    """The graph as far as all step counts have it in common."""
    common = onnx.ModelProto()
    common.CopyFrom(model)
    for listed in (common.graph.initializer, common.graph.value_info):
        kept = [entry for entry in listed if entry.name not in tables]
        del listed[:]
        listed.extend(kept)
    return common

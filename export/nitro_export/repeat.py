"""Equal blocks in a row are traced once: SDXL's UNet has 70 transformer blocks in 11 rows, its text encoders 44 layers.

Tracing costs per operator, so before it the blocks between the first and the last of a row are taken out, and in the graph
the first block's nodes are repeated with the other blocks' weights. The last block stays, since a text encoder's result is
what stands before it.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir
import onnx_ir.passes.common as passes
from torch import nn

from nitro_rt.errors import ExportError

FIRST_LAYER = {"BasicTransformerBlock": "norm1", "CLIPEncoderLayer": "layer_norm1"}
"""Kinds of block that are repeated -> the layer that is given the block's input."""
SCOPES = "pkg.torch.onnx.name_scopes"
"""Where the exporter notes which module a node comes from."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """Blocks of which only the first and the last were traced."""

    path: str
    """Of the module list."""
    first_layer: str
    num_blocks: int


def shorten(stage: nn.Module) -> list[Row]:
    """Take the inner blocks out of every row of `stage`; the last keeps its name."""
    rows = []
    for path, module in stage.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) < 3 or not _equal(module):
            continue
        kind = type(module[0]).__name__
        if kind in FIRST_LAYER:
            rows.append(Row(path=path, first_layer=FIRST_LAYER[kind], num_blocks=len(module)))
            for index in range(1, len(module) - 1):
                del module._modules[str(index)]  # `del module[index]` would renumber the last
    return rows


def _equal(blocks: nn.ModuleList) -> bool:
    def form(block: nn.Module) -> tuple[object, ...]:
        return (type(block), *((name, value.shape) for name, value in block.named_parameters()))

    return len({form(block) for block in blocks}) == 1


def lengthen(model: ir.Model, rows: list[Row]) -> None:
    """Put the inner blocks of each row into the graph; their weights are initializers without values.

    Raises: ExportError if a traced block is not the plain chain that this relies on.
    """
    by_scope: dict[str, list[ir.Node]] = {}
    for node in model.graph:
        for scope in _scopes(node):
            by_scope.setdefault(scope, []).append(node)
    for row in rows:
        _repeat(model.graph, row, by_scope)
    passes.TopologicalSortPass()(model)


def _scopes(node: ir.Node) -> list[str]:
    text = node.metadata_props.get(SCOPES)
    return list(ast.literal_eval(text)) if text else []


def _repeat(graph: ir.Graph, row: Row, by_scope: Mapping[str, list[ir.Node]]) -> None:
    first = f"{row.path}.0"
    given = _given(row, by_scope)
    # Constants are everybody's, wherever they were met first.
    region = {node for node in by_scope[first] if node.inputs}
    # What folding made of several nodes has lost its scope; it is the block's if it is given something of the block's.
    for node in graph:
        if not _scopes(node) and any(value is not None and value.producer() in region for value in node.inputs):
            region.add(node)
    nodes = [node for node in graph if node in region]
    outputs = [value for node in nodes for value in node.outputs if any(use.node not in region for use in value.uses())]
    if len(outputs) != 1:
        raise ExportError(
            f"{first}: {len(outputs)} of its values are used outside, one was expected; this torch is not supported"
        )
    result = outputs[0]
    outside = [use for use in result.uses() if use.node not in region]
    latest, after = result, nodes[-1]
    for index in range(1, row.num_blocks - 1):
        known: dict[ir.Value | None, ir.Value | None] = {given: latest}
        copies = [_copy(graph, node, known, f"{first}.", f"{row.path}.{index}.") for node in nodes]
        graph.insert_after(after, copies)
        copied = known[result]
        assert copied is not None
        latest, after = copied, copies[-1]
    for use in outside:
        use.node.replace_input_with(use.idx, latest)
    if result.is_graph_output():
        name, result.name = result.name, f"{first}.{result.name}"
        latest.name = name
        graph.outputs[list(graph.outputs).index(result)] = latest


def _given(row: Row, by_scope: Mapping[str, list[ir.Node]]) -> ir.Value:
    """What the block is given: the first operand of its first layer."""
    value = by_scope[f"{row.path}.0.{row.first_layer}"][0].inputs[0]
    assert value is not None
    return value


def _copy(graph: ir.Graph, node: ir.Node, known: dict[ir.Value | None, ir.Value | None], old: str, new: str) -> ir.Node:
    """`node` for another block: its operands from `known`, its weights by their new names, or as they are."""
    for value in node.inputs:
        if value is not None and value not in known and value.is_initializer() and str(value.name).startswith(old):
            weight = ir.Value(name=new + str(value.name).removeprefix(old), type=value.type, shape=value.shape)
            graph.initializers.add(weight)
            known[value] = weight
    copy = ir.Node(
        node.domain,
        node.op_type,
        [known.get(value, value) for value in node.inputs],
        list(node.attributes.values()),
        num_outputs=len(node.outputs),
        version=node.version,
    )
    for value, twin in zip(node.outputs, copy.outputs, strict=True):
        twin.type, twin.shape = value.type, value.shape
        twin.name = f"{new}{value.name}"
        known[value] = twin
    return copy

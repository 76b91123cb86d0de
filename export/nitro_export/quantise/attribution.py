"""Which quantised operators are wrong: each computed alone, with the numbers that stand in the graph, on the parent's inputs.

Everything that quantisation changed is read from the graph: the codes and scales of weights, scale and zero point of the
input, smoothing, and a LayerNormalization that smoothing was folded into. So a scale that was damaged after calibration shows,
and shows at the operator that has it, not at those behind.

Shapes: N rows, K numbers in a row, O output channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import onnx
import torch
from torch import Tensor, nn

from nitro_export.quantise.drawing import Report, WatchedStage, watched_stages, weights_of
from nitro_export.quantise.formats import FP8, INT8, UINT8, NumberFormat
from nitro_export.quantise.prompts import built_in_prompts, prompts_sha256
from nitro_export.quantise.ranges import QUANTISABLE
from nitro_export.quantise.recipe import QuantisationRecipe
from nitro_export.quantise.sensitivity import sqnr_db
from nitro_export.quantise.weight_file import read_tensor
from nitro_export.structure import load_structure
from nitro_rt.errors import ConfigError, ExportError
from nitro_rt.manifest import EXPORT_FILE, GraphsManifest, from_json, resolve

if TYPE_CHECKING:
    from nitro_export.parent import Parent

WORST = 10
SUSPICIOUS_DB = 3.0
"""Below what calibration measured: fewer prompts and another choice of rows move an operator's figure by less."""
FORMATS = {kind.onnx_type: kind for kind in (INT8, UINT8, FP8)}


@dataclass(frozen=True, kw_only=True)
class LayerError:
    """What one quantised operator does to its output."""

    name: str
    sqnr_db: float
    """Signal to noise of its output, given what the parent gives this layer."""
    expected_db: float
    """What calibration measured."""

    @property
    def suspicious(self) -> bool:
        """Whether its numbers cannot be those that calibration chose."""
        return self.sqnr_db < self.expected_db - SUSPICIOUS_DB


def attribute(
    graphs: Path,
    parent: Parent,
    *,
    prompts: Sequence[str] | None = None,
    worst: int | None = WORST,
    report: Report = lambda line: None,
) -> tuple[LayerError, ...]:
    """The operators that add the most error, worst first: those that fall short of the recipe, then by signal to noise.

    Args:
        graphs: a folder of `quantise_graphs`.
        parent: the same checkpoint in float32; it draws one picture per prompt with the largest step count in the folder,
            best at the size of the recipe's calibration.
        prompts: what calibration was given, or its beginning; None means the first two of the built-in ones. On anything
            that calibration has not seen, inputs may leave their range, and operators look wrong that are as they should be.
        worst: how many; None means all.
    Raises: ConfigError if the graphs are not quantised or prompts are needed; ExportError if they lack a layer of their recipe;
        BundleError if the manifest names a file outside of the folder. (Digests are not compared: what was damaged is shown.)
    """
    path = graphs / EXPORT_FILE
    manifest = from_json(GraphsManifest, path.read_text(encoding="utf-8"), where=str(path))
    if manifest.quantisation is None:
        raise ConfigError(f"{graphs} holds graphs in {manifest.precision}: nothing in them is quantised")
    recipe = QuantisationRecipe.from_dict(manifest.quantisation, where=str(path))
    expected = {layer.name: layer.sqnr_db for layer in recipe.layers}
    chosen = _prompts(recipe, prompts)
    graph_of = {"denoise": manifest.denoise[max(manifest.denoise)], "decode": manifest.decode}
    path_of = {stage: resolve(graphs, graph.files[0]) for stage, graph in graph_of.items()}
    found: list[LayerError] = []
    kinds = (*QUANTISABLE, nn.LayerNorm)
    for stage in watched_stages(parent, chosen, manifest.schedule.steps, kinds=kinds, seed=recipe.seed, report=report):
        path = path_of[stage.name]
        operators = _operators(load_structure(path), graphs)
        if missing := [name for name in stage.modules if name in expected and name not in operators]:
            raise ExportError(f"{path} does not quantise {missing[0]}, which its recipe does; quantise the graphs again")
        for name, operator in operators.items():
            found.append(LayerError(name=name, sqnr_db=_sqnr(name, operator, stage), expected_db=expected[name]))
    found.sort(key=lambda error: (not error.suspicious, error.sqnr_db, error.name))
    return tuple(found[:worst])


def _prompts(recipe: QuantisationRecipe, prompts: Sequence[str] | None) -> tuple[str, ...]:
    if prompts is not None:
        return tuple(prompts)
    built_in = built_in_prompts(recipe.num_prompts, recipe.seed)
    if prompts_sha256(built_in) != recipe.prompts_sha256:
        raise ConfigError("the recipe was calibrated on prompts of its own; give them, attribution needs inputs that were seen")
    return built_in[:2]


@dataclass(frozen=True, kw_only=True)
class _Operator:
    """A quantised MatMul, Gemm or Conv, with the numbers that stand in the graph."""

    codes: Tensor
    weight_scales_O: Tensor
    weight_format: NumberFormat
    input_scale: Tensor
    input_zero_point: int
    input_format: NumberFormat
    smoothing_K: Tensor | None
    """What a Mul in front multiplies the input with."""
    norm: str | None
    """The LayerNormalization that gives the input, by its module's name, ..."""
    norm_affine: tuple[Tensor, ...]
    """... with its weight and bias."""


def _operators(model: onnx.ModelProto, folder: Path) -> dict[str, _Operator]:
    """By layer. Weights are read: call it for one graph at a time."""
    producers = {output: node for node in model.graph.node for output in node.output}
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}

    def value(name: str) -> Tensor:
        return read_tensor(tensors[name], folder)

    found = {}
    for node in model.graph.node:
        if node.op_type not in ("MatMul", "Gemm", "Conv"):
            continue
        weights = producers.get(node.input[1])
        if weights is not None and weights.op_type == "Transpose":
            weights = producers.get(weights.input[0])
        if weights is None or weights.op_type != "DequantizeLinear" or weights.input[0] not in tensors:
            continue
        quantise = producers[producers[node.input[0]].input[0]]
        source = producers.get(quantise.input[0])
        smoothing = None
        if source is not None and source.op_type == "Mul" and source.input[1].endswith(".smoothing"):
            smoothing, source = value(source.input[1]).float(), producers.get(source.input[0])
        norm = source if source is not None and source.op_type == "LayerNormalization" else None
        found[weights.input[0].removesuffix(".weight")] = _Operator(
            codes=value(weights.input[0]),
            weight_scales_O=value(weights.input[1]).float(),
            weight_format=FORMATS[tensors[weights.input[0]].data_type],
            input_scale=value(quantise.input[1]).float(),
            input_zero_point=int(value(quantise.input[2]).float()),
            input_format=FORMATS[tensors[quantise.input[2]].data_type],
            smoothing_K=smoothing,
            norm=None if norm is None else norm.input[1].removesuffix(".weight"),
            norm_affine=() if norm is None else tuple(value(name).float() for name in norm.input[1:]),
        )
    return found


@torch.no_grad()
def _sqnr(name: str, operator: _Operator, stage: WatchedStage) -> float:
    recorder, module = stage.recorder, stage.modules[name]
    if operator.norm is None:
        given = parents = recorder.records[recorder.leaders[name]].rows()
    else:
        norm = stage.modules[operator.norm]
        assert isinstance(norm, nn.LayerNorm)
        rows = recorder.records[recorder.leaders[operator.norm]].rows()
        parents = norm(rows)
        given = nn.functional.layer_norm(rows, norm.normalized_shape, eps=norm.eps)
        weight, *bias = operator.norm_affine
        given = given * weight + (bias[0] if bias else 0)
    if operator.smoothing_K is not None:
        given = given * operator.smoothing_K
    codes = operator.codes.reshape(len(operator.codes), -1)
    weights_OK = operator.weight_format.values(codes, operator.weight_scales_O[:, None])
    given = operator.input_format.rounded(given, operator.input_scale, operator.input_zero_point)
    return sqnr_db(parents @ weights_of(module).T, given @ weights_OK.T)

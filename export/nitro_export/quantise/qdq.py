"""`quantise_graphs`: float graphs and a recipe in, a graphs folder with explicit QuantizeLinear and DequantizeLinear out.

What a quantised layer looks like (Gemm and Conv likewise; a Transpose of the weights stays where it was):

    x -> [Mul 1/s ->] QuantizeLinear -> DequantizeLinear ----------------+
    X.weight (codes) -> DequantizeLinear (a scale per output channel) -> MatMul -> Add bias

Division by the smoothing factors s moves into a LayerNormalization's weight and bias where nothing but layers with these
factors reads it. Layers that are given the same tensor share its codes. Biases stay floats. Weights pass through memory one
by one; all step counts share one file.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx
import torch
from onnx import NodeProto, helper
from torch import Tensor

from nitro_export.export import assembled
from nitro_export.graph import NO_HARD_LINK
from nitro_export.quantise.formats import NumberFormat, activation_format, activation_scale, channel_scales, weight_format
from nitro_export.quantise.recipe import QuantisationRecipe, QuantisedLayer
from nitro_export.quantise.weight_file import TORCH_TYPES, WeightFile, read_tensor
from nitro_export.structure import check_structure, load_structure
from nitro_export.toolchain import toolchain
from nitro_rt.errors import ConfigError, ExportError
from nitro_rt.manifest import EXPORT_FILE, FileRef, Graph, GraphsManifest, check_file, from_json, resolve, sha256_of, to_json

FLOAT_PRECISIONS = ("fp32", "fp16", "bf16")
NOTE = "quantised: compared with its parent by its images, not by a tolerance"
SHOWN = 10

Report = Callable[[str], None]


def quantise_graphs(
    graphs: Path, out: Path, recipe: QuantisationRecipe, *, report: Report = lambda line: None
) -> GraphsManifest:
    """Write `denoise` and `decode` of a float graphs folder with quantised layers; `text` comes along as it is.

    Args:
        graphs: a folder of `export_checkpoint` in fp32, fp16 or bf16, which is what the rest computes in.
        out: not there yet; assembled in a hidden sibling and published by one rename. It shares nothing with `graphs` but,
            by hard link, files that do not change (copies where the file system has no links).
        recipe: for the same checkpoint and shift, and for these step counts at least.
    Returns: the manifest that stands in `out`.
    Raises: ConfigError for a recipe of another checkpoint; BundleError for a folder that is damaged or names files outside of
        it; ExportError for one without a manifest, or a layer that is not there.
    """
    started = time.perf_counter()
    manifest = _read(graphs)
    _check_recipe(recipe, manifest)
    _check_files(graphs, manifest)
    try:
        with assembled(out) as folder:
            for reference in (*manifest.text.files, *(tokenizer.file for tokenizer in manifest.tokenizers)):
                _link_or_copy(resolve(graphs, reference), folder / reference.path)
            denoise = {f"denoise-{count}": graph for count, graph in manifest.denoise.items()}
            quantised = {
                **_quantised(graphs, folder, denoise, recipe, "network.unet.", report),
                **_quantised(graphs, folder, {"decode": manifest.decode}, recipe, "vae.", report),
            }
            written = dataclasses.replace(
                manifest,
                precision=recipe.precision,
                denoise={count: quantised[f"denoise-{count}"] for count in manifest.denoise},
                decode=quantised["decode"],
                toolchain=manifest.toolchain | toolchain(),
                quantisation=recipe.as_dict(),
            )
            (folder / EXPORT_FILE).write_text(to_json(written), encoding="utf-8")
    except OSError as exc:
        raise ExportError(f"cannot write the graphs folder {out}: {exc}; nothing was left there") from exc
    report(f"graphs in {recipe.precision} in {out}, {time.perf_counter() - started:.1f} s")
    return written


def _read(graphs: Path) -> GraphsManifest:
    path = graphs / EXPORT_FILE
    try:
        manifest = from_json(GraphsManifest, path.read_text(encoding="utf-8"), where=str(path))
    except OSError as exc:
        raise ExportError(f"{graphs} is no graphs folder: {exc}; give one that export_checkpoint wrote") from exc
    if manifest.precision not in FLOAT_PRECISIONS:
        raise ConfigError(
            f"{graphs} holds graphs in {manifest.precision}; only float ones can be quantised: {', '.join(FLOAT_PRECISIONS)}"
        )
    return manifest


def _check_files(graphs: Path, manifest: GraphsManifest) -> None:
    """Each file once, although all step counts have the same weights. Raises: BundleError as `check_file`."""
    references = [file for graph in (manifest.text, *manifest.denoise.values(), manifest.decode) for file in graph.files]
    references += [tokenizer.file for tokenizer in manifest.tokenizers]
    for reference in dict.fromkeys(references):
        check_file(graphs, reference)


def _check_recipe(recipe: QuantisationRecipe, manifest: GraphsManifest) -> None:
    if recipe.checkpoint_sha256 != manifest.source.checkpoint_sha256:
        raise ConfigError(
            f"the recipe was calibrated on the checkpoint {recipe.checkpoint_sha256[:12]}, the graphs are of "
            f"{manifest.source.checkpoint_sha256[:12]}; calibrate this one"
        )
    if recipe.shift != manifest.schedule.shift:
        raise ConfigError(f"the recipe is for shift {recipe.shift}, the graphs have {manifest.schedule.shift}; calibrate again")
    levels = {level for schedule in manifest.schedule.steps.values() for level in schedule.shifted_timesteps}
    if unseen := sorted(levels - set(recipe.noise_levels)):
        raise ConfigError(
            f"the recipe saw the noise levels {', '.join(map(str, recipe.noise_levels))}, the graphs of "
            f"{', '.join(map(str, manifest.denoise))} steps also visit {', '.join(map(str, unseen))}; calibrate for these steps"
        )


def _quantised(
    graphs: Path, folder: Path, floats: Mapping[str, Graph], recipe: QuantisationRecipe, prefix: str, report: Report
) -> dict[str, Graph]:
    """The graphs of one network, which share their weights."""
    started = time.perf_counter()
    layers = {layer.name: layer for layer in recipe.layers if layer.name.startswith(prefix)}
    models: dict[str, onnx.ModelProto] = {}
    with WeightFile(folder) as weights:
        for name, graph in floats.items():
            model = load_structure(resolve(graphs, graph.files[0]))
            _GraphRewriter(model, graphs, weights, layers, recipe).rewrite()
            models[name] = model
        data = weights.close(models.values())
    written = {}
    for name, model in models.items():
        path = folder / f"{name}.onnx"
        onnx.save(model, str(path))
        try:
            check_structure(path)
        except onnx.checker.ValidationError as exc:
            raise ExportError(f"{path.name}: the ONNX checker refuses the quantised graph: {exc}") from exc
        note = f"{floats[name].note}; {NOTE}" if floats[name].note else NOTE
        files = tuple(_reference(file) for file in (path, data) if file is not None)
        written[name] = dataclasses.replace(floats[name], files=files, parity_max_abs=None, note=note)
    size, seconds = data.stat().st_size / 2**20 if data else 0.0, time.perf_counter() - started
    report(f"{', '.join(floats)}: {len(layers)} layers in {recipe.precision}, {size:.0f} MiB, {seconds:.1f} s")
    return written


@dataclass(frozen=True, kw_only=True)
class QuantisedOperator:
    """A node that a layer of the recipe becomes: MatMul, Gemm or Conv."""

    node: NodeProto
    layer: QuantisedLayer
    weight: str
    """The initializer's name."""
    transpose: NodeProto | None
    """Of the weights, where there is one in between."""


class _GraphRewriter:
    """Rewrites one graph in place; `weights` takes every initializer."""

    def __init__(
        self,
        model: onnx.ModelProto,
        folder: Path,
        weights: WeightFile,
        layers: Mapping[str, QuantisedLayer],
        recipe: QuantisationRecipe,
    ) -> None:
        self._graph, self._folder, self._weights = model.graph, folder, weights
        self._floats = {tensor.name: tensor for tensor in model.graph.initializer}
        self._layers = layers
        self._activations = activation_format(recipe.precision, recipe.symmetric)
        self._weight_format = weight_format(recipe.precision, recipe.weight_bits)
        self._initializers: dict[str, onnx.TensorProto] = {}
        self._nodes: list[NodeProto] = []
        self._weight_nodes: list[NodeProto] = []
        """They depend on initializers only and stand first: a Transpose of the weights may come long before its MatMul."""
        self._codes: dict[tuple[str, float, float, str], str] = {}
        """Tensor, range and smoothing -> the DequantizeLinear's output that layers read instead."""

    def rewrite(self) -> None:
        operators = {id(found.node): found for found in self._operators()}
        folded = self._fold_into_norms(list(operators.values()))
        for node in self._graph.node:
            operator = operators.get(id(node))
            if operator is not None:
                node.input[0] = self._quantised_input(operator, smoothed=node.input[0] in folded)
                self._quantise_weight(operator)
            self._nodes.append(node)
        del self._graph.node[:]
        self._graph.node.extend([*self._weight_nodes, *self._nodes])
        self._take_initializers()

    def _operators(self) -> list[QuantisedOperator]:
        """Raises: ExportError if a layer of the recipe is not in the graph, or not as the exporter writes it."""
        producers = {output: node for node in self._graph.node for output in node.output}
        found: dict[str, QuantisedOperator] = {}
        for node in self._graph.node:
            if node.op_type not in ("MatMul", "Gemm", "Conv"):
                continue
            transpose = producers.get(node.input[1])
            if transpose is not None and transpose.op_type != "Transpose":
                continue
            weight = node.input[1] if transpose is None else transpose.input[0]
            layer = self._layers.get(weight.removesuffix(".weight"))
            if layer is None or weight not in self._floats:
                continue
            if not _has_output_channels_first(node, transpose) or layer.name in found:
                raise ExportError(f"{node.op_type} {node.name} uses {weight} in a way that is not known; export again")
            found[layer.name] = QuantisedOperator(node=node, layer=layer, weight=weight, transpose=transpose)
        if missing := [name for name in self._layers if name not in found]:
            raise ExportError(
                f"the graph lacks {len(missing)} of the recipe's {len(self._layers)} layers: {', '.join(missing[:SHOWN])}; "
                "recipe and graphs are of different networks"
            )
        return list(found.values())

    def _fold_into_norms(self, operators: Iterable[QuantisedOperator]) -> set[str]:
        """Divide LayerNormalizations' weights and biases; returns their outputs, which are smoothed from now on."""
        readers: dict[str, list[NodeProto]] = {}
        for node in self._graph.node:
            for name in node.input:
                readers.setdefault(name, []).append(node)
        smoothings: dict[str, list[str]] = {}
        for operator in operators:
            smoothings.setdefault(operator.node.input[0], []).append(operator.layer.smoothing)
        norms = {node.output[0]: node for node in self._graph.node if node.op_type == "LayerNormalization"}
        factors = {operator.node.input[0]: operator.layer.factors() for operator in operators}
        folded = set()
        for tensor, found in smoothings.items():
            affine = list(norms[tensor].input[1:]) if tensor in norms else []
            alone = len(readers[tensor]) == len(found) and all(len(readers[name]) == 1 for name in affine)
            if not affine or not alone or len(set(found)) > 1 or not found[0]:
                continue
            folded.add(tensor)
            for name in affine:
                divisors = factors[tensor]
                assert divisors is not None
                value = read_tensor(self._floats[name], self._folder)
                self._put(name, (value.float() / divisors).to(value.dtype))
        return folded

    def _quantised_input(self, operator: QuantisedOperator, *, smoothed: bool) -> str:
        """The name of the tensor that the operator reads instead of its float input."""
        layer, source = operator.layer, operator.node.input[0]
        key = (source, layer.low, layer.high, layer.smoothing)
        if key in self._codes:
            return self._codes[key]
        dtype, name = self._dtype(operator), layer.name
        factors = layer.factors()
        if factors is not None and not smoothed:
            divisor = self._put(f"{name}.smoothing", (1 / factors).to(dtype))
            self._nodes.append(helper.make_node("Mul", [source, divisor], [f"{name}.smoothed"], name=f"{name}.smooth"))
            source = f"{name}.smoothed"
        scale, zero_point = activation_scale(layer.low, layer.high, self._activations, dtype)
        parameters = [
            self._put(f"{name}.input_scale", scale.to(dtype)),
            self._put(f"{name}.input_zero_point", torch.tensor(zero_point).to(self._activations.dtype)),
        ]
        codes, values = f"{name}.input_codes", f"{name}.input"
        self._nodes.append(helper.make_node("QuantizeLinear", [source, *parameters], [codes], name=f"{name}.quantise"))
        self._nodes.append(helper.make_node("DequantizeLinear", [codes, *parameters], [values], name=f"{name}.dequantise"))
        self._codes[key] = values
        return values

    def _quantise_weight(self, operator: QuantisedOperator) -> None:
        weight, scale, values = operator.weight, f"{operator.weight}_scale", f"{operator.weight}_values"
        if weight not in self._weights:
            codes, scales = quantised_weight(
                read_tensor(self._floats[weight], self._folder), operator.layer.factors(), self._weight_format
            )
            self._put(weight, codes)
            self._put(scale, scales)
        else:
            self._put(weight)
            self._put(scale)
        node = helper.make_node("DequantizeLinear", [weight, scale], [values], name=f"{weight}.dequantise", axis=0)
        self._weight_nodes.append(node)
        if operator.transpose is None:
            operator.node.input[1] = values
        else:
            operator.transpose.input[0] = values

    def _dtype(self, operator: QuantisedOperator) -> torch.dtype:
        return TORCH_TYPES[self._floats[operator.weight].data_type]

    def _put(self, name: str, tensor: Tensor | None = None) -> str:
        self._initializers[name] = self._weights.initializer(name, tensor)
        return name

    def _take_initializers(self) -> None:
        """Those that were not quantised come along; tables that differ between step counts are inline and never shared."""
        rest = [tensor for tensor in self._graph.initializer if tensor.name not in self._initializers]
        del self._graph.initializer[:]
        for tensor in rest:
            if tensor.data_location != onnx.TensorProto.EXTERNAL:
                self._graph.initializer.append(tensor)
            elif tensor.name in self._weights:
                self._put(tensor.name)
            else:
                self._put(tensor.name, read_tensor(tensor, self._folder))
        self._graph.initializer.extend(self._initializers.values())


def quantised_weight(weight: Tensor, factors_K: Tensor | None, kind: NumberFormat) -> tuple[Tensor, Tensor]:
    """Codes in the weight's shape, and a scale [O] for each output channel in the weight's type."""
    values_OK = weight.float().reshape(len(weight), -1)
    if factors_K is not None:
        values_OK = values_OK * factors_K
    scales_O = channel_scales(values_OK, kind, weight.dtype)
    return kind.codes(values_OK, scales_O[:, None]).reshape(weight.shape), scales_O.to(weight.dtype)


def _has_output_channels_first(node: NodeProto, transpose: NodeProto | None) -> bool:
    """Whether the initializer is [O, ...], as torch stores weights: MatMul after Transpose, Gemm with transB, Conv."""
    attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    if node.op_type == "MatMul":
        return transpose is not None
    return transpose is None and (node.op_type == "Conv" or (attributes.get("transB"), attributes.get("transA", 0)) == (1, 0))


def _reference(path: Path) -> FileRef:
    return FileRef(path=path.name, sha256=sha256_of(path), num_bytes=path.stat().st_size)


def _link_or_copy(source: Path, target: Path) -> None:
    if target.exists():
        return
    try:
        os.link(source, target)
    except OSError as exc:
        if exc.errno not in NO_HARD_LINK:
            raise
        shutil.copyfile(source, target)

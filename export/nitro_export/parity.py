"""Whether a graph computes what its stage computes: ONNX Runtime against torch, on seeded inputs, right after export.

The reference is always the network in float32, so that float16's own error is measured, too, not only the exporter's.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from torch import Tensor

from nitro_export.stages import DecodeStage, Stage
from nitro_rt.errors import ExportError

Arrays = tuple[NDArray, ...]


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """How far a graph may be from float32 torch."""

    relative: float
    """Largest difference, as a share of the reference's largest value (or of 1, where that is smaller)."""
    mean: float
    """Mean difference, as a share of the reference's spread: a graph that is wrong in a few places passes neither."""


# Text and denoise are floats; decode is compared as bytes, where 1/255 is one level.
TOLERANCES = {
    # Same arithmetic, other order of summation: 1e-6 to 1e-5 in tiny networks, more in the 70 blocks of SDXL.
    ("text", "fp32"): Tolerance(relative=1e-3, mean=1e-4),
    ("denoise", "fp32"): Tolerance(relative=1e-3, mean=1e-4),
    # A value on the edge between two levels may round either way; nothing may move by two.
    ("decode", "fp32"): Tolerance(relative=1.01 / 255, mean=1e-3),
    # bfloat16 carries 8 bits, float16 11: eight times as far.
    ("text", "bf16"): Tolerance(relative=1.6e-1, mean=4e-2),
    ("denoise", "bf16"): Tolerance(relative=2.4e-1, mean=8e-2),
    ("decode", "bf16"): Tolerance(relative=64 / 255, mean=1.6e-1),
    # Weights and activations carry 11 bits (5e-4); layer upon layer adds up to a few per mille.
    ("text", "fp16"): Tolerance(relative=2e-2, mean=5e-3),
    ("denoise", "fp16"): Tolerance(relative=3e-2, mean=1e-2),
    # Some levels at single pixels; a spread-wide mean error of 2 % is 34 dB of the image's own spread.
    ("decode", "fp16"): Tolerance(relative=8 / 255, mean=2e-2),
}


def references(stage: Stage, inputs: Sequence[Sequence[Tensor]]) -> list[Arrays]:
    """What the stage gives in float32 for each set of inputs; call it before the stage is narrowed."""
    return [tuple(output.numpy() for output in _run_torch(stage, example)) for example in inputs]


def check_narrow(
    name: str, stage: Stage, inputs: Sequence[Sequence[Tensor]], expected: Sequence[Arrays], *, precision: str
) -> None:
    """Whether the narrowed stage, in torch, stays finite and near float32.

    ONNX Runtime computes float16 graphs in float32 on the CPU where it has no kernel, so it would not see an overflow.
    Raises: ExportError saying what to do instead.
    """
    for example, reference in zip(inputs, expected, strict=True):
        example = as_inputs_of(stage, example)
        if isinstance(stage, DecodeStage):  # before rounding, where a NaN is not yet a byte
            with torch.no_grad():
                found: Arrays = (stage.levels(*example).numpy(),)
        else:
            found = tuple(output.float().numpy() for output in _run_torch(stage, example))
        if not all(np.isfinite(array).all() for array in found):
            raise ExportError(f"{name}: the network overflows in {precision} (NaN or infinity); {_advice(name)}")
        _compare(name, precision, found, reference, f"in {precision}, torch; {_advice(name)}")


def check_graph(
    name: str, path: Path, stage: Stage, inputs: Sequence[Sequence[Tensor]], expected: Sequence[Arrays], *, precision: str
) -> float:
    """Compare the graph in `path` with the references; returns the largest absolute difference.

    Raises: ExportError if ONNX Runtime refuses the graph or a tolerance is exceeded.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    try:
        # ONNX Runtime has no bfloat16 on the CPU: the same graph is then computed in float32.
        model = widened(path).SerializeToString() if precision == "bf16" else os.fspath(path)
        session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        worst = 0.0
        for example, reference in zip(inputs, expected, strict=True):
            example = as_inputs_of(stage, example)
            feed = {spec.name: tensor.numpy() for spec, tensor in zip(stage.inputs, example, strict=True)}
            found = tuple(np.asarray(output) for output in session.run(None, feed))
            worst = max(worst, _compare(name, precision, found, reference, "in ONNX Runtime"))
    except ExportError:
        raise
    except Exception as exc:  # ONNX Runtime's exceptions share no base class
        raise ExportError(f"{name}: ONNX Runtime refuses the graph: {exc}") from exc
    return worst


def widened(path: Path) -> onnx.ModelProto:
    """The graph in `path` with float32 wherever it says bfloat16, weights inside; for networks below protobuf's 2 GiB."""
    model = ir.load(path)
    for value in model.graph.initializers.values():
        assert value.const_value is not None
        array = _array(value.const_value)
        value.const_value = ir.tensor(array.astype(np.float32) if value.dtype == ir.DataType.BFLOAT16 else array.copy())
    for node in model.graph.all_nodes():
        for key, attribute in list(node.attributes.items()):
            if attribute.type == ir.AttributeType.INT and node.op_type == "Cast" and attribute.value == ir.DataType.BFLOAT16:
                node.attributes[key] = ir.AttrInt64(key, ir.DataType.FLOAT)
            elif attribute.type == ir.AttributeType.TENSOR and attribute.value.dtype == ir.DataType.BFLOAT16:
                node.attributes[key] = ir.AttrTensor(key, ir.tensor(attribute.value.numpy().astype(np.float32)))
    for value in (*model.graph.initializers.values(), *(o for node in model.graph.all_nodes() for o in node.outputs)):
        if value.dtype == ir.DataType.BFLOAT16:
            value.dtype = ir.DataType.FLOAT
    return ir.to_proto(model)


def _array(tensor: ir.TensorProtocol) -> NDArray:
    """A tensor's values. onnx_ir itself refuses to read files with several hard links, which is how graphs share them."""
    if not isinstance(tensor, ir.ExternalTensor):
        return tensor.numpy()
    content = np.fromfile(tensor.path, np.uint8, count=tensor.length or 0, offset=tensor.offset or 0)
    return content.view(tensor.dtype.numpy()).reshape(tensor.shape.numpy())


def _compare(name: str, precision: str, found: Arrays, expected: Arrays, where: str) -> float:
    """The largest absolute difference. Raises: ExportError past the tolerance."""
    tolerance = TOLERANCES[name.partition("-")[0], precision]
    worst = 0.0
    for index, (one, other) in enumerate(zip(found, expected, strict=True)):
        one, other = one.astype(np.float64), other.astype(np.float64)
        if not np.isfinite(one).all() or not np.isfinite(other).all():
            raise ExportError(f"{name}: output {index} is not finite {where}")
        difference = np.abs(one - other)
        largest, mean = float(difference.max()), float(difference.mean())
        # Bytes span 255 levels whatever this image's brightest pixel is.
        scale = 255.0 if name == "decode" else max(1.0, float(np.abs(other).max()))
        if largest > tolerance.relative * scale or mean > tolerance.mean * max(float(other.std()), 1e-3 * scale):
            raise ExportError(
                f"{name}: output {index} differs from torch in float32 by {largest:.3g} (mean {mean:.3g}) where values reach "
                f"{scale:.3g}; allowed for {precision}: {tolerance.relative:.2g} and {tolerance.mean:.2g} of them, {where}"
            )
        worst = max(worst, largest)
    return worst


def _run_torch(stage: Stage, example: Sequence[Tensor]) -> tuple[Tensor, ...]:
    with torch.no_grad():
        result = stage(*example)
    return result if isinstance(result, tuple) else (result,)


def as_inputs_of(stage: Stage, example: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(tensor.to(getattr(torch, spec.dtype)) for spec, tensor in zip(stage.inputs, example, strict=True))


def _advice(name: str) -> str:
    if name == "decode":
        return "use a VAE made for float16 (madebyollin/sdxl-vae-fp16-fix), set force_upcast in its config, or use bf16 or fp32"
    return "export with precision fp32"

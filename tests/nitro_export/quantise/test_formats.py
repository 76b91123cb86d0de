"""The arithmetic of codes: ONNX Runtime's QuantizeLinear and DequantizeLinear give the same numbers."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper

from nitro_export.quantise.formats import (
    FP8,
    INT7,
    INT8,
    UINT8,
    NumberFormat,
    activation_format,
    activation_scale,
    channel_scales,
    weight_format,
)
from nitro_rt.errors import ConfigError


def _onnxruntime(values: np.ndarray, scale: float, zero_point: int, kind: NumberFormat) -> np.ndarray:
    zero = helper.make_tensor("z", kind.onnx_type, [], [zero_point])
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [len(values)]) for name in "xy")
    graph = helper.make_graph(nodes, "qdq", [x], [y], [helper.make_tensor("s", TensorProto.FLOAT, [], [scale]), zero])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": values})[0])


@pytest.mark.parametrize(("kind", "low"), [(INT8, -3.0), (UINT8, -0.278), (FP8, -3.0)])
def test_codes_are_those_of_onnx(kind: NumberFormat, low: float) -> None:
    scale, zero_point = activation_scale(low, 3.0, kind)
    values = torch.cat([torch.randn(4000, generator=torch.Generator().manual_seed(0)), torch.zeros(1)])
    if kind is not FP8:
        values = torch.cat([values, (torch.arange(-20, 20) + 0.5) * scale])  # ties round to even
    values = values.clamp(scale * (kind.lowest - zero_point), scale * (kind.highest - zero_point))
    found = kind.rounded(values, scale, zero_point)
    np.testing.assert_array_equal(found.numpy(), _onnxruntime(values.numpy(), scale.item(), zero_point, kind))
    codes = kind.codes(values, scale, zero_point)
    assert codes.dtype == kind.dtype
    np.testing.assert_array_equal(kind.values(codes, scale, zero_point).numpy(), found.numpy())
    assert found[4000] == 0  # zero stays exact: convolutions pad with it


@pytest.mark.parametrize("kind", [INT8, INT7, UINT8, FP8])
def test_what_is_outside_the_range_saturates(kind: NumberFormat) -> None:
    found = kind.codes(torch.tensor([-1e9, 1e9]), torch.tensor(1.0)).float()
    assert found.tolist() == [kind.lowest, kind.highest]


def test_channel_scales_reach_each_channels_largest_weight_and_are_never_zero() -> None:
    weights = torch.tensor([[1.0, -2.0], [0.0, 0.0], [1e-9, 0.0]])
    scales = channel_scales(weights, INT8, torch.float16)
    assert scales[0] == torch.tensor(2 / 127).half().float() and scales[1] == 1 and scales[2] > 0
    assert (scales.half().float() == scales).all()


def test_pairs_that_are_not_offered() -> None:
    with pytest.raises(ConfigError, match="int8 with 8 or 7"):
        weight_format("int8", 4)
    with pytest.raises(ConfigError, match="no zero point"):
        activation_format("fp8", False)
    with pytest.raises(ConfigError, match="available: int8, fp8"):
        activation_format("fp16", True)

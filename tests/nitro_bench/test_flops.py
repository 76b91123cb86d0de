from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from nitro_bench.flops import NotCountable, work_of, work_of_file


def model(nodes: list[Any], inputs: dict[str, tuple[int, ...]], outputs: dict[str, Any], weights: dict[str, np.ndarray]) -> Any:
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])


def zeros(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


def test_a_product_counts_two_per_multiplication() -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    work = work_of(model(nodes, {"x": (3, 5, 7)}, {"y": (3, 5, 11)}, {"w": zeros(7, 11)}))
    assert work.flops == 2 * 3 * 5 * 7 * 11
    assert work.weight_bytes == 4 * 7 * 11
    assert work.io_bytes == 4 * (7 * 11 + 3 * 5 * 7 + 3 * 5 * 11) == work.operator_bytes
    assert work.flops_by("kind") == {"MatMul": work.flops} and work.flops_by("dtype") == {"float32": work.flops}


@pytest.mark.parametrize("transposed", [0, 1])
def test_gemm_reads_its_inner_size_the_right_way(transposed: int) -> None:
    shape = (7, 5) if transposed else (5, 7)
    nodes = [helper.make_node("Gemm", ["x", "w", "b"], ["y"], transA=transposed)]
    assert work_of(model(nodes, {"x": shape}, {"y": (5, 11)}, {"w": zeros(7, 11), "b": zeros(11)})).flops == 2 * 5 * 7 * 11


def test_convolutions_with_groups_and_strides() -> None:
    conv = helper.make_node("Conv", ["x", "w"], ["y"], strides=[2, 2], pads=[1, 1, 1, 1], group=2)
    work = work_of(model([conv], {"x": (1, 4, 8, 8)}, {"y": (1, 6, 4, 4)}, {"w": zeros(6, 2, 3, 3)}))
    assert work.flops == 2 * (6 * 4 * 4) * (2 * 3 * 3)
    back = helper.make_node("ConvTranspose", ["x", "w"], ["y"], strides=[2, 2])
    work = work_of(model([back], {"x": (1, 4, 8, 8)}, {"y": (1, 5, 16, 16)}, {"w": zeros(4, 5, 2, 2)}))
    assert work.flops == 2 * (4 * 8 * 8) * (5 * 2 * 2)


def test_attention_scores_are_not_stored() -> None:
    nodes = [
        helper.make_node("MatMul", ["q", "k"], ["scores"]),
        helper.make_node("Softmax", ["scores"], ["p"]),
        helper.make_node("MatMul", ["p", "v"], ["y"]),
    ]
    work = work_of(model(nodes, {"q": (2, 64, 8), "k": (2, 8, 64), "v": (2, 64, 8)}, {"y": (2, 64, 8)}, {}))
    assert work.flops == 2 * 2 * (2 * 64 * 64 * 8)
    assert work.operator_bytes == 4 * 4 * (2 * 64 * 8)  # q, k, v and the result, no 64x64
    # Without the softmax it is no attention, and the product in between is written and read.
    plain = work_of(model([nodes[0], helper.make_node("MatMul", ["scores", "v"], ["y"])],
                          {"q": (2, 64, 8), "k": (2, 8, 64), "v": (2, 64, 8)}, {"y": (2, 64, 8)}, {}))  # fmt: skip
    assert plain.operator_bytes == work.operator_bytes + 2 * 4 * (2 * 64 * 64)


def test_quantised_operands_are_of_eight_bits() -> None:
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "s"], ["xd"]),
        helper.make_node("DequantizeLinear", ["w", "s"], ["wd"]),
        helper.make_node("Transpose", ["wd"], ["wt"], perm=[1, 0]),
        helper.make_node("MatMul", ["xd", "wt"], ["y"]),
        helper.make_node("MatMul", ["y", "v"], ["z"]),
    ]
    weights = {"w": np.zeros((11, 7), np.uint8), "s": np.float32(0.5).reshape(()), "v": zeros(11, 3)}
    work = work_of(model(nodes, {"x": (5, 7)}, {"z": (5, 3)}, weights))
    assert work.flops_by("dtype") == {"int8": 2 * 5 * 7 * 11, "float32": 2 * 5 * 11 * 3}
    assert work.operators[0].num_bytes == 5 * 7 + 11 * 7 + 4 * 5 * 11


def test_a_note_of_what_a_weight_was_before_it_was_quantised_does_no_harm() -> None:
    half = TensorProto.FLOAT16
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "s", "z"], ["xd"]),
        helper.make_node("DequantizeLinear", ["w", "s", "z"], ["wd"]),
        helper.make_node("MatMul", ["xd", "wd"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("x", half, (5, 7))],
        [helper.make_tensor_value_info("y", half, (5, 11))],
        [
            numpy_helper.from_array(np.zeros((7, 11), np.int8), "w"),
            numpy_helper.from_array(np.array(0.5, np.float16), "s"),
            numpy_helper.from_array(np.array(0, np.int8), "z"),
        ],
        value_info=[helper.make_tensor_value_info("w", half, (7, 11))],
    )
    work = work_of(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]))
    assert work.flops_by("dtype") == {"int8": 2 * 5 * 7 * 11}
    assert work.operator_bytes == 5 * 7 + 7 * 11 + 2 * 5 * 11  # 8-bit operands, a result in float16


def test_a_shape_that_nobody_says_is_refused() -> None:
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "test",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ("N", 7))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ("N", 11))],
        [numpy_helper.from_array(zeros(7, 11), "w")],
    )
    with pytest.raises(NotCountable, match="shape of 'y'"):
        work_of(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]))


def test_weights_in_another_file_are_counted_and_not_read(tmp_path: Path) -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    whole = model(nodes, {"x": (5, 300)}, {"y": (5, 400)}, {"w": zeros(300, 400)})
    onnx.save(whole, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    (tmp_path / "m.data").unlink()
    work = work_of_file(tmp_path / "m.onnx")
    assert work.flops == 2 * 5 * 300 * 400 and work.weight_bytes == 4 * 300 * 400


def test_a_network_counts_as_torch_counts_it(tmp_path: Path) -> None:
    import torch
    from torch import nn
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    class Network(nn.Module):
        """A convolution, an attention and a linear layer, as the UNet and the decoder have them."""

        def __init__(self) -> None:
            super().__init__()
            self.conv, self.qkv, self.out = nn.Conv2d(4, 16, 3, padding=1), nn.Linear(16, 48), nn.Linear(16, 8)

        def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
            tokens_BTC = self.conv(x_BCHW).flatten(2).transpose(1, 2)
            q, k, v = self.qkv(tokens_BTC).reshape(1, -1, 3, 2, 8).permute(2, 0, 3, 1, 4)
            mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            return self.out(mixed)

    network, example = Network().eval(), torch.zeros(1, 4, 8, 8)
    with torch.no_grad():
        # The fused attention of CPUs is not in torch's counter; in plain products it is.
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            network(example)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's exporter warns of torch's own deprecations
            torch.onnx.export(network, (example,), tmp_path / "m.onnx", dynamo=True, verbose=False)
    assert work_of_file(tmp_path / "m.onnx").flops == counter.get_total_flops()

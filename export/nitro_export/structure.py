"""ONNX graphs without their weights: read, and checked, whatever the size of the weights beside them."""

from __future__ import annotations

from pathlib import Path

import onnx


def load_structure(path: Path) -> onnx.ModelProto:
    """The graph in `path`; weights in other files are not read."""
    return onnx.load(str(path), load_external_data=False)


def check_structure(path: Path) -> None:
    """ONNX's own checker on the graph with its external weights as inputs: as valid as the whole, and nothing large is read.

    Given the whole, the checker refuses weights with more than one hard link, which is how graphs share them.
    Raises: onnx.checker.ValidationError, among others.
    """
    model = load_structure(path)
    external = [tensor for tensor in model.graph.initializer if tensor.external_data]
    for tensor in external:
        model.graph.initializer.remove(tensor)
        model.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    onnx.checker.check_model(model)

"""Graphs of several step counts become one that computes what each of them did."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper

from nitro_engines.backends.onnx_join import join_graphs
from nitro_engines.graphs import read_graphs
from nitro_rt.errors import BuildError

MakeGraphs = Callable[..., Path]
STEPS = (1, 2, 4)


@pytest.fixture
def folder(make_graphs: MakeGraphs) -> Path:
    return make_graphs(steps=STEPS)


def paths(folder: Path) -> list[Path]:
    return [folder / f"denoise-{count}.onnx" for count in STEPS]


def edit(path: Path, change: Callable[[onnx.ModelProto], Any]) -> None:
    model = onnx.load(path)
    change(model)
    onnx.save(model, path)


def initializer(model: onnx.ModelProto, name: str) -> onnx.TensorProto:
    return next(tensor for tensor in model.graph.initializer if tensor.name == name)


def run(path: Path, inputs: dict[str, Any], step_index: int) -> Any:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, inputs | {"step_index": np.array([step_index])})[0]


def test_every_step_of_every_count_is_computed_as_before(folder: Path, tmp_path: Path) -> None:
    joined = tmp_path / "joined.onnx"
    join_graphs(paths(folder), joined)
    onnx.checker.check_model(onnx.load(joined), full_check=True)
    random, specs = np.random.default_rng(0), read_graphs(folder).denoise[1].inputs
    inputs = {spec.name: random.standard_normal(spec.shape).astype(np.float32) for spec in specs if spec.dtype == "float32"}
    row, seen = 0, []
    for count, path in zip(STEPS, paths(folder), strict=True):
        for step in range(count):
            seen.append(run(joined, inputs, row))
            assert np.array_equal(seen[-1], run(path, inputs, step))
            row += 1
    assert row == 7 and not np.array_equal(seen[0], seen[-1])


def test_graphs_with_other_weights_are_not_joined(folder: Path, tmp_path: Path) -> None:
    def damage(model: onnx.ModelProto) -> None:
        kernel = initializer(model, "kernel")
        kernel.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(kernel) * 2, "kernel"))

    edit(folder / "denoise-4.onnx", damage)
    with pytest.raises(BuildError, match="denoise-1.onnx and denoise-4.onnx differ in more than their steps' tables; export"):
        join_graphs(paths(folder), tmp_path / "joined.onnx")
    assert not (tmp_path / "joined.onnx").exists()


def test_tables_of_another_width_are_not_joined(folder: Path, tmp_path: Path) -> None:
    def widen(model: onnx.ModelProto) -> None:
        initializer(model, "alpha_N").CopyFrom(numpy_helper.from_array(np.ones((2, 1), np.float32), "alpha_N"))

    edit(folder / "denoise-2.onnx", widen)
    with pytest.raises(BuildError, match="differ in the shape of alpha_N"):
        join_graphs(paths(folder), tmp_path / "joined.onnx")


def test_a_step_number_in_the_arithmetic_is_refused(folder: Path, tmp_path: Path) -> None:
    def count_on(model: onnx.ModelProto) -> None:
        model.graph.node.append(helper.make_node("Neg", ["step_index"], ["before"]))

    edit(folder / "denoise-2.onnx", count_on)
    with pytest.raises(BuildError, match="denoise-2.onnx uses step_index in Neg, not only to select rows"):
        join_graphs(paths(folder), tmp_path / "joined.onnx")


def test_a_graph_without_tables_is_refused(folder: Path, tmp_path: Path) -> None:
    def forget(model: onnx.ModelProto) -> None:
        gather = next(node for node in model.graph.node if node.op_type == "Gather")
        gather.input[1] = "axes"

    edit(folder / "denoise-2.onnx", forget)
    with pytest.raises(BuildError, match="denoise-2.onnx has no tables with one row per step"):
        join_graphs(paths(folder), tmp_path / "joined.onnx")

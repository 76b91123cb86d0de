"""Rows of equal blocks: the graph made of two traced blocks computes what all of them compute."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from safetensors.torch import save_file
from torch import Tensor, nn

from nitro_export import repeat
from nitro_export.graph import WeightFiles, graphs_from_stages
from nitro_export.stages import Stage
from nitro_export.stored import stored_tensors
from nitro_rt.errors import ExportError
from nitro_rt.manifest import TensorSpec

NUM_BLOCKS = 5


class _Rows(Stage):
    """Two rows, one of them too short to be cut, between two layers; the value before the last block comes out, too."""

    parts: Mapping[str, str] = {}

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(16, 32)
        self.blocks = nn.ModuleList(BasicTransformerBlock(32, 2, 16, cross_attention_dim=24) for _ in range(NUM_BLOCKS))
        self.pair = nn.ModuleList(BasicTransformerBlock(32, 2, 16, cross_attention_dim=24) for _ in range(2))
        self.last = nn.Linear(32, 16)
        self.inputs = (
            TensorSpec(name="x", dtype="float32", shape=(1, 7, 16)),
            TensorSpec(name="text", dtype="float32", shape=(1, 5, 24)),
        )
        self.outputs = (
            TensorSpec(name="y", dtype="float32", shape=(1, 7, 16)),
            TensorSpec(name="before", dtype="float32", shape=(1, 7, 32)),
        )

    def forward(self, x: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        hidden, before = self.first(x), x
        for block in self.blocks:
            before, hidden = hidden, block(hidden, encoder_hidden_states=text)
        for block in self.pair:
            hidden = block(hidden, encoder_hidden_states=text)
        return self.last(hidden), before


def test_inner_blocks_come_back_with_their_own_weights(tmp_path: Path) -> None:
    stage = _Rows().eval().requires_grad_(False)
    # Unlike blocks: a copy with another's weights would show.
    assert not torch.equal(stage.blocks[1].attn1.to_q.weight, stage.blocks[2].attn1.to_q.weight)
    save_file(dict(stage.state_dict()), tmp_path / "weights.safetensors")
    given = {spec.name: torch.randn(spec.shape) for spec in stage.inputs}
    expected = stage(**given)
    stored = stored_tensors([tmp_path / "weights.safetensors"])
    path = graphs_from_stages(WeightFiles(folder=tmp_path), {"rows": stage}, stored, torch.float32)["rows"][0]
    assert len(stage.blocks) == 2 and len(stage.pair) == 2  # what was traced
    names = {tensor.name for tensor in onnx.load(path, load_external_data=False).graph.initializer}
    assert {f"blocks.{index}.attn1.to_q.weight" for index in range(NUM_BLOCKS)} <= names
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found = session.run(None, {name: value.numpy() for name, value in given.items()})
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other.numpy(), rtol=1e-4, atol=1e-5)


def test_unequal_blocks_are_all_traced() -> None:
    stage = _Rows()
    stage.blocks[2] = BasicTransformerBlock(32, 4, 16, cross_attention_dim=24)
    assert repeat.shorten(stage) == [] and len(stage.blocks) == NUM_BLOCKS


def test_a_block_with_two_results_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Leaking(_Rows):
        def forward(self, x: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
            leaks: list[Tensor] = []
            self.blocks[0].norm2.register_forward_hook(lambda module, given, result: leaks.append(result))
            y, before = super().forward(x, text)
            return y, before + leaks[0]

    stage = Leaking().eval().requires_grad_(False)
    save_file(dict(stage.state_dict()), tmp_path / "weights.safetensors")
    stored = stored_tensors([tmp_path / "weights.safetensors"])
    with pytest.raises(ExportError, match=r"blocks\.0: 2 of its values are used outside"):
        graphs_from_stages(WeightFiles(folder=tmp_path), {"rows": stage}, stored, torch.float32)

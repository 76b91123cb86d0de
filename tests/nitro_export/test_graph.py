"""What is in the ONNX files: nothing of this machine, equal bytes each time, weights once."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

from nitro_export import read_checkpoint
from nitro_export.graph import graphs_from_stages
from nitro_export.loading import load_vae
from nitro_export.stages import DecodeStage, Stage
from nitro_rt.errors import ExportError
from nitro_rt.manifest import TensorSpec, sha256_of

LATENTS = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def _decode(folder: Path) -> DecodeStage:
    return DecodeStage(load_vae(read_checkpoint(folder)), latent_size=8, size_px=64, batch=1).eval()


class _Tabled(Stage):
    """The smallest stage with a table and a weight that two of them share."""

    def __init__(self, weight: nn.Linear, rows: int, scale: float = 1.0) -> None:
        super().__init__()
        self.weight = weight
        self.register_buffer("table_N", torch.arange(rows, dtype=torch.float32) * scale + 0.5)
        self.inputs = (
            TensorSpec(name="x", dtype="float32", shape=(2, 64)),
            TensorSpec(name="index", dtype="int64", shape=(1,)),
        )
        self.outputs = (TensorSpec(name="y", dtype="float32", shape=(2, 64)),)

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        return self.weight(x) * self.table_N.index_select(0, index)


def test_equal_stages_give_equal_bytes_without_paths(tiny_tiny: Path, tmp_path: Path) -> None:
    digests = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        files = graphs_from_stages(tmp_path / name, {"decode": _decode(tiny_tiny)}, (LATENTS,))["decode"]
        digests.append([sha256_of(path) for path in files])
        assert str(Path(torch.__file__).parent).encode() not in files[0].read_bytes()
        assert files[1].name == f"{sha256_of(files[1])}.data"
        assert sorted(path.name for path in (tmp_path / name).iterdir()) == sorted(path.name for path in files)
    assert digests[0] == digests[1]


def test_the_cast_to_bytes_comes_last(tiny_tiny: Path, tmp_path: Path) -> None:
    path = graphs_from_stages(tmp_path, {"decode": _decode(tiny_tiny)}, (LATENTS,))["decode"][0]
    graph = onnx.load(path, load_external_data=False).graph
    to_bytes = [node for node in graph.node if onnx.TensorProto.UINT8 in [a.i for a in node.attribute if a.name == "to"]]
    assert [list(node.output) for node in to_bytes] == [["images"]]
    assert not any("images" in node.input for node in graph.node)


def test_stages_share_weights_and_keep_their_tables(tmp_path: Path) -> None:
    import onnxruntime as ort

    weight = nn.Linear(64, 64).requires_grad_(False)
    stages = {"a": _Tabled(weight, 1), "b": _Tabled(weight, 3), "c": _Tabled(weight, 3, scale=2.0)}
    x = torch.randn(2, 64)
    files = graphs_from_stages(tmp_path, stages, (x, torch.tensor([0])))
    assert len({paths[1] for paths in files.values()}) == 1
    for name, stage in stages.items():
        session = ort.InferenceSession(str(files[name][0]), providers=["CPUExecutionProvider"])
        for index in range(len(stage.table_N)):
            (found,) = session.run(None, {"x": x.numpy(), "index": torch.tensor([index]).numpy()})
            torch.testing.assert_close(torch.from_numpy(found), stage(x, torch.tensor([index])))


def test_a_graph_that_loses_an_input_is_refused(tmp_path: Path) -> None:
    stage = _Tabled(nn.Linear(64, 64).requires_grad_(False), 2)
    stage.inputs = (stage.inputs[0], TensorSpec(name="index", dtype="int64", shape=(2,)))
    with pytest.raises(ExportError, match="expected"):
        graphs_from_stages(tmp_path, {"a": stage}, (torch.randn(2, 64), torch.tensor([0])))


def test_what_torch_cannot_export_is_an_export_error(tmp_path: Path) -> None:
    class Unsteady(_Tabled):
        def forward(self, x: Tensor, index: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(ExportError, match="torch cannot export"):
        graphs_from_stages(tmp_path, {"a": Unsteady(nn.Linear(64, 64), 2)}, (torch.randn(2, 64), torch.tensor([0])))

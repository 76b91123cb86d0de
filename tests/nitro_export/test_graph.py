"""What is in the ONNX files: nothing of this machine, equal bytes each time, weights once and where they were."""

from __future__ import annotations

import errno
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn

from nitro_export import read_checkpoint
from nitro_export.graph import WeightFiles, graphs_from_stages
from nitro_export.loading import empty_part_of_graph, fill, load_part
from nitro_export.parity import widened
from nitro_export.stages import DecodeStage, Stage
from nitro_export.stored import sha256_of_finite, stored_tensors
from nitro_rt.errors import ExportError
from nitro_rt.manifest import TensorSpec, sha256_of

LATENTS = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def _written(checkpoint: Path, folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Path, ...]:
    """The decoder's graph and weight files in `folder`."""
    folder.mkdir(exist_ok=True)
    vae, stored = empty_part_of_graph(read_checkpoint(checkpoint), "vae")
    stage = DecodeStage(vae, latent_size=8, size_px=64, batch=1).eval()
    if dtype != torch.float32:
        stage.narrow(dtype)
    by_parameter = {f"vae.{name}": tensor for name, tensor in stored.items()}
    return graphs_from_stages(WeightFiles(folder=folder), {"decode": stage}, by_parameter, dtype)["decode"]


def _run(model: str | bytes, **feed: NDArray) -> NDArray:
    import onnxruntime as ort

    return ort.InferenceSession(model, providers=["CPUExecutionProvider"]).run(None, feed)[0]


class _Tabled(Stage):
    """The smallest stage with a table and a weight that two of them share."""

    parts: Mapping[str, str] = {}

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


@pytest.fixture
def linear(tmp_path: Path) -> Path:
    """A weight file for `_Tabled`."""
    save_file({"weight.weight": torch.randn(64, 64), "weight.bias": torch.randn(64)}, tmp_path / "linear.safetensors")
    return tmp_path / "linear.safetensors"


def _graphs(folder: Path, weights: Path, stages: Mapping[str, Stage]) -> dict[str, tuple[Path, ...]]:
    folder.mkdir()
    return graphs_from_stages(WeightFiles(folder=folder), stages, stored_tensors([weights]), torch.float32)


def test_equal_stages_give_equal_bytes_without_paths(tiny_tiny: Path, tmp_path: Path) -> None:
    digests = []
    for name in ("one", "two"):
        files = _written(tiny_tiny, tmp_path / name, torch.bfloat16)
        digests.append([sha256_of(path) for path in files])
        assert str(Path(torch.__file__).parent).encode() not in files[0].read_bytes()
        assert files[1].name == f"{sha256_of(files[1])}.data"
        assert sorted(path.name for path in (tmp_path / name).iterdir()) == sorted(path.name for path in files)
    assert digests[0] == digests[1]


def test_weights_are_the_checkpoints_own_bytes(tiny_tiny: Path, tmp_path: Path) -> None:
    graph, own, folded = _written(tiny_tiny, tmp_path / "graphs")
    (source,) = (tiny_tiny / "vae").glob("*.safetensors")
    assert own.name == f"{sha256_of(source)}.safetensors" and own.samefile(source)
    initializers = onnx.load(graph, load_external_data=False).graph.initializer
    elsewhere = [tensor for tensor in initializers if any(entry.value == folded.name for entry in tensor.external_data)]
    assert [tensor.dims[2:] for tensor in elsewhere] == [[2, 2]] * 3  # those behind a doubling alone
    inline = [tensor for tensor in initializers if not tensor.external_data]
    # Nothing that an optimiser made of weights (a transposed copy of each, say) stands in the graph.
    assert len(inline) < len(initializers) and graph.stat().st_size < source.stat().st_size / 4


def test_without_hard_links_the_weights_are_copied(tiny_tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_link(*_: object) -> None:
        raise OSError(errno.EXDEV, "another file system")

    monkeypatch.setattr("os.link", no_link)
    files = WeightFiles(folder=tmp_path)
    (source,) = (tiny_tiny / "vae").glob("*.safetensors")
    name = files.adopt(source)
    assert files.copied == {name} and not files.linked
    assert files.summary() == "weight files: 0 linked, 1 copied (no hard links to the checkpoint's files), 0 written"
    assert sha256_of(tmp_path / name) == sha256_of(source) and not (tmp_path / name).samefile(source)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_another_type_is_written_anew(tiny_tiny: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    graph, weights = _written(tiny_tiny, tmp_path / "graphs", dtype)
    assert weights.suffix == ".data" and weights.stat().st_nlink == 1
    stage = DecodeStage(load_part(read_checkpoint(tiny_tiny), "vae"), latent_size=8, size_px=64, batch=1).eval()
    model = widened(graph).SerializeToString() if dtype == torch.bfloat16 else str(graph)
    difference = np.abs(_run(model, latents=LATENTS.numpy()).astype(int) - stage(LATENTS).numpy())
    assert 0 < difference.max() <= (40 if dtype == torch.bfloat16 else 8)  # 8 bits and 11 bits, through a dozen layers


def test_a_weight_that_float16_cannot_hold_is_named(copied: Path, tmp_path: Path) -> None:
    _edit(copied / "vae", lambda weights: weights["decoder.conv_in.weight"].fill_(1e6))
    with pytest.raises(ExportError, match=r"decoder.conv_in.weight reaches 1e\+06, which float16 cannot hold; .* bf16"):
        _written(copied, tmp_path / "graphs", torch.float16)


def test_weights_that_are_not_finite_are_named(copied: Path, tmp_path: Path) -> None:
    _edit(copied / "vae", lambda weights: weights["decoder.conv_in.bias"].fill_(float("nan")))
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(ExportError, match="holds NaN or infinity in decoder.conv_in.bias"):
            _written(copied, tmp_path / str(dtype), dtype)


def _edit(part: Path, change: object) -> None:
    from safetensors.torch import load_file

    (path,) = part.glob("*.safetensors")
    weights = load_file(path)
    assert callable(change)
    change(weights)
    save_file(weights, path)


def test_the_cast_to_bytes_comes_last(tiny_tiny: Path, tmp_path: Path) -> None:
    path = _written(tiny_tiny, tmp_path / "graphs")[0]
    graph = onnx.load(path, load_external_data=False).graph
    to_bytes = [node for node in graph.node if onnx.TensorProto.UINT8 in [a.i for a in node.attribute if a.name == "to"]]
    assert [list(node.output) for node in to_bytes] == [["images"]]
    assert not any("images" in node.input for node in graph.node)


def test_stages_share_weights_and_keep_their_tables(linear: Path, tmp_path: Path) -> None:
    weight = nn.Linear(64, 64)
    fill(weight, {key.removeprefix("weight."): tensor for key, tensor in stored_tensors([linear]).items()}, torch.float32)
    stages = {"a": _Tabled(weight, 1), "b": _Tabled(weight, 3), "c": _Tabled(weight, 3, scale=2.0)}
    x = torch.randn(2, 64)
    expected = {
        name: [stage(x, torch.tensor([index])) for index in range(len(stage.table_N))] for name, stage in stages.items()
    }
    files = _graphs(tmp_path / "graphs", linear, stages)
    assert len({paths[1] for paths in files.values()}) == 1
    for name, rows in expected.items():
        for index, row in enumerate(rows):
            found = _run(str(files[name][0]), x=x.numpy(), index=np.array([index]))
            # 64 products per value, summed in another order; another stage's table would be off by whole numbers.
            torch.testing.assert_close(torch.from_numpy(found), row, rtol=1e-5, atol=1e-4)


def test_a_graph_that_loses_an_input_is_refused(linear: Path, tmp_path: Path) -> None:
    stage = _Tabled(nn.Linear(64, 64).requires_grad_(False), 2)
    stage.outputs = (TensorSpec(name="y", dtype="float32", shape=(2, 63)),)
    with pytest.raises(ExportError, match="expected"):
        _graphs(tmp_path / "graphs", linear, {"a": stage})


def test_what_torch_cannot_export_is_an_export_error(linear: Path, tmp_path: Path) -> None:
    class Unsteady(_Tabled):
        def forward(self, x: Tensor, index: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(ExportError, match="torch cannot export"):
        _graphs(tmp_path / "graphs", linear, {"a": Unsteady(nn.Linear(64, 64), 2)})


# --- what lies in the files -------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda content: content[:7], "no safetensors file"),
        (lambda content: content[:-1], "was cut"),
        (lambda content: content[:8] + b"X" + content[9:], "damaged header"),
        (lambda content: content.replace(b'"F32"', b'"F8!"'), "number type F8!"),
        (lambda content: content.replace(b"[64,64]", b"[64,63]"), "damaged header"),
    ],
)
def test_damaged_files_are_refused(linear: Path, change: object, says: str) -> None:
    assert callable(change)
    linear.write_bytes(change(linear.read_bytes()))
    with pytest.raises(ExportError, match=says):
        stored_tensors([linear])


def test_two_shards_with_one_name_are_refused(linear: Path) -> None:
    with pytest.raises(ExportError, match=r"both hold weight\."):
        stored_tensors([linear, linear])


def test_the_scan_gives_the_digest_and_notices_a_change(linear: Path) -> None:
    assert sha256_of_finite(linear) == sha256_of(linear)
    save_file({"weight.weight": torch.full((3,), float("inf")), "b": torch.zeros(1)}, linear)
    with pytest.raises(ExportError, match=r"NaN or infinity in weight\.weight;"):
        sha256_of_finite(linear)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_stored_tensors_are_read_as_they_are(tmp_path: Path, dtype: torch.dtype) -> None:
    value = torch.randn(3, 5).to(dtype)
    save_file({"a": value, "empty": torch.empty(0, 4)}, tmp_path / "x.safetensors", metadata={"pad": "x" * 3})
    stored = stored_tensors([tmp_path / "x.safetensors"])
    assert torch.equal(stored["a"].read(), value) and torch.equal(stored["a"].mapped(), value)
    assert stored["empty"].read().shape == (0, 4)
    assert json.loads(json.dumps(stored["a"].shape)) == [3, 5]

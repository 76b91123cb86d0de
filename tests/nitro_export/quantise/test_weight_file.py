"""Initializers are read from files beside their graph, and from nowhere else."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch

from nitro_export.quantise.weight_file import WeightFile, read_tensor
from nitro_rt.errors import ExportError


@pytest.fixture
def written(tmp_path: Path) -> tuple[Path, onnx.TensorProto]:
    """A folder with one weight file, and the initializer that points into it."""
    folder = tmp_path / "graphs"
    folder.mkdir()
    with WeightFile(folder) as weights:
        model = onnx.ModelProto()
        model.graph.initializer.append(weights.initializer("w", torch.arange(1024.0)))
        weights.close([model])
    return folder, model.graph.initializer[0]


def test_what_was_written_is_read(written: tuple[Path, onnx.TensorProto]) -> None:
    folder, tensor = written
    assert torch.equal(read_tensor(tensor, folder), torch.arange(1024.0))


@pytest.mark.parametrize("folders", ["../", "inner/", "{folder}/"])
def test_a_place_elsewhere_is_refused(written: tuple[Path, onnx.TensorProto], folders: str) -> None:
    folder, tensor = written
    (path,) = folder.iterdir()
    (folder / "inner").mkdir()
    for elsewhere in (folder / "inner", folder.parent):
        (elsewhere / path.name).write_bytes(path.read_bytes())
    tensor.external_data[0].value = folders.format(folder=folder) + path.name
    with pytest.raises(ExportError, match="which is not beside its graph"):
        read_tensor(tensor, folder)


def test_a_cut_file_is_named(written: tuple[Path, onnx.TensorProto]) -> None:
    folder, tensor = written
    (path,) = folder.iterdir()
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ExportError, match="was cut: it ends within w"):
        read_tensor(tensor, folder)

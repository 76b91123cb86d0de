"""What is kept of a layer's input: rows that reproduce its output, exact extremes, one record per tensor."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from nitro_export.quantise.drawing import weights_of
from nitro_export.quantise.ranges import Recorder, multiplications


def _recorded(layers: dict[str, nn.Module], given: Tensor, *, calls: int = 1, rows_per_call: int = 8) -> Recorder:
    recorder = Recorder(seed=0, rows_per_call=rows_per_call)
    with recorder.watching(layers), torch.no_grad():
        for _ in range(calls):
            for layer in layers.values():
                layer(given)
    return recorder


def _farthest(rows: Tensor, among: Tensor) -> float:
    """How far a row is from its nearest one among others, at most."""
    return (rows[:, None] - among[None]).abs().amax(dim=2).amin(dim=1).max().item()


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 1, 1), (3, 2, 1), (1, 1, 0), (3, 2, 0)])
def test_rows_of_a_convolution_give_its_outputs(kernel: int, stride: int, padding: int) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 5, kernel, stride=stride, padding=padding, bias=False)
    given = torch.randn(2, 3, 9, 7)
    given[1, 2, 4, 3] = 50.0
    record = _recorded({"conv": layer}, given, rows_per_call=40).records["conv"]
    with torch.no_grad():
        output = layer(given)
        found = record.rows() @ weights_of(layer).T
    positions = output.permute(0, 2, 3, 1).reshape(-1, 5)
    assert len(found) == 41 and _farthest(found, positions) < 1e-4
    assert record.rows()[-1].abs().max() == 50  # what reaches furthest is always among them
    assert multiplications(layer, given) == output.numel() * 3 * kernel**2


def test_rows_of_a_linear_layer_and_exact_extremes() -> None:
    torch.manual_seed(0)
    layer, given = nn.Linear(4, 6, bias=False), torch.randn(2, 50, 4)
    record = _recorded({"linear": layer}, given, calls=3).records["linear"]
    assert record.rows().shape == (27, 4)
    assert _farthest(record.rows(), given.reshape(-1, 4)) == 0
    assert (record.low, record.high) == (given.min().item(), given.max().item())
    assert record.amax_C is not None and torch.equal(record.amax_C, given.abs().amax(dim=(0, 1)))
    assert record.multiplications == {"linear": 3 * 2 * 50 * 4 * 6}


def test_layers_that_are_given_one_tensor_share_its_record() -> None:
    layers: dict[str, nn.Module] = {name: nn.Linear(4, 4) for name in ("to_q", "to_k", "to_v")}
    recorder = _recorded(layers, torch.randn(1, 5, 4))
    assert recorder.leaders == {"to_q": "to_q", "to_k": "to_q", "to_v": "to_q"} and set(recorder.records) == {"to_q"}


def test_the_choice_of_rows_is_seeded() -> None:
    layer, given = nn.Linear(4, 4), torch.randn(1, 500, 4)
    first, again = (_recorded({"linear": layer}, given).records["linear"].rows() for _ in range(2))
    assert torch.equal(first, again)
    other = Recorder(seed=1, rows_per_call=8)
    with other.watching({"linear": layer}):
        layer(given)
    assert not torch.equal(first, other.records["linear"].rows())

"""States: what comes back is what was there, what does not fit is said, and no failure costs the state before."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nitro_rt.errors import TrainingError
from nitro_training import checkpoint
from nitro_training.checkpoint import RunState

Usage = namedtuple("Usage", "total used free")
OPTIONS: dict[str, Any] = {"student": {"lr": 2e-5, "stage_steps": (3, 1)}, "prompts_sha256": "abc"}


class Notes(nn.Module):
    """A holder of tensors that is a module, too, as the pool is."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1000))
        self.moments = {"0/exp_avg": torch.ones(3)}

    def tensors(self) -> dict[str, Tensor]:
        return self.moments

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        self.moments = dict(tensors)


def make_state(width: int = 4) -> RunState:
    """A trained layer with its optimiser's moments, and a holder."""
    layer, notes = nn.Linear(width, 2), Notes()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    layer(torch.randn(3, width)).sum().backward()
    optimizer.step()
    return RunState(modules={"unet": layer, "pool": notes}, optimizers={"unet": optimizer}, holders={"heads": notes})


def write(path: Path, state: RunState, step: int = 3) -> Path:
    checkpoint.save(path, state.tensors(), step=step, options=OPTIONS)
    return path


def test_a_state_comes_back_whole(tmp_path: Path) -> None:
    saved, other = make_state(), make_state()
    path = write(tmp_path / "student.safetensors", saved)
    other.holders["heads"].load_tensors({})
    assert checkpoint.load(path, other, options=OPTIONS) == 3 == checkpoint.steps_done(path)
    expected, found = saved.tensors(), other.tensors()
    assert expected.keys() == found.keys() and any("exp_avg_sq" in key for key in found)
    assert all(torch.equal(value, found[key]) for key, value in expected.items())


def test_what_is_kept_is_a_copy() -> None:
    state = make_state()
    before = state.tensors()
    with torch.no_grad():
        state.modules["unet"].weight.fill_(7.0)
    assert not (before["module/unet/weight"] == 7.0).any()


def test_every_changed_option_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "student.safetensors", make_state())
    changed = {"student": {"lr": 3e-5, "stage_steps": (3, 2)}, "prompts_sha256": "abc", "heads": {"lr": 1.0}}
    with pytest.raises(TrainingError) as caught:
        checkpoint.load(path, make_state(), options=changed)
    message = str(caught.value)
    assert "student.lr was 2e-05, now 3e-05" in message
    assert "student.stage_steps was [3, 1], now [3, 2]" in message
    assert 'heads was null, now {"lr": 1.0}' in message
    assert "prompts" not in message and "--allow-changed" in message


def test_changed_options_can_be_allowed(tmp_path: Path) -> None:
    path = write(tmp_path / "student.safetensors", make_state())
    assert checkpoint.load(path, make_state(), options={}, allow_changed=True) == 3


@pytest.mark.parametrize("size", [0, 4, 1000])
def test_a_truncated_state_is_said(tmp_path: Path, size: int) -> None:
    path = write(tmp_path / "student.safetensors", make_state())
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(TrainingError, match=r"student.safetensors is damaged: .*; remove it to start this stage again"):
        checkpoint.load(path, make_state(), options=OPTIONS)


def test_a_state_of_another_version_is_said(tmp_path: Path) -> None:
    path = tmp_path / "student.safetensors"
    save_file({"x": torch.zeros(1)}, str(path), metadata={"schema_version": "1", "step": "3"})
    with pytest.raises(TrainingError, match=r"has state version 1, this nitro-rt reads 2: start in another --out folder"):
        checkpoint.load(path, make_state(), options=OPTIONS)


def test_a_state_of_another_model_is_said(tmp_path: Path) -> None:
    path = write(tmp_path / "student.safetensors", make_state(width=5))
    with pytest.raises(TrainingError, match=r"does not fit the model of this recipe \(size mismatch.*another --out"):
        checkpoint.load(path, make_state(width=4), options=OPTIONS)


def full_disk(*args: object, **kwargs: object) -> None:
    raise OSError(28, "No space left on device")


def test_a_full_disk_keeps_the_state_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "student.safetensors", make_state())
    before = path.read_bytes()
    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    with pytest.raises(TrainingError, match=r"No space left on device; what was there before is kept"):
        write(path, make_state(), step=4)
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["student.safetensors"]


def test_room_is_asked_for_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, and two moments of each: of a layer of 10 and a pool of 1,000 numbers, twice, then once more beside the old."""
    state, path = make_state(), tmp_path / "student.safetensors"
    need = 3 * 4 * (10 + 1000)
    free = 2 * need
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(0, 0, free))
    checkpoint.require_space(path, state)
    free = 2 * need - 1
    with pytest.raises(TrainingError, match=r"GiB free, the states of 'student' need .* make room, or choose another --out"):
        checkpoint.require_space(path, state)
    path.touch()
    checkpoint.require_space(path, state)
    assert free > need


def test_what_a_killed_write_left_is_removed(tmp_path: Path) -> None:
    path = write(tmp_path / "student.safetensors", make_state())
    (tmp_path / "student.partial").write_bytes(b"half")
    checkpoint.remove_leftover(path)
    assert [file.name for file in tmp_path.iterdir()] == ["student.safetensors"]


def test_options_stand_in_the_file(tmp_path: Path) -> None:
    metadata = checkpoint.read_metadata(write(tmp_path / "student.safetensors", make_state()))
    assert json.loads(metadata["options"])["student"] == {"lr": 2e-5, "stage_steps": [3, 1]}
    assert checkpoint.read_metadata(tmp_path / "none.safetensors") == {} and checkpoint.steps_done(tmp_path / "none") == 0
    assert all(tensor.is_contiguous() for tensor in load_file(tmp_path / "student.safetensors").values())

"""The loop, with a stage of three weights: what is logged and kept, how it goes on, and what stops it."""

from __future__ import annotations

import json
import math
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import require_same_state
from torch import nn

from nitro_rt.errors import ConfigError, TrainingError
from nitro_training import checkpoint, loop
from nitro_training.checkpoint import RunState
from nitro_training.loop import LoopConfig, Losses

EVERY = LoopConfig(log_every=1, checkpoint_every_s=0.0)
Usage = namedtuple("Usage", "total used free")


class Toy:
    """A stage; every number of a step follows from the step and the weights."""

    name, seed = "toy", 5

    def __init__(self, num_steps: int = 6, **losses: Losses) -> None:
        """
        Args:
            losses: of `step<N>`, instead of the true ones.
        """
        self.num_steps, self.losses = num_steps, losses
        self.layer = nn.Linear(2, 1)
        nn.init.ones_(self.layer.weight)
        nn.init.zeros_(self.layer.bias)
        self.optimizer = torch.optim.AdamW(self.layer.parameters(), lr=0.1)

    def state(self) -> RunState:
        return RunState(modules={"layer": self.layer}, optimizers={"layer": self.optimizer})

    def step(self, step: int) -> Losses:
        x = torch.randn(4, 2, generator=loop.step_generator(self.seed, step))
        loss = (self.layer(x) - 1).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return self.losses.get(f"step{step + 1}", {"loss": loss.item()})


def run(folder: Path, stage: Toy | None = None, **options: Any) -> int:
    return loop.run(stage or Toy(), folder, **{"options": {"lr": 0.1}, "config": EVERY, **options})


def steps(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "toy.loss.jsonl").read_text().splitlines()]


def test_a_stage_that_is_stopped_anywhere_ends_where_it_would_have(tmp_path: Path) -> None:
    assert run(tmp_path / "whole") == 6
    for max_steps in (1, 4, 4, None):
        done = run(tmp_path / "parts", max_steps=max_steps)
        assert done == (max_steps or 6)
    assert (tmp_path / "whole/toy.loss.jsonl").read_text() == (tmp_path / "parts/toy.loss.jsonl").read_text()
    require_same_state(tmp_path / "whole/toy.safetensors", tmp_path / "parts/toy.safetensors")


def test_lines_after_the_last_checkpoint_are_logged_again(tmp_path: Path) -> None:
    """As a kill leaves it: the log is ahead of the state and its last line is torn."""
    run(tmp_path)
    whole = (tmp_path / "toy.loss.jsonl").read_text()
    (tmp_path / "toy.loss.jsonl").unlink()
    (tmp_path / "toy.safetensors").unlink()
    run(tmp_path, max_steps=3)
    with (tmp_path / "toy.loss.jsonl").open("a") as file:
        file.write('{"step": 4, "loss": 99.0}\n{"step": 5, "lo')
    run(tmp_path)
    assert (tmp_path / "toy.loss.jsonl").read_text() == whole


def test_a_line_is_the_mean_over_the_steps_that_gave_a_loss(tmp_path: Path) -> None:
    stage = Toy(4, step1={"loss": 1.0}, step2={"loss": 2.0, "d_loss/t10": 7.0}, step3={"loss": 3.0}, step4={"loss": 5.0})
    run(tmp_path, stage, config=LoopConfig(log_every=2))
    lines = [json.loads(line) for line in (tmp_path / "toy.loss.jsonl").read_text().splitlines()]
    assert lines == [{"step": 2, "loss": 1.5, "d_loss/t10": 7.0}, {"step": 4, "loss": 4.0}]


def test_checkpoints_come_by_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[int] = []
    now_s = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now_s)
    monkeypatch.setattr(checkpoint, "save", lambda path, tensors, *, step, **kept: saved.append(step))

    def report(done: int, losses: Losses) -> None:
        nonlocal now_s
        now_s += 10.0

    run(tmp_path, Toy(9), config=LoopConfig(log_every=2, checkpoint_every_s=30.0), report=report)
    assert saved == [4, 8, 9]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stops_the_stage_by_step_and_term(tmp_path: Path, value: float) -> None:
    losses = {"loss": 1.0, "d_loss/t10": value, "g_grad_norm": value}
    with pytest.raises(TrainingError, match=rf"toy: not finite at step 3: d_loss/t10 is {value}, g_grad_norm is {value};"):
        run(tmp_path, Toy(step3=losses))
    assert checkpoint.steps_done(tmp_path / "toy.safetensors") == 2 and steps(tmp_path) == [1, 2]
    assert run(tmp_path) == 6, "what made it so is gone: it goes on from the last good checkpoint"


def test_divergence_stops_the_stage_by_step_and_term(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"toy: g_grad_norm is -?2e\+04 at step 2, beyond loop.loss_limit = 10000"):
        run(tmp_path, Toy(step2={"loss": 1.0, "updates": 1e9, "g_grad_norm": 2e4}))
    assert checkpoint.steps_done(tmp_path / "toy.safetensors") == 1


def test_weights_that_are_not_finite_do_not_replace_good_ones(tmp_path: Path) -> None:
    class Poisoned(Toy):
        def step(self, step: int) -> Losses:
            losses = super().step(step)
            if step == 3:
                nn.init.constant_(self.layer.bias, math.nan)
            return losses

    with pytest.raises(TrainingError, match=r"toy: 1 tensors are not finite after step 4, first module/layer/bias; the last"):
        run(tmp_path, Poisoned())
    assert checkpoint.steps_done(tmp_path / "toy.safetensors") == 3
    assert all(tensor.isfinite().all() for tensor in load_file(tmp_path / "toy.safetensors").values())


def test_an_interrupted_step_is_not_kept(tmp_path: Path) -> None:
    class Interrupted(Toy):
        def step(self, step: int) -> Losses:
            losses = super().step(step)
            if step == 3:
                raise KeyboardInterrupt
            return losses

    run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", Interrupted(), config=LoopConfig(log_every=3, checkpoint_every_s=0.0))
    assert checkpoint.steps_done(tmp_path / "parts" / "toy.safetensors") == 3
    run(tmp_path / "parts")
    require_same_state(tmp_path / "whole/toy.safetensors", tmp_path / "parts/toy.safetensors")


def test_a_stage_on_other_ground_begins_again(tmp_path: Path) -> None:
    run(tmp_path, upstream="autoencoder 2", max_steps=3)
    seen: list[int] = []
    run(tmp_path, upstream="autoencoder 4", report=lambda done, losses: seen.append(done))
    assert seen == [1, 2, 3, 4, 5, 6] == steps(tmp_path)


def test_a_trial_does_not_throw_away_a_longer_run(tmp_path: Path) -> None:
    run(tmp_path, upstream="all samples")
    with pytest.raises(TrainingError, match=r"toy.safetensors holds 6 steps .* would end after 2.* leave out --max-steps"):
        run(tmp_path, upstream="2 samples", max_steps=2)
    assert checkpoint.steps_done(tmp_path / "toy.safetensors") == 6


def test_changed_options_are_refused_and_nothing_is_lost(tmp_path: Path) -> None:
    run(tmp_path, max_steps=3)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(TrainingError, match=r"toy.safetensors was trained with other options: lr was 0.1, now 0.2"):
        run(tmp_path, options={"lr": 0.2})
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert run(tmp_path, options={"lr": 0.2}, allow_changed=True) == 6


def test_no_room_is_said_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(0, 0, 10))
    seen: list[int] = []
    with pytest.raises(TrainingError, match=r"the states of 'toy' need"):
        run(tmp_path, report=lambda done, losses: seen.append(done))
    assert not seen


def test_what_a_killed_write_left_takes_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path, max_steps=2)
    leftover = tmp_path / "toy.partial"
    leftover.write_bytes(b"half a state")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(0, 0, 0 if leftover.exists() else 10**6))
    assert run(tmp_path) == 6


def test_a_full_disk_later_keeps_the_last_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = checkpoint.save_file, 0

    def filling(*args: Any, **kwargs: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > 2:
            Path(args[1]).write_bytes(b"as far as it went")
            raise OSError(28, "No space left on device")
        real(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "save_file", filling)
        with pytest.raises(TrainingError, match="No space left on device; what was there before is kept"):
            run(tmp_path)
    assert checkpoint.steps_done(tmp_path / "toy.safetensors") == 2 and not list(tmp_path.glob("*.partial"))
    assert run(tmp_path) == 6 and steps(tmp_path) == [1, 2, 3, 4, 5, 6]


def test_the_learning_rate_warms_up_and_falls() -> None:
    rates = [loop.learning_rate(step, peak=1.0, num_steps=100, warmup_steps=10, final=0.1) for step in range(101)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == rates[10] == 1.0 and rates[-1] == pytest.approx(0.1)
    assert rates[55] == pytest.approx(0.55)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"log_every": 0}, "loop.log_every must be at least 1"), ({"sample_every": 5}, "loop.sample_every needs loop")],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LoopConfig(**options)

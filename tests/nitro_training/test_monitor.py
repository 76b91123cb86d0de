"""What a run shows: TensorBoard, the pool's history, sample sheets; and that looking changes nothing."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_run import cpu_engine, read_scalars, require_same_state, train

from nitro_training.generator import draw_student
from nitro_training.monitor import Monitor, Scalars, pool_statistics
from nitro_training.pool import HeadPool, PoolConfig
from nitro_training.randomness import BatchRandom
from nitro_training.recipe import StudentRecipe, read_student_recipe
from nitro_training.sheet import Checkpoint, pixels

STEPS = list(range(1, 7))


def events(folder: Path) -> EventAccumulator:
    found = EventAccumulator(str(folder), size_guidance={"scalars": 0, "histograms": 0, "images": 0})
    found.Reload()
    return found


def make_pool() -> HeadPool:
    config = PoolConfig(tasks=("global-conditional",), noise_levels=(10,), heads_per_cell=4, width=32, num_blocks=1)
    return HeadPool(config, [3], {"global-conditional": [8]})


def make_monitor(recipe: StudentRecipe, folder: Path, **facts: Any) -> Monitor:
    """A monitor that has no stage to watch and no teacher to draw with."""
    engine = cpu_engine()
    for name, value in facts.items():
        setattr(engine, name, value)
    return Monitor(recipe, folder, None, make_pool(), engine)  # type: ignore[arg-type]


# ---- what a run leaves ----


def test_every_term_of_every_step_is_in_tensorboard(student_run: Path) -> None:
    lines = [json.loads(line) for line in (student_run / "student.loss.jsonl").read_text().splitlines()]
    found = read_scalars(student_run / "tensorboard" / "student")
    terms = {key for line in lines for key in line} - {"step"}
    assert {"d_loss/t10", "g_loss/t500", "win_rate/local-unconditional", "d_grad_norm", "stage"} < terms < found.keys()
    for key in terms:
        logged = {line["step"]: line[key] for line in lines if key in line}
        assert dict(found[key]) == pytest.approx(logged, abs=1e-6), key
    regression = read_scalars(student_run / "tensorboard" / "regression")
    assert [step for step, _ in regression["regression_loss"]] == [1, 2, 3]


def test_the_pools_history_is_in_tensorboard(student_run: Path) -> None:
    found = events(student_run / "tensorboard" / "student")
    for key in ("age_mean", "age_max", "updates_mean", "win_rate_mean", "never_trained_share"):
        assert [event.step for event in found.Scalars(f"pool/{key}")] == STEPS, key
    assert [event.value for event in found.Scalars("pool/age_max")] == STEPS, "some head is as old as the run"
    shares = [event.value for event in found.Scalars("pool/never_trained_share")]
    assert shares[0] > shares[-1] >= 0.0
    for key in ("age", "updates", "win_rate"):
        assert [event.step for event in found.Histograms(f"pool/{key}")] == STEPS, key
    last = found.Histograms("pool/age")[-1].histogram_value
    assert last.num == 36 and last.min == 0 and last.max == 6, "two of 36 heads are renewed after each step"


def test_sheets_show_what_the_published_student_draws(student_run: Path) -> None:
    assert sorted(path.name for path in (student_run / "samples").iterdir()) == ["000003.png", "000006.png"]
    with Image.open(student_run / "samples" / "000006.png") as image:
        page = np.asarray(image.convert("RGB")).astype(int)
    student = Checkpoint.load(student_run / "checkpoint")
    noise = BatchRandom("sample sheet", first=0, num=3).randn(4, 8, 8)
    with torch.no_grad():
        embeds, pooled = student.text.encode(student.text.tokenize(["apple", "a banana", "red apple"]))
        x0 = draw_student(student.unet, embeds, pooled, noise, num_steps=1, shift=500, generator=torch.Generator())
        drawn = pixels(student.vae, x0).numpy().astype(int)
    for index, image in enumerate(drawn):
        left = 10 + index * (3 * 64 + 10)
        one, two, four = (page[16:80, left + 64 * column : left + 64 * column + 64] for column in range(3))
        assert abs(one - image).max() <= 4, "the checkpoint's weights are half precision"
        assert abs(one - two).max() > 8 and abs(two - four).max() > 8
    shown = events(student_run / "tensorboard" / "student").Images("samples")
    assert [event.step for event in shown] == [3, 6]
    assert (shown[-1].height, shown[-1].width) == page.shape[:2]


def test_looking_changes_nothing(
    student_recipe: Path, student_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without scalars, statistics and sheets the run ends with the same losses, weights and moments."""
    monkeypatch.setattr(Monitor, "on_step", lambda *args: None)
    train(student_recipe, tmp_path)
    assert not (tmp_path / "samples").exists() and not (tmp_path / "tensorboard").exists()
    for name in ("regression", "student"):
        require_same_state(student_run / f"{name}.safetensors", tmp_path / f"{name}.safetensors")
        log = f"{name}.loss.jsonl"
        assert (student_run / log).read_text() == (tmp_path / log).read_text()


# ---- the parts ----


def test_a_resumed_log_has_no_gaps_and_no_points_of_lost_steps(tmp_path: Path) -> None:
    killed = Scalars(tmp_path)
    for done in (1, 2, 3, 4, 5):
        killed.add(done, {"d_loss": 100.0 + done})
        killed.flush()
    file = next(tmp_path.iterdir())  # named after the second it was begun in; no process resumes within that
    file.rename(tmp_path / "events.out.tfevents.1000000000.host.1.0")
    resumed = Scalars(tmp_path)
    for done in (4, 5, 6):  # the checkpoint was at 3
        resumed.add(done, {"d_loss": 200.0 + done})
    resumed.close()
    assert read_scalars(tmp_path) == {"d_loss": [(1, 101), (2, 102), (3, 103), (4, 204), (5, 205), (6, 206)]}
    killed.close()


def test_what_is_before_a_checkpoint_is_on_the_disk(student_recipe: Path, tmp_path: Path) -> None:
    """A process that is killed after a step leaves that step's numbers."""
    monitor = make_monitor(read_student_recipe(student_recipe), tmp_path)
    monitor.on_step("student", 1, {"d_loss": 1.5, "d_loss/t10": 2.5})
    found = read_scalars(tmp_path / "tensorboard" / "student")
    assert found["d_loss"] == [(1, 1.5)] and found["d_loss/t10"] == [(1, 2.5)] and found["pool/age_mean"] == [(1, 1.0)]
    monitor.__exit__(None, None, None)


def test_statistics_are_of_age_updates_and_the_wins_of_those_that_learnt() -> None:
    pool = make_pool()
    pool.births[1], pool.updates[1], pool.win_rate[1] = 7, 2, 0.75
    pool.updates[2], pool.win_rate[2] = 1, 0.25
    found = pool_statistics(pool, 10)
    assert found["age"].tolist() == [10, 3, 10, 10] and found["updates"].tolist() == [0, 2, 1, 0]
    assert found["win_rate"].tolist() == [0.75, 0.25]


def test_a_pool_that_has_not_learnt_has_no_win_rate(student_recipe: Path, tmp_path: Path) -> None:
    with make_monitor(read_student_recipe(student_recipe), tmp_path) as monitor:
        monitor.on_step("student", 1, {"d_loss": 1.5})
    found = read_scalars(tmp_path / "tensorboard" / "student")
    assert found["pool/never_trained_share"] == [(1, 1.0)] and "pool/win_rate_mean" not in found


def test_only_the_main_process_writes(student_recipe: Path, tmp_path: Path) -> None:
    with make_monitor(read_student_recipe(student_recipe), tmp_path, is_main=False, rank=1) as monitor:
        monitor.on_step("student", 3, {"d_loss": 1.5})
    assert not list(tmp_path.iterdir())


def test_a_student_in_shards_is_not_drawn_and_that_is_said(student_recipe: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="loop.sample_every: no sample sheets under FSDP"):
        monitor = make_monitor(read_student_recipe(student_recipe), tmp_path, strategy="fsdp")
    with monitor:
        monitor.on_step("student", 3, {"d_loss": 1.5})
    assert not (tmp_path / "samples").exists()
    assert read_scalars(tmp_path / "tensorboard" / "student")["d_loss"] == [(3, 1.5)]


def test_a_missing_tensorboard_is_noticed_before_training(
    student_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ModuleNotFoundError) as caught:
        make_monitor(read_student_recipe(student_recipe), tmp_path)
    assert caught.value.name == "tensorboard"

"""kill -9: a run that is killed at any moment and resumed ends, bit for bit, as the one that was left alone."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pytest
from tiny_run import changed, read_scalars, require_same_state, train

from nitro_training import checkpoint

CHILD = Path(__file__).with_name("kill_child.py")
TIMEOUT_S = 500.0


class Life:
    """One process that trains, from a start or a resume to its death or its end."""

    def __init__(self, pipe: subprocess.Popen[str], ticks: Path, request: dict[str, Any]) -> None:
        self.pipe, self.ticks = pipe, ticks
        ticks.write_bytes(b"")
        assert pipe.stdin and pipe.stdout
        self._answers: IO[str] = pipe.stdout
        pipe.stdin.write(json.dumps({"ticks": str(ticks), **request}) + "\n")
        pipe.stdin.flush()
        self.pid = int(self._answers.readline())

    def wait_for(self, ticks: int) -> bool:
        """Until that much progress was reported; False if the process ended before."""
        end_s = time.monotonic() + TIMEOUT_S
        while self.ticks.stat().st_size < ticks:
            assert time.monotonic() < end_s, f"no {ticks} reports of progress in {TIMEOUT_S} s"
            if not Path(f"/proc/{self.pid}").exists():
                return False
            time.sleep(0.01)
        return True

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        assert self.ended() == -signal.SIGKILL

    def ended(self) -> int:
        """The exit code."""
        return int(self._answers.readline())


class Graveyard:
    """Starts lives, and looks after the process that forks them."""

    def __init__(self, folder: Path) -> None:
        paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "CUDA_VISIBLE_DEVICES": ""}
        self.errors = (folder / "errors.txt").open("w+")
        self.ticks = folder / "ticks"
        self.pipe = subprocess.Popen(
            [sys.executable, str(CHILD)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True,
            env=environment,
        )  # fmt: skip

    def begin(self, recipe: Path, out: Path, **stop: Any) -> Life:
        """
        Args:
            stop: `write=n` or `rename=(name, n)`, where to stop and wait.
        """
        self.life = Life(self.pipe, self.ticks, {"recipe": str(recipe), "out": str(out), **stop})
        return self.life

    def kill_in(self, recipe: Path, out: Path, ticks: int, **stop: Any) -> None:
        """Train until it stops there, after `ticks` reports of progress, and kill."""
        life = self.begin(recipe, out, **stop)
        assert life.wait_for(ticks + 1), self.what_was_said()
        life.kill()

    def finish(self, recipe: Path, out: Path) -> None:
        assert self.begin(recipe, out).ended() == 0, self.what_was_said()

    def what_was_said(self) -> str:
        return Path(self.errors.name).read_text()[-3000:]

    def close(self) -> None:
        if self.pipe.stdin:
            self.pipe.stdin.close()
        self.pipe.kill()
        self.pipe.wait()
        if self.pipe.stdout:
            self.pipe.stdout.close()
        self.errors.close()


@pytest.fixture(scope="module")
def graveyard(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Graveyard]:
    if not hasattr(os, "fork"):
        pytest.skip("processes are forked, which this system cannot do")
    found = Graveyard(tmp_path_factory.mktemp("graveyard"))
    yield found
    found.close()


def require_same_run(expected: Path, found: Path) -> None:
    """The same losses, states, checkpoint and TensorBoard log, and nothing left over."""
    for name in ("regression", "student"):
        assert (expected / f"{name}.loss.jsonl").read_text() == (found / f"{name}.loss.jsonl").read_text()
        require_same_state(expected / f"{name}.safetensors", found / f"{name}.safetensors")
        log = Path("tensorboard", name)
        assert read_scalars(expected / log) == read_scalars(found / log)
    for path in (expected / "checkpoint").rglob("*.safetensors"):
        assert path.read_bytes() == (found / path.relative_to(expected)).read_bytes(), path
    for path in (expected / "samples").iterdir():
        assert path.read_bytes() == (found / "samples" / path.name).read_bytes()
    leftovers = [path.name for path in found.rglob("*") if path.suffix in (".partial", ".old")]
    assert not leftovers


def copy_before(run: Path, stage: str, out: Path) -> Path:
    """A finished run without what `stage` has made."""
    shutil.copytree(run, out)
    shutil.rmtree(out / "tensorboard" / stage)
    (out / f"{stage}.safetensors").unlink()
    (out / f"{stage}.loss.jsonl").unlink()
    return out


def kill_at_random_moments(graveyard: Graveyard, recipe: Path, sparing: Path, out: Path, num_kills: int, reports: int) -> None:
    """Each life ends some reports of progress and a part of a step after its beginning.

    Args:
        sparing: the same recipe with its checkpoints far apart, for every third life: there a kill costs several steps.
        reports: of a whole run; the lives together make fewer.
    """
    moments = random.Random(7)
    for number in range(num_kills):
        life = graveyard.begin(sparing if number % 3 == 1 else recipe, out)
        assert life.wait_for(moments.randint(0, reports // num_kills)), "it was to be killed before its end"
        time.sleep(moments.uniform(0, 0.1))
        life.kill()


@pytest.fixture
def sparing_recipe(student_recipe: Path, tmp_path: Path) -> Path:
    path = tmp_path / "sparing.toml"
    path.write_text(changed(student_recipe.read_text(), loop_checkpoint_every_s="1e6"), encoding="utf-8")
    return path


@pytest.mark.slow  # the moments that hurt most are the next two tests'
def test_a_run_killed_at_three_moments(
    graveyard: Graveyard, student_recipe: Path, sparing_recipe: Path, student_run: Path, tmp_path: Path
) -> None:
    kill_at_random_moments(graveyard, student_recipe, sparing_recipe, tmp_path / "run", 3, reports=9)
    graveyard.finish(student_recipe, tmp_path / "run")
    require_same_run(student_run, tmp_path / "run")


def test_a_run_killed_in_the_write_of_a_checkpoint(
    graveyard: Graveyard, student_recipe: Path, student_run: Path, tmp_path: Path
) -> None:
    """With half of the third one on the disk; then with the next one complete, but not yet in place."""
    out = copy_before(student_run, "student", tmp_path / "run")
    state, partial = out / "student.safetensors", out / "student.partial"
    cached = 1
    graveyard.kill_in(student_recipe, out, cached + 3, write=3)
    assert checkpoint.steps_done(state) == 2 and 0 < partial.stat().st_size < state.stat().st_size
    graveyard.kill_in(student_recipe, out, cached + 2, rename=("student.safetensors", 2))
    assert checkpoint.steps_done(state) == 3 and checkpoint.steps_done(partial) == 4
    graveyard.finish(student_recipe, out)
    require_same_run(student_run, out)


def test_a_run_killed_while_its_checkpoint_is_replaced(
    graveyard: Graveyard, student_recipe: Path, student_run: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(student_run, tmp_path / "run"))
    graveyard.kill_in(student_recipe, out, 1, rename=("checkpoint", 1))
    assert not (out / "checkpoint").exists() and (out / ".checkpoint.old" / "model_index.json").is_file()
    graveyard.finish(student_recipe, out)
    require_same_run(student_run, out)


@pytest.mark.slow
def test_a_run_killed_at_ten_moments(graveyard: Graveyard, student_recipe: Path, tmp_path: Path) -> None:
    """Over all stages: the teacher's samples, the one-step weights, and the student from one to four steps."""
    recipe, sparing = tmp_path / "long.toml", tmp_path / "sparing.toml"
    recipe.write_text(changed(student_recipe.read_text(), student_stage_steps="[12, 8, 8, 8]"), encoding="utf-8")
    sparing.write_text(changed(recipe.read_text(), loop_checkpoint_every_s="1e6"), encoding="utf-8")
    train(recipe, tmp_path / "whole")
    kill_at_random_moments(graveyard, recipe, sparing, tmp_path / "run", 10, reports=40)
    graveyard.finish(recipe, tmp_path / "run")
    require_same_run(tmp_path / "whole", tmp_path / "run")

"""Two processes train what one trains with the doubled batch: copied (DDP) and sharded (FSDP), on the CPU by gloo."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from checkpoints import make_tiny_sdxl
from nitro_rt.errors import ConfigError, TrainingError
from nitro_training.engine import Engine, _peers
from nitro_training.sharding import skeleton

CHILD = Path(__file__).with_name("parallel_child.py")
RECIPE = """version = 2
[run]
name = "tiny"
trains = "student"
licence = "CC0-1.0"
[prompts]
files = ["{folder}/prompts.txt"]
[teacher]
checkpoint = "{folder}/teacher"
sampler = "lcm"
num_steps = 1
guidance = 1.0
cache_samples = 4
shard_size = 2
batch = 2
[regression]
num_steps = 1
batch = 2
[pool]
crop_latents = 8
heads_per_cell = 2
[student]
shifted_timestep = 500
stage_steps = [1]
batch = 2
accumulation = 2
ema_decay = 0.9
"""
LAUNCHER_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
TIMEOUT_S = 600


def _child() -> ModuleType:
    spec = importlib.util.spec_from_file_location("parallel_child", CHILD)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def plain_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name in LAUNCHER_NAMES or name.startswith(("ACCELERATE_", "FSDP_")):
            monkeypatch.delenv(name)


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = Engine()
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """One process with the doubled batch: its folder and what it reports."""
    out = tmp_path_factory.mktemp("alone")
    engine = Engine()
    result: dict[str, Any] = _child().run(engine, 4, out, "alone")
    engine.close()
    return out, result


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def _launch(out: Path, strategy: str) -> dict[str, Any]:
    """What two processes report, started as torchrun and accelerate start them."""
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    logs = [out / f"{rank}.log" for rank in range(2)]
    processes = []
    for rank, log in enumerate(logs):
        environment = {**os.environ, **shared, "OMP_NUM_THREADS": "1", "RANK": str(rank), "LOCAL_RANK": str(rank)}
        with log.open("wb") as stream:
            command = [sys.executable, str(CHILD), str(out), strategy]
            processes.append(subprocess.Popen(command, env=environment, stdout=stream, stderr=subprocess.STDOUT))
    try:
        codes = [process.wait(TIMEOUT_S) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0, 0], "\n".join(log.read_text()[-3000:] for log in logs)
    found: dict[str, Any] = json.loads((out / f"{strategy}.json").read_text())
    return found


@pytest.fixture(scope="module", params=["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def together(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, dict[str, Any]]:
    """Two processes: their folder, strategy and report."""
    out = tmp_path_factory.mktemp(request.param)
    return out, request.param, _launch(out, request.param)


def test_two_processes_have_the_losses_of_one_with_the_doubled_batch(
    alone: tuple[Path, dict[str, Any]], together: tuple[Path, str, dict[str, Any]]
) -> None:
    one, two = alone[1]["losses"], together[2]["losses"]
    assert len(one) == len(two) == 4
    for expected, found in zip(one, two, strict=True):
        assert found == pytest.approx(expected, abs=1e-5, rel=0)
    assert one[0]["d_loss"] != one[1]["d_loss"] and one[0]["renewed_heads"] > 0


def test_two_processes_end_with_the_weights_of_one(
    alone: tuple[Path, dict[str, Any]], together: tuple[Path, str, dict[str, Any]]
) -> None:
    """To rounding, and to what Adam makes of it: it divides a gradient by its own size, so where that is nothing but rounding
    (a bias under a normalisation) the step is as long as any. Such weights are few and change no loss."""
    out, strategy, _ = together
    one, two = load_file(alone[0] / "alone-end.safetensors"), load_file(out / f"{strategy}-end.safetensors")
    assert {key: value.shape for key, value in one.items()} == {key: value.shape for key, value in two.items()}
    for part in ("module/unet/", "module/unet_ema/", "module/pool/", "optimizer/unet/", "tensors/heads/"):
        differences = [(one[key].double() - two[key].double()).abs().flatten() for key in one if key.startswith(part)]
        assert torch.cat(differences).mean() < 1e-6, part


def test_a_run_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(
    alone: tuple[Path, dict[str, Any]], together: tuple[Path, str, dict[str, Any]]
) -> None:
    for result in (alone[1], together[2]):
        assert result["resumed"] == result["losses"][2:]


def test_what_several_processes_saved_one_goes_on_with(
    alone: tuple[Path, dict[str, Any]], together: tuple[Path, str, dict[str, Any]], engine: Engine
) -> None:
    out, strategy, _ = together
    resumed = _child().resume(engine, 4, out / f"{strategy}.safetensors")
    for expected, found in zip(alone[1]["losses"][2:], resumed, strict=True):
        assert found == pytest.approx(expected, abs=1e-5, rel=0)


def test_the_published_weights_are_whole(
    alone: tuple[Path, dict[str, Any]], together: tuple[Path, str, dict[str, Any]]
) -> None:
    assert together[2]["published"] == pytest.approx(alone[1]["published"], rel=1e-4, abs=1e-4)


def test_the_facts_say_who_drew_what(together: tuple[Path, str, dict[str, Any]]) -> None:
    facts = together[2]["facts"]
    assert (facts["strategy"], facts["num_processes"], facts["backend"]) == (together[1], 2, "gloo")
    assert [rank["first_sample"] for rank in facts["ranks"]] == [{"student": 0}, {"student": 2}]


@pytest.mark.slow
@pytest.mark.parametrize("options", [["--multi_gpu"], ["--use_fsdp", "--fsdp_version", "2"]], ids=["ddp", "fsdp"])
def test_accelerate_launches_the_command(options: list[str], tmp_path: Path) -> None:
    """A whole run, from the teacher's cache to the checkpoint; only the main process speaks."""
    make_tiny_sdxl(tmp_path / "teacher")
    (tmp_path / "prompts.txt").write_text("red apple\nblue cat\n")
    (tmp_path / "recipe.toml").write_text(RECIPE.format(folder=tmp_path))
    launch = [sys.executable, "-m", "accelerate.commands.launch", *options, "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", str(_free_port())]
    train = ["-m", "nitro_rt", "train", str(tmp_path / "recipe.toml"), "--out", str(tmp_path / "run")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, *train], env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines().count(str(tmp_path / "run" / "checkpoint")) == 1
    run = json.loads((tmp_path / "run" / "checkpoint" / "run.json").read_text())
    assert run["processes"]["strategy"] == ("ddp" if options == ["--multi_gpu"] else "fsdp")
    weights = load_file(tmp_path / "run" / "checkpoint" / "unet" / "diffusion_pytorch_model.safetensors")
    whole = load_file(tmp_path / "teacher" / "unet" / "diffusion_pytorch_model.safetensors")
    assert {key: value.shape for key, value in weights.items()} == {key: value.shape for key, value in whole.items()}


def test_one_process_changes_nothing(engine: Engine) -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    assert engine.prepare(model, optimizer) == (model, optimizer)
    assert engine.prepare_average(model) is model and engine.whole(model) is model
    assert engine.mean({"loss": 0.1}) == {"loss": 0.1}
    assert engine.decide(True) and not engine.decide(False)
    assert (engine.strategy, engine.num_processes, engine.rank, engine.is_main) == ("single", 1, 0, True)
    engine.require_same("anything", object())
    engine.barrier()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("ACCELERATE_MIXED_PRECISION", "bf16", "student.precision"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "student.accumulation"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "not compiled"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "--fsdp_version 2"),
        ("FSDP_VERSION", "1", "--fsdp_version 2"),
    ],
)
def test_an_option_of_the_launch_that_would_be_ignored_is_refused(
    name: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name.startswith("FSDP"):
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        Engine()


def test_lost_peers_are_an_error_of_one_line_and_bugs_are_not() -> None:
    with pytest.raises(TrainingError, match="lost the others here .*--resume"), _peers("here"):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1234\nat somewhere")
    with pytest.raises(RuntimeError, match="mat1 and mat2"), _peers("here"):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")


def test_a_skeleton_has_the_parts_and_no_memory() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    bare = skeleton(module)
    assert bare.state_dict().keys() == module.state_dict().keys()
    assert all(tensor.is_meta for tensor in bare.state_dict().values())
    assert not any(tensor.is_meta for tensor in module.state_dict().values())
    bare.load_state_dict(module.state_dict(), assign=True)
    torch.testing.assert_close(bare.eval()(torch.ones(1, 3, 5, 5)), module.eval()(torch.ones(1, 3, 5, 5)))

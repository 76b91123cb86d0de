"""Whole tiny runs: a teacher from icons, a student from that teacher; what they leave, how they go on, what stops them."""

from __future__ import annotations

import json
import math
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file
from tiny_run import changed, require_same_state, train
from torch import nn

from nitro_engines import BuildRequest, build, plan
from nitro_rt import Pipeline
from nitro_rt.errors import ConfigError, ModelNotFound, TrainingError
from nitro_training import checkpoint, describe, run
from nitro_training.student import StudentStage

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def copied(student_run: Path, tmp_path: Path) -> Path:
    """A finished student's run, to be changed."""
    return Path(shutil.copytree(student_run, tmp_path / "run"))


def variant(recipe: Path, folder: Path, **values: object) -> Path:
    path = folder / "variant.toml"
    path.write_text(changed(recipe.read_text(), **values), encoding="utf-8")
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- what a run leaves ----


@pytest.mark.parametrize("kind", ["teacher_run", "student_run"])
def test_diffusers_loads_the_checkpoint_unmodified(kind: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(kind) / "checkpoint"
    pipe = StableDiffusionXLPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    images = pipe("an apple", num_inference_steps=1, guidance_scale=0.0, output_type="np").images
    assert images.shape == (1, 64, 64, 3) and pipe.vae.config.scaling_factor == 1.0


@pytest.mark.parametrize("kind", ["teacher_run", "student_run"])
def test_the_checkpoint_is_half_precision_safetensors_only(kind: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(kind) / "checkpoint"
    weights = list(folder.rglob("*.safetensors"))
    assert len(weights) == 4
    assert all(t.dtype == torch.float16 for path in weights for t in load_file(path).values() if t.is_floating_point())
    assert not [path for path in folder.rglob("*") if path.suffix in (".bin", ".pt", ".pkl", ".ckpt")]


def test_the_student_is_another_than_its_teacher_in_the_unet_alone(teacher_run: Path, student_run: Path) -> None:
    weights = "diffusion_pytorch_model.safetensors"
    for part, is_same in ((f"unet/{weights}", False), (f"vae/{weights}", True), ("text_encoder/model.safetensors", True)):
        teacher, student = (load_file(run / "checkpoint" / part) for run in (teacher_run, student_run))
        assert all(torch.equal(value, student[key]) for key, value in teacher.items()) == is_same, part


def test_run_json_says_what_was_run(student_run: Path, teacher_run: Path) -> None:
    facts = json.loads((student_run / "checkpoint" / "run.json").read_text())
    assert facts == json.loads((student_run / "run.json").read_text())
    assert (facts["name"], facts["licence"], facts["shifted_timestep"]) == ("tiny", "Apache-2.0", 500)
    assert facts["steps_done"] == {"regression": 3, "student": 6}
    recipe = facts["recipe"]
    assert recipe["student"]["stage_steps"] == [2, 1, 1, 2] and recipe["pool"]["drawn_per_cell"] == 1, "defaults too"
    assert [recipe[section]["seed"] for section in ("regression", "pool", "student", "teacher")] == [53, 41, 51, 61]
    assert facts["versions"]["torch"] == torch.__version__ and {"diffusers", "accelerate"} < facts["versions"].keys()
    assert set(facts["teacher_sha256"]) == {"unet", "text_encoders", "vae"} and len(facts["prompts_sha256"]) == 64
    assert facts["processes"]["num_processes"] == 1 and facts["processes"]["ranks"][0]["rank"] == 0
    teacher = json.loads((teacher_run / "run.json").read_text())
    assert teacher["steps_done"] == {"autoencoder": 2, "teacher": 3, "decoder": 2} and teacher["shifted_timestep"] == 1000
    assert set(teacher["data_sha256"]) == {"images.safetensors", "records.jsonl", "prompts.txt"}


def test_build_takes_the_checkpoint(student_run: Path, tmp_path: Path) -> None:
    found = plan(BuildRequest(model=str(student_run / "checkpoint"), steps=(1, 4), out=tmp_path / "bundle"))
    assert "steps 1, 4; 64 px" in "\n".join(found.lines()) and "shift 500" in "\n".join(found.lines())


@pytest.mark.slow
def test_build_makes_a_bundle_of_the_checkpoint(student_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NITRO_RT_CACHE", str(tmp_path / "cache"))
    request = BuildRequest(model=str(student_run / "checkpoint"), steps=(1,), backend="onnxruntime", out=tmp_path / "bundle")
    manifest = build(request).manifest
    assert (manifest.source.licence, manifest.schedule.shift) == ("Apache-2.0", 500)
    with Pipeline.load(tmp_path / "bundle") as pipe:
        assert pipe("an apple", seed=7).images[0].size == (64, 64)


# ---- how it goes on ----


def test_a_run_is_not_overwritten_without_resume(student_recipe: Path, student_run: Path) -> None:
    before = contents(student_run)
    with pytest.raises(TrainingError, match=r"already holds a run; add --resume to go on with it, or choose another --out"):
        train(student_recipe, student_run)
    assert contents(student_run) == before


def test_allow_changed_needs_resume(student_recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--allow-changed goes on with a run .* it needs --resume"):
        train(student_recipe, tmp_path / "run", allow_changed=True)


def test_a_teacher_stopped_in_every_stage_ends_where_it_would_have(
    teacher_recipe: Path, teacher_run: Path, tmp_path: Path
) -> None:
    for max_steps in (1, 2, None):
        train(teacher_recipe, tmp_path, max_steps=max_steps, resume=True)
    for name in ("autoencoder", "teacher", "decoder"):
        require_same_state(teacher_run / f"{name}.safetensors", tmp_path / f"{name}.safetensors")
    for part in ("unet/diffusion_pytorch_model", "text_encoder_2/model", "vae/diffusion_pytorch_model"):
        expected, found = (load_file(run / "checkpoint" / f"{part}.safetensors") for run in (teacher_run, tmp_path))
        assert all(torch.equal(found[key], value) for key, value in expected.items()), part


def test_a_trial_is_not_taken_for_the_beginning_of_the_run(student_recipe: Path, student_run: Path, tmp_path: Path) -> None:
    """Two steps of everything see fewer of the teacher's samples; the run then begins both stages again."""
    train(student_recipe, tmp_path, max_steps=2)
    assert json.loads((tmp_path / "run.json").read_text())["steps_done"] == {"regression": 2, "student": 2}

    def interrupt(stage: str, done: int, *progress: object) -> None:
        if stage == "student":
            assert done == 1
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(student_recipe, tmp_path, resume=True, report=interrupt)
    require_same_state(student_run / "regression.safetensors", tmp_path / "regression.safetensors")
    assert (student_run / "regression.loss.jsonl").read_text() == (tmp_path / "regression.loss.jsonl").read_text()


def test_a_trial_does_not_throw_away_a_run(student_recipe: Path, copied: Path) -> None:
    before = contents(copied)
    with pytest.raises(TrainingError, match=r"regression.safetensors holds 3 steps .* leave out --max-steps"):
        train(student_recipe, copied, max_steps=1, resume=True)
    assert {name: contents(copied)[name] for name in before} == before


def test_a_changed_recipe_is_refused_by_option_and_nothing_is_lost(student_recipe: Path, copied: Path, tmp_path: Path) -> None:
    before = contents(copied)
    recipe = variant(student_recipe, tmp_path, student_lr="2e-4", pool_refresh_rate="0.1")
    with pytest.raises(TrainingError) as caught:
        train(recipe, copied, resume=True)
    message = str(caught.value)
    assert "student.safetensors was trained with other options" in message and "--allow-changed" in message
    assert "student.lr was 0.0001, now 0.0002" in message and "pool.refresh_rate was 0.05, now 0.1" in message
    assert contents(copied) == before


def test_a_changed_recipe_goes_on_where_it_is_allowed(student_recipe: Path, copied: Path, tmp_path: Path) -> None:
    recipe = variant(student_recipe, tmp_path, student_stage_steps="[2, 1, 1, 3]")
    seen: list[tuple[str, int]] = []
    train(recipe, copied, resume=True, allow_changed=True, report=lambda name, done, *rest: seen.append((name, done)))
    assert [entry for entry in seen if entry[0] != "samples"] == [("student", 7)]
    facts = json.loads((copied / "run.json").read_text())
    assert facts["steps_done"]["student"] == 7 and facts["recipe"]["student"]["stage_steps"] == [2, 1, 1, 3]


def test_how_a_run_is_logged_may_change(student_recipe: Path, copied: Path, tmp_path: Path) -> None:
    recipe = variant(student_recipe, tmp_path, loop_log_every="7", loop_checkpoint_every_s="1e6")
    assert train(recipe, copied, resume=True) == copied / "checkpoint"


# ---- what stops it ----


def test_a_damaged_state_is_said(student_recipe: Path, copied: Path) -> None:
    state = copied / "student.safetensors"
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(TrainingError, match=r"student.safetensors is damaged: .*; remove it"):
        train(student_recipe, copied, resume=True)


def test_a_state_of_another_version_is_said(student_recipe: Path, copied: Path) -> None:
    state = copied / "student.safetensors"
    save_file(load_file(state), state, metadata={**checkpoint.read_metadata(state), "schema_version": "1"})
    with pytest.raises(TrainingError, match=r"student.safetensors has state version 1, this nitro-rt reads 2"):
        train(student_recipe, copied, resume=True)


def test_a_folder_that_cannot_be_written_is_said(student_recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(TrainingError, match="cannot write to"):
        train(student_recipe, tmp_path / "file" / "run")


def test_two_processes_do_not_train_in_one_folder(student_recipe: Path, copied: Path) -> None:
    from filelock import FileLock

    with FileLock(copied / ".lock"), pytest.raises(TrainingError, match="another process is training in"):
        train(student_recipe, copied, resume=True)


def test_no_room_is_said_before_training(student_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(0, 0, 100_000))
    stages: list[str] = []
    with pytest.raises(TrainingError, match=r"the states of 'regression' need .* make room, or choose another --out"):
        train(student_recipe, tmp_path / "run", report=lambda name, *rest: stages.append(name))
    assert set(stages) == {"samples"}


def test_a_missing_teacher_is_said_and_leaves_nothing(student_recipe: Path, tmp_path: Path) -> None:
    recipe = variant(student_recipe, tmp_path, teacher_checkpoint=f'"{tmp_path}/none"')
    with pytest.raises(ModelNotFound, match=r"teacher.checkpoint: no checkpoint at .*none"):
        train(recipe, tmp_path / "run")
    assert not (tmp_path / "run" / "run.json").exists(), "it can be started again without --resume"


def test_missing_prompts_are_said(student_recipe: Path, tmp_path: Path) -> None:
    recipe = variant(student_recipe, tmp_path, prompts_files='["none.txt"]')
    with pytest.raises(ModelNotFound, match=r"prompts.files: cannot read none.txt"):
        train(recipe, tmp_path / "run")


def test_one_step_weights_of_another_architecture_are_said(student_recipe: Path, teacher_run: Path, tmp_path: Path) -> None:
    unet = Path(shutil.copytree(teacher_run / "checkpoint" / "unet", tmp_path / "unet"))
    config = json.loads((unet / "config.json").read_text())
    (unet / "config.json").write_text(json.dumps({**config, "attention_head_dim": [1, 4, 4]}))
    recipe = variant(student_recipe, tmp_path, student_init=f'"{unet}"')
    with pytest.raises(ConfigError, match=r"student.init: the UNet at .* has attention_head_dim \[1, 4, 4\]"):
        train(recipe, tmp_path / "run")


def test_crops_larger_than_the_latents_are_said(student_recipe: Path, tmp_path: Path) -> None:
    recipe = variant(student_recipe, tmp_path, pool_crop_latents="16")
    with pytest.raises(ConfigError, match=r"pool.crop_latents = 16 is larger than the latents \(8x8\); use at most 8"):
        train(recipe, tmp_path / "run")
    assert not (tmp_path / "run" / "run.json").exists()


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_samples_of_another_teacher_are_said(
    part: str, student_recipe: Path, teacher_run: Path, copied: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(teacher_run / "checkpoint", tmp_path / "other"))
    path = other / part / "diffusion_pytorch_model.safetensors"
    save_file({key: value + 0.001 for key, value in load_file(path).items()}, path)
    recipe = variant(student_recipe, tmp_path, teacher_checkpoint=f'"{other}"')
    before = contents(copied)
    with pytest.raises(TrainingError, match=rf"was made with other options: {part} \(SHA-256\) was \w+\.\.\., now"):
        train(recipe, copied, resume=True)
    assert contents(copied) == before


def test_a_weight_that_becomes_nan_stops_the_run_and_the_last_state_goes_on(
    student_recipe: Path, student_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step_of = StudentStage.step

    def poisoned(stage: StudentStage, step: int) -> dict[str, float]:
        if step == 2:
            nn.init.constant_(stage.unet.conv_in.bias, math.nan)
        return step_of(stage, step)

    with monkeypatch.context() as patched:
        patched.setattr(StudentStage, "step", poisoned)
        with pytest.raises(TrainingError, match=r"student: not finite at step 3: d_loss is nan, g_loss is nan, .* last good"):
            train(student_recipe, tmp_path)
    assert checkpoint.steps_done(tmp_path / "student.safetensors") == 2
    train(student_recipe, tmp_path, resume=True)
    require_same_state(student_run / "student.safetensors", tmp_path / "student.safetensors")
    assert (student_run / "student.loss.jsonl").read_text() == (tmp_path / "student.loss.jsonl").read_text()


def test_divergence_stops_the_run_by_step_and_term(student_recipe: Path, tmp_path: Path) -> None:
    recipe = variant(student_recipe, tmp_path, loop_loss_limit="1e-3")
    with pytest.raises(TrainingError, match=r"regression: \w+ is [\d.]+ at step 1, beyond loop.loss_limit = 0.001"):
        train(recipe, tmp_path / "run")


def test_data_made_with_other_options_are_refused(teacher_recipe: Path, tmp_path: Path) -> None:
    recipe = variant(teacher_recipe, tmp_path, emoji_size_px="128")
    with pytest.raises(ConfigError, match=r"made with other \[emoji\] options"):
        train(recipe, tmp_path / "run")


@pytest.mark.parametrize("max_steps", [0, -1])
def test_no_steps_are_refused(max_steps: int, student_recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--max-steps must be at least 1"):
        train(student_recipe, tmp_path / "run", max_steps=max_steps)


# ---- what it would do ----


def test_a_teacher_is_described_without_a_trace(teacher_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert describe(teacher_recipe, 2) == "autoencoder: 2 steps\nteacher: 2 steps\ndecoder: 2 steps"
    assert not list(tmp_path.iterdir())


def test_a_student_is_described_by_its_plan(student_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "plan", lambda recipe: recipe)
    monkeypatch.setattr(run, "render", lambda planned: f"the plan of {planned.run.name}")
    assert describe(student_recipe) == "the plan of tiny"
    assert not list(tmp_path.iterdir())

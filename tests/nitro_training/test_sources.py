from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, LCMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoints import make_tiny_sdxl
from nitro_rt.errors import BackendUnavailable, ConfigError, ModelNotFound, TrainingError
from nitro_training import sources
from nitro_training.backbone import UNetFeatures
from nitro_training.randomness import generator
from nitro_training.samplers import sample
from nitro_training.sources import BackboneConfig, Teacher, TeacherSourceConfig, load_backbone_unet, load_teacher, load_unet

CPU = torch.device("cpu")
WEIGHTS = "diffusion_pytorch_model.safetensors"
LAYER = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
KOHYA = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_sdxl(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def teacher(tiny: Path) -> Teacher:
    return load_teacher(source(tiny), CPU, torch.float32)


@pytest.fixture
def copied(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "copied"))


def source(folder: Path, **options: Any) -> TeacherSourceConfig:
    return TeacherSourceConfig(checkpoint=str(folder), **{"sampler": "lcm", "num_steps": 4, "guidance": 1.0, **options})


def edit_config(folder: Path, **options: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **options}))


def equal(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(value, second[key]) for key, value in first.items())


# ---- the teacher ----


@pytest.mark.parametrize(
    ("sampler", "num_steps", "guidance"), [("lcm", 4, 0.0), ("ddim-trailing", 8, 0.0), ("dpm-solver++", 5, 3.0)]
)
def test_the_teacher_draws_what_the_pipeline_of_its_authors_draws(
    tiny: Path, teacher: Teacher, sampler: str, num_steps: int, guidance: float
) -> None:
    schedule: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    # as in SDXL's own scheduler_config.json, where DDIM's defaults are others
    ddim = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
    schedulers: dict[str, Any] = {
        "lcm": LCMScheduler(**schedule),
        "ddim-trailing": DDIMScheduler(**schedule, **ddim, timestep_spacing="trailing"),
        "dpm-solver++": DPMSolverMultistepScheduler(**schedule, timestep_spacing="trailing"),
    }
    steps: dict[str, Any] = {"timesteps": [999, 749, 499, 249]} if sampler == "lcm" else {"num_inference_steps": num_steps}
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny, scheduler=schedulers[sampler], add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 8, 8, generator=generator("noise"))
    prompt = "a red apple"  # shorter than 77 tokens: the two tokenizers pad it differently
    wanted = pipeline(
        prompt, **steps, guidance_scale=guidance, latents=noise, generator=[generator("steps")], output_type="latent",
        height=64, width=64,
    ).images  # fmt: skip
    with torch.no_grad():
        embeds, pooled = teacher.text.encode(teacher.text.tokenize([prompt]))
    found = sample(
        teacher.unet, embeds, pooled, noise, sampler=sampler, num_steps=num_steps, guidance=guidance,
        generators=[generator("steps")], autocast=None,
    )  # fmt: skip
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)


def test_each_text_encoder_has_the_tokenizer_of_its_own(teacher: Teacher) -> None:
    ids = teacher.text.tokenize(["a cat", "a dog"])
    assert ids.shape == (2, 2, 77)
    assert (ids[:, 0, -1] != ids[:, 1, -1]).all()  # padding
    assert (ids[:, 0, :3] == ids[:, 1, :3]).all()  # the words


def test_equal_tokenizers_are_shared(copied: Path) -> None:
    shutil.rmtree(copied / "tokenizer_2")
    shutil.copytree(copied / "tokenizer", copied / "tokenizer_2")
    assert sources.load_text_encoders(copied).tokenize(["a cat"]).shape == (1, 77)


def test_everything_is_frozen_and_in_the_dtype_asked_for(copied: Path) -> None:
    half = load_file(copied / "unet" / WEIGHTS)
    save_file({key: value.half() for key, value in half.items()}, copied / "unet" / WEIGHTS)
    for dtype in (torch.float32, torch.bfloat16):
        teacher = load_teacher(source(copied), CPU, dtype)
        modules = [teacher.unet, teacher.vae, teacher.text.first, teacher.text.second]
        assert {parameter.dtype for module in modules for parameter in module.parameters()} == {dtype}
        assert not any(parameter.requires_grad for module in modules for parameter in module.parameters())
        assert not any(module.training for module in modules)


def test_digests_follow_the_weights_not_the_place(tiny: Path, teacher: Teacher, copied: Path) -> None:
    assert load_teacher(source(copied), CPU, torch.float32).digests == teacher.digests
    assert sources.unet_digest(str(copied)) == teacher.digests["unet"]
    for folder, name, part in (("text_encoder_2", "model", "text_encoders"), ("vae", WEIGHTS.split(".")[0], "vae")):
        path = copied / folder / f"{name}.safetensors"
        tensors = load_file(path)
        save_file({key: value * 1.5 for key, value in tensors.items()}, path, metadata={"format": "pt"})
        changed = load_teacher(source(copied), CPU, torch.float32).digests
        assert changed[part] != teacher.digests[part]
    assert changed["unet"] == teacher.digests["unet"]


def test_another_unet_replaces_the_checkpoints(tiny: Path, teacher: Teacher, tmp_path: Path) -> None:
    path = tmp_path / "distilled.safetensors"
    save_file({key: value * 2 for key, value in teacher.unet.state_dict().items()}, path)
    other = load_teacher(source(tiny, unet=str(path)), CPU, torch.float32)
    assert torch.equal(other.unet.conv_in.weight, 2 * teacher.unet.conv_in.weight)
    assert other.digests["unet"] != teacher.digests["unet"]


@pytest.mark.parametrize("part", ["text_encoder/model.safetensors", f"vae/{WEIGHTS}", f"unet/{WEIGHTS}", "unet/config.json"])
def test_a_missing_part_is_named(copied: Path, part: str) -> None:
    (copied / part).unlink()
    with pytest.raises(ModelNotFound, match=part.split("/")[0]):
        load_teacher(source(copied), CPU, torch.float32)


def test_a_missing_tokenizer_is_named(copied: Path) -> None:
    shutil.rmtree(copied / "tokenizer_2")
    with pytest.raises(ModelNotFound, match="tokenizer_2 has neither"):
        load_teacher(source(copied), CPU, torch.float32)


def test_a_missing_checkpoint_says_where_it_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"teacher\.checkpoint: no checkpoint at .*none .*looked for it from"):
        load_teacher(source(tmp_path / "none"), CPU, torch.float32)


@pytest.mark.parametrize("part", ["text_encoder/model.safetensors", f"vae/{WEIGHTS}", f"unet/{WEIGHTS}"])
def test_a_damaged_part_is_named(copied: Path, part: str) -> None:
    path = copied / part
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(TrainingError, match=part.split("/")[0]):
        load_teacher(source(copied), CPU, torch.float32)


@pytest.mark.parametrize("part", ["text_encoder_2/model.safetensors", f"vae/{WEIGHTS}"])
def test_a_part_that_lacks_a_tensor_is_refused(copied: Path, part: str) -> None:
    tensors = load_file(copied / part)
    tensors.pop(min(key for key in tensors if key.endswith("bias")))
    save_file(tensors, copied / part, metadata={"format": "pt"})
    with pytest.raises(TrainingError, match="lacks 1 tensors, first .*bias"):
        load_teacher(source(copied), CPU, torch.float32)


def test_text_encoders_of_another_width_than_the_unet_takes_are_refused(copied: Path) -> None:
    shutil.rmtree(copied / "text_encoder_2")
    shutil.copytree(copied / "text_encoder", copied / "text_encoder_2")
    edit_config(copied / "text_encoder_2", architectures=["CLIPTextModelWithProjection"])
    path = copied / "text_encoder_2/model.safetensors"
    save_file({**load_file(path), "text_projection.weight": torch.zeros(32, 32)}, path, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="embeddings of width 64, the UNet takes 80"):
        load_teacher(source(copied), CPU, torch.float32)


def test_another_kind_of_vae_is_refused(copied: Path) -> None:
    edit_config(copied / "vae", _class_name="AutoencoderTiny")
    with pytest.raises(ConfigError, match="vae holds a AutoencoderTiny; a AutoencoderKL is needed"):
        load_teacher(source(copied), CPU, torch.float32)


def test_latents_that_the_unet_cannot_halve_are_refused(teacher: Teacher) -> None:
    assert (teacher.latents_side(0), teacher.latents_side(128)) == (8, 16)
    with pytest.raises(ConfigError, match=r"teacher\.size_px = 72 .* 9x9, .*use a multiple of 32"):
        teacher.latents_side(72)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": "euler"}, r"teacher\.sampler is one of"),
        ({"num_steps": 0}, r"teacher\.num_steps must be"),
        ({"guidance": -1.0}, r"teacher\.guidance must not"),
        ({"size_px": 100}, r"teacher\.size_px must be a multiple of 8"),
        ({"cache": "somewhere"}, r"teacher\.cache_samples is 0"),
        ({"lora_scale": 0.5}, r"teacher\.lora names no file"),
        ({"shard_size": 0}, r"teacher\.shard_size"),
        ({"checkpoint": ""}, r"teacher\.checkpoint is empty"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TeacherSourceConfig(**{"checkpoint": "x", "sampler": "lcm", "num_steps": 4, "guidance": 1.0, **options})


# ---- one-step weights ----


@pytest.mark.parametrize("place", ["", "unet", f"unet/{WEIGHTS}"])
def test_a_unet_loads_from_a_checkpoint_a_folder_and_a_file(tiny: Path, teacher: Teacher, place: str) -> None:
    loaded = load_unet(str(tiny / place), teacher.unet)
    assert equal(loaded, teacher.unet)
    assert loaded.config.cross_attention_dim == teacher.unet.config.cross_attention_dim


def test_half_precision_files_become_float32(teacher: Teacher, tmp_path: Path) -> None:
    path = tmp_path / "half.safetensors"
    half = {key: value.half() for key, value in teacher.unet.state_dict().items()}
    save_file(half, path)
    loaded = load_unet(str(path), teacher.unet).state_dict()
    assert all(value.dtype == torch.float32 and torch.equal(value, half[key].float()) for key, value in loaded.items())


def test_loaded_weights_do_not_follow_the_file(teacher: Teacher, tmp_path: Path) -> None:
    path = tmp_path / "unet.safetensors"
    save_file(teacher.unet.state_dict(), path)
    loaded = load_unet(str(path), teacher.unet)
    with path.open("r+b") as file:  # in place: the mapping would see it
        file.seek(path.stat().st_size // 2)
        file.write(b"\0" * (path.stat().st_size // 2))
    assert equal(loaded, teacher.unet)


def test_the_first_tensors_that_do_not_fit_are_named(teacher: Teacher, tmp_path: Path) -> None:
    path, weights = tmp_path / "other.safetensors", dict(teacher.unet.state_dict())
    weights["conv_in.weight"] = torch.zeros(16, 9, 3, 3)
    del weights["conv_in.bias"]
    save_file(weights, path)
    with pytest.raises(ConfigError) as error:
        load_unet(str(path), teacher.unet)
    assert "2 tensors differ, first conv_in.bias missing, wanted [16]" in str(error.value)
    assert "conv_in.weight [16, 9, 3, 3], wanted [16, 4, 3, 3]" in str(error.value)


def test_an_architecture_that_shows_in_no_shape_is_compared_too(teacher: Teacher, copied: Path) -> None:
    edit_config(copied / "unet", attention_head_dim=[1, 4, 6])
    with pytest.raises(ConfigError, match=r"has attention_head_dim \[1, 4, 6\], the checkpoint's UNet \[1, 2, 3\]"):
        load_unet(str(copied), teacher.unet)


def test_one_number_for_all_levels_is_the_same_architecture(teacher: Teacher, copied: Path) -> None:
    edit_config(copied / "unet", layers_per_block=[2, 2, 2])
    assert equal(load_unet(str(copied), teacher.unet), teacher.unet)


def test_a_missing_unet_says_what_to_do(teacher: Teacher) -> None:
    with pytest.raises(ModelNotFound, match=r"student\.init: there is nothing at one-step\.safetensors, .*fetch the file"):
        load_unet("one-step.safetensors", teacher.unet)


def test_pickles_are_not_opened(teacher: Teacher, tmp_path: Path) -> None:
    path = tmp_path / "dmd2.bin"
    path.write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(ConfigError, match="pickles"):
        load_unet(str(path), teacher.unet)


# ---- LoRA ----


def lora(rank: int = 4, channels: tuple[int, int] = (80, 32)) -> tuple[Tensor, Tensor]:
    down = torch.randn(rank, channels[0], generator=generator("down"))
    return down, torch.randn(channels[1], rank, generator=generator("up"))


@pytest.mark.parametrize("layout", ["peft", "diffusers", "kohya"])
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_a_lora_is_added_to_the_weights_and_leaves_no_trace(
    tiny: Path, teacher: Teacher, tmp_path: Path, layout: str, scale: float
) -> None:
    down, up = lora()
    alpha = 2.0 if layout == "kohya" else 4.0
    tensors = {
        "peft": {f"unet.{LAYER}.lora_A.weight": down, f"unet.{LAYER}.lora_B.weight": up},
        "diffusers": {f"unet.{LAYER}.lora.down.weight": down, f"unet.{LAYER}.lora.up.weight": up},
        "kohya": {f"{KOHYA}.lora_down.weight": down, f"{KOHYA}.lora_up.weight": up, f"{KOHYA}.alpha": torch.tensor(alpha)},
    }[layout]
    save_file(tensors, tmp_path / "lora.safetensors")
    fused = load_teacher(source(tiny, lora=str(tmp_path / "lora.safetensors"), lora_scale=scale), CPU, torch.float32)
    wanted = dict(teacher.unet.state_dict())
    wanted[f"{LAYER}.weight"] = wanted[f"{LAYER}.weight"] + scale * alpha / 4 * up @ down
    found = fused.unet.state_dict()
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=1e-5)
    assert fused.digests["unet"] == teacher.digests["unet"]
    assert fused.digests["lora"].endswith(f" x {scale}")


def layer(name: str, channels: tuple[int, int] = (80, 32)) -> dict[str, Tensor]:
    return dict(zip((f"{name}.lora_A.weight", f"{name}.lora_B.weight"), lora(channels=channels), strict=True))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (layer("text_encoder.layers.0.q_proj"), "outside the UNet"),
        (layer(f"unet.nowhere.{LAYER}"), "does not fit the UNet"),
        ({**layer(f"unet.{LAYER}"), **layer("unet.nowhere")}, "changes 2 layers, of which the UNet has 1"),
        (layer(f"unet.{LAYER}", (64, 32)), "does not fit the UNet: .*64"),
        ({"conv_in.weight": torch.zeros(3)}, "outside the UNet"),
    ],
    ids=["text encoder", "no such layer", "one unknown layer", "another shape", "no lora"],
)
def test_a_lora_that_is_not_of_this_unet_is_refused(
    tiny: Path, tmp_path: Path, tensors: dict[str, Tensor], message: str
) -> None:
    save_file(tensors, tmp_path / "lora.safetensors")
    with pytest.raises(ConfigError, match=rf"teacher\.lora: .*({message})"):
        load_teacher(source(tiny, lora=str(tmp_path / "lora.safetensors")), CPU, torch.float32)


def test_a_lora_without_peft_says_what_to_install(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "is_peft_available", lambda: False)
    save_file({"x": torch.zeros(1)}, tmp_path / "lora.safetensors")
    with pytest.raises(BackendUnavailable, match="needs peft"):
        load_teacher(source(tiny, lora=str(tmp_path / "lora.safetensors")), CPU, torch.float32)


def test_a_damaged_lora_is_named(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "lora.safetensors").write_bytes(b"no tensors")
    with pytest.raises(TrainingError, match=r"teacher\.lora: .*lora\.safetensors is damaged"):
        load_teacher(source(tiny, lora=str(tmp_path / "lora.safetensors")), CPU, torch.float32)


# ---- the backbone ----


def test_the_backbone_is_the_teacher_or_what_it_was_made_from(tiny: Path, teacher: Teacher, tmp_path: Path) -> None:
    save_file({key: value * 2 for key, value in teacher.unet.state_dict().items()}, tmp_path / "distilled.safetensors")
    distilled = load_teacher(source(tiny, unet=str(tmp_path / "distilled.safetensors")), CPU, torch.float32)
    assert load_backbone_unet(BackboneConfig(), distilled) is distilled.unet
    assert equal(load_backbone_unet(BackboneConfig(source="base"), distilled), teacher.unet)
    other = BackboneConfig(source="base", checkpoint=str(tmp_path / "distilled.safetensors"))
    assert equal(load_backbone_unet(other, teacher), distilled.unet)


def test_a_backbone_gives_ten_features_in_this_topology(teacher: Teacher) -> None:
    unet = load_backbone_unet(BackboneConfig(source="base"), teacher)
    embeds, pooled = torch.zeros(1, 77, 80), torch.zeros(1, 48)
    features = UNetFeatures(unet)(torch.zeros(1, 4, 8, 8), torch.tensor([10]), embeds, pooled, torch.zeros(1, 6))
    assert len(features) == 10


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("cross_attention_dim", 64, "backbone has cross_attention_dim 64, the student 80"),
        ("in_channels", 9, "backbone has in_channels 9, the student 4"),
    ],
)
def test_a_backbone_that_takes_other_inputs_is_refused(
    teacher: Teacher, tmp_path: Path, key: str, value: int, message: str
) -> None:
    UNet2DConditionModel.from_config({**teacher.unet.config, key: value}).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=message):
        load_backbone_unet(BackboneConfig(source="base", checkpoint=str(tmp_path)), teacher)


def test_a_backbone_with_other_features_than_its_config_says_is_refused(teacher: Teacher, tmp_path: Path) -> None:
    UNet2DConditionModel.from_config({**teacher.unet.config, "layers_per_block": (1, 2, 2)}).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"gives 9 features, by part \[1, 2, 3, 2, 1\]"):
        load_backbone_unet(BackboneConfig(source="base", checkpoint=str(tmp_path)), teacher)


@pytest.mark.parametrize("options", [{"source": "student"}, {"checkpoint": "x"}])
def test_a_backbone_that_makes_no_sense_is_refused(options: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"backbone\.source is"):
        BackboneConfig(**options)

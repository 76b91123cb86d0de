"""Which checkpoints are taken, which are refused and why, and what their digest covers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from nitro_export import checkpoint_sha256, read_checkpoint
from nitro_rt.errors import ConfigError, ExportError, ModelNotFound, NitroError


def _edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_reads_a_tiny_checkpoint(tiny_kl: Path, tiny_tiny: Path) -> None:
    for folder in (tiny_kl, tiny_tiny):
        checkpoint = read_checkpoint(folder)
        assert (checkpoint.num_tokens, checkpoint.vae_factor, checkpoint.native_size_px) == (77, 8, 64)
        assert checkpoint.size_multiple == 32
        assert checkpoint.run["shifted_timestep"] == 500


@pytest.mark.parametrize(
    ("part", "changes", "says"),
    [
        ("unet", {"in_channels": 9}, "in_channels is 9, expected 4 .*inpainting"),
        ("unet", {"out_channels": 8}, "out_channels is 8, expected 4 in"),
        ("unet", {"addition_embed_type": None}, "text_time"),
        ("unet", {"time_cond_proj_dim": 256}, "guidance"),
        ("unet", {"cross_attention_dim": 64}, "cross_attention_dim is 64, expected 80, .*different checkpoints"),
        ("unet", {"projection_class_embeddings_input_dim": 99}, "input_dim is 99, expected 144 .*different checkpoints"),
        ("unet", {"sample_size": None}, r"sample_size is None, expected a whole number \(128 in SDXL\)"),
        ("unet", {"block_out_channels": 320}, r"block_out_channels is 320, expected a list .*\[320, 640, 1280\]"),
        ("unet", {"addition_time_embed_dim": "256"}, "addition_time_embed_dim is '256', expected a whole number"),
        ("text_encoder", {"hidden_size": True}, "hidden_size is True, expected a whole number"),
        ("text_encoder_2", {"max_position_embeddings": 64}, "max_position_embeddings is 64, expected 77 .*must agree"),
        ("vae", {"latent_channels": 16}, "latent_channels is 16, expected 4 in"),
        ("vae", {"out_channels": 1}, "out_channels is 1, expected 3 in"),
        ("vae", {"block_out_channels": []}, r"block_out_channels is \[\], expected a list"),
        ("scheduler", {"prediction_type": "v_prediction"}, "v_prediction"),
        ("scheduler", {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr"),
        ("scheduler", {"clip_sample": True}, "clip_sample"),
    ],
)
def test_refuses_other_networks(copied: Path, part: str, changes: dict[str, object], says: str) -> None:
    name = "scheduler_config.json" if part == "scheduler" else "config.json"
    _edit(copied / part / name, **changes)
    with pytest.raises(ExportError, match=rf"{part}.{name}: .*{says}"):
        read_checkpoint(copied)


@pytest.mark.parametrize(
    ("part", "field", "of_sdxl"),
    [
        ("text_encoder", "hidden_size", "768"),  # a T5 encoder's config has d_model
        ("text_encoder_2", "hidden_size", "1280"),
        ("text_encoder_2", "projection_dim", "1280"),
        ("text_encoder", "max_position_embeddings", "77"),
        ("text_encoder_2", "vocab_size", "49408"),
        ("unet", "block_out_channels", r"\[320, 640, 1280\]"),
        ("unet", "addition_time_embed_dim", "256"),
        ("vae", "block_out_channels", r"\[128, 256, 512, 512\]"),
    ],
)
def test_a_field_that_is_missing_is_named(copied: Path, part: str, field: str, of_sdxl: str) -> None:
    path = copied / part / "config.json"
    config = json.loads(path.read_text())
    del config[field]
    path.write_text(json.dumps(config))
    with pytest.raises(ExportError, match=rf"{part}.config.json: {field} is missing, expected .* \({of_sdxl} in SDXL\)"):
        read_checkpoint(copied)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"text_encoder_2": [None, None]}, "text_encoder_2"),
        ({"text_encoder_2": ["transformers", "CLIPTextModel"]}, "CLIPTextModelWithProjection"),
        ({"vae": ["diffusers", "AutoencoderDC"]}, "AutoencoderDC"),
        ({"unet": ["diffusers", "SD3Transformer2DModel"]}, "SD3Transformer2DModel"),
        ({"text_encoder_3": ["transformers", "T5EncoderModel"]}, "text_encoder_3"),
        ({"controlnet": ["diffusers", "ControlNetModel"]}, "controlnet"),
    ],
)
def test_refuses_other_pipelines(copied: Path, changes: dict[str, object], says: str) -> None:
    _edit(copied / "model_index.json", **changes)
    with pytest.raises(ExportError, match=says):
        read_checkpoint(copied)


@pytest.mark.parametrize(
    "missing",
    [
        "model_index.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "vae/config.json",
        "scheduler/scheduler_config.json",
    ],
)
def test_names_a_missing_file(copied: Path, missing: str) -> None:
    (copied / missing).unlink()
    with pytest.raises(ModelNotFound, match=Path(missing).name):
        read_checkpoint(copied)


def test_a_tokenizer_needs_one_of_its_two_forms(copied: Path) -> None:
    (copied / "tokenizer_2" / "tokenizer.json").unlink()
    read_checkpoint(copied)  # vocab.json and merges.txt are there
    (copied / "tokenizer_2" / "merges.txt").unlink()
    with pytest.raises(ModelNotFound, match="merges.txt"):
        read_checkpoint(copied)


def test_refuses_pickles(copied: Path) -> None:
    weights = copied / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(ExportError, match="pickle"):
        read_checkpoint(copied)


def test_takes_an_fp16_variant_and_shards(copied: Path) -> None:
    weights = copied / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_name("diffusion_pytorch_model.fp16.safetensors"))
    assert read_checkpoint(copied).variants["unet"] == "fp16"

    vae = copied / "vae" / "diffusion_pytorch_model.safetensors"
    vae.rename(vae.with_name("shard-1.safetensors"))
    index = copied / "vae" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "shard-1.safetensors", "b": "shard-2.safetensors"}}))
    with pytest.raises(ModelNotFound, match="shard-2"):
        read_checkpoint(copied)


@pytest.mark.parametrize(
    ("weight_map", "error", "says"),
    [
        ({"conv_in.weight": "../../other.safetensors"}, ConfigError, "names the file '../../other.safetensors'.*refused"),
        ({"conv_in.weight": "/other.safetensors"}, ConfigError, "names the file '/other.safetensors'.*refused"),
        (["other.safetensors"], ExportError, "has no weight_map"),
        ({}, ExportError, "has no weight_map"),
    ],
)
def test_shards_lie_beside_their_index(copied: Path, weight_map: object, error: type[NitroError], says: str) -> None:
    weights = copied / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(copied.parent / "other.safetensors")
    weights.with_name("diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(error, match=says):
        read_checkpoint(copied)


@pytest.mark.parametrize("content", ["{", "[]", "\x00"])
def test_refuses_a_damaged_config(copied: Path, content: str) -> None:
    (copied / "unet" / "config.json").write_text(content)
    with pytest.raises(ExportError, match="config.json"):
        read_checkpoint(copied)


def test_says_what_a_checkpoint_is(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="no checkpoint folder"):
        read_checkpoint(tmp_path / "absent")
    single = tmp_path / "model.safetensors"
    single.touch()
    with pytest.raises(ModelNotFound, match="from_single_file"):
        read_checkpoint(single)
    with pytest.raises(ModelNotFound, match="found: model.safetensors"):
        read_checkpoint(tmp_path)


def test_digest_covers_what_is_read_and_no_more(copied: Path, tmp_path: Path) -> None:
    digest = checkpoint_sha256(copied)
    assert checkpoint_sha256(Path(shutil.copytree(copied, tmp_path / "elsewhere"))) == digest
    (copied / "README.md").write_text("a card")
    (copied / "unet" / "notes.txt").write_text("notes")
    assert checkpoint_sha256(copied) == digest
    seen = {digest}
    for name in ("unet/diffusion_pytorch_model.safetensors", "tokenizer/merges.txt", "vae/config.json", "run.json"):
        path = copied / name
        path.write_bytes(path.read_bytes() + b" ")
        seen.add(checkpoint_sha256(copied))
    assert len(seen) == 5

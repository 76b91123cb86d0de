from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from layouts import PARTS, comfyui_file, original_unet_name, part_tensors
from nitro_export.lazy import lazy_tensors, metadata_of, write_lazy, write_outline
from nitro_export.single_file import diffusers_tensors, parts_of_file
from nitro_export.stored import stored_tensors
from nitro_rt.errors import ConfigError, ExportError


def config_of(checkpoint: Path, part: str) -> dict[str, object]:
    return dict(json.loads((checkpoint / part / "config.json").read_text()))


def converted(checkpoint: Path, path: Path, part: str) -> dict[str, Tensor]:
    tensors = diffusers_tensors(part, parts_of_file(path)[part], config_of(checkpoint, part), str(path))
    for tensor in tensors.values():
        assert tensor.read().shape == tensor.shape and tensor.read().dtype == tensor.dtype
    return {name: tensor.read() for name, tensor in tensors.items()}


def require_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    names = {name.removeprefix("text_model."): tensor for name, tensor in wanted.items()}
    assert {name.removeprefix("text_model.") for name in found} == names.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, names[name.removeprefix("text_model.")]), name


def test_comfyuis_checkpoint_bit_for_bit(tiny_kl: Path, tmp_path: Path) -> None:
    path = comfyui_file(tiny_kl, tmp_path / "all.safetensors")
    assert sorted(parts_of_file(path)) == sorted(PARTS)
    for part in PARTS:
        require_same(converted(tiny_kl, path, part), part_tensors(tiny_kl, part))


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_unet_alone_with_the_original_names(tiny_kl: Path, tmp_path: Path, prefix: str) -> None:
    path = tmp_path / "unet.safetensors"
    wanted = part_tensors(tiny_kl, "unet")
    save_file({prefix + original_unet_name(name): tensor.half() for name, tensor in wanted.items()}, path)
    assert list(parts_of_file(path)) == ["unet"]
    require_same(converted(tiny_kl, path, "unet"), {name: tensor.half() for name, tensor in wanted.items()})


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_a_part_alone_with_diffusers_names(tiny_kl: Path, tmp_path: Path, part: str) -> None:
    path = tiny_kl / part / "diffusion_pytorch_model.safetensors"
    assert list(parts_of_file(path)) == [part]
    require_same(converted(tiny_kl, path, part), part_tensors(tiny_kl, part))


def test_a_vae_alone_with_the_original_names(tiny_kl: Path, tmp_path: Path) -> None:
    tensors = load_file(comfyui_file(tiny_kl, tmp_path / "vae.safetensors", ("vae",)))
    path = tmp_path / "bare.safetensors"
    save_file({key.removeprefix("first_stage_model."): tensor for key, tensor in tensors.items()}, path)
    assert list(parts_of_file(path)) == ["vae"]
    require_same(converted(tiny_kl, path, "vae"), part_tensors(tiny_kl, "vae"))


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["lora_unet_conv_in.lora_down.weight"], "it is a LoRA, say --model CHECKPOINT --lora FILE"),
        (["cond_stage_model.transformer.x"], "Stable Diffusion 1 or 2"),
        (["double_blocks.0.img_attn.norm.key_norm.scale"], "a transformer"),
        (["model.diffusion_model.input_blocks.0.0.weight", "v_pred"], "predicts v"),
        (["model.diffusion_model.input_blocks.0.0.weight", "edm_mean"], "of EDM's kind"),
        (["something.weight"], "first of its 1 tensors: something.weight"),
        ([], "first of its 0 tensors: none"),
    ],
)
def test_what_is_no_sdxl_checkpoint(tmp_path: Path, names: list[str], said: str) -> None:
    path = tmp_path / "x.safetensors"
    save_file({name: torch.zeros(2) for name in names}, path)
    with pytest.raises(ConfigError, match=said):
        parts_of_file(path)


def test_quantised_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "fp8.safetensors"
    save_file({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(2).to(torch.float8_e4m3fn)}, path)
    with pytest.raises(ExportError, match="F8_E4M3.*not quantised"):
        parts_of_file(path)


@pytest.mark.parametrize(
    ("part", "name", "said"),
    [
        ("unet", "model.diffusion_model.label_emb.0.0.weight", "its unet cannot be read"),
        (
            "unet",
            "model.diffusion_model.input_blocks.3.0.op.bias",
            "unet lacks 1 tensors: down_blocks.0.*conv.bias",
        ),
        ("unet", "model.diffusion_model.input_blocks.4.2.extra.weight", "unet holds 1 tensors: .*extra.weight, which SDXL"),
        ("vae", "first_stage_model.decoder.extra.weight", "vae holds 1 tensors: .*decoder.extra.weight, which SDXL"),
        ("text_encoder_2", "conditioner.embedders.1.model.extra", "text_encoder_2 holds 1 tensors"),
        ("text_encoder", "conditioner.embedders.0.extra", "text_encoder holds 1 tensors"),
    ],
)
def test_missing_and_unknown_tensors_are_named(tiny_kl: Path, tmp_path: Path, part: str, name: str, said: str) -> None:
    path = comfyui_file(tiny_kl, tmp_path / "all.safetensors", (part,))
    tensors = load_file(path)
    if name in tensors:
        del tensors[name]
    else:
        tensors[name] = torch.zeros(2)
    save_file(tensors, path)
    with pytest.raises(ConfigError, match=said):
        converted(tiny_kl, path, part)


def test_an_outline_has_the_header_and_the_size_but_no_values(tiny_kl: Path, tmp_path: Path) -> None:
    source, whole, outline = tiny_kl / "unet" / "diffusion_pytorch_model.safetensors", tmp_path / "whole", tmp_path / "outline"
    tensors = lazy_tensors([source])
    write_lazy(whole, tensors)
    write_outline(outline, tensors)
    require_same(load_file(whole), load_file(source))
    assert metadata_of(whole) == {"format": "pt"}
    facts = [{key: (t.dtype, t.shape) for key, t in stored_tensors([path]).items()} for path in (whole, outline)]
    assert facts[0] == facts[1]
    assert outline.stat().st_blocks * 512 < 200_000 < outline.stat().st_size

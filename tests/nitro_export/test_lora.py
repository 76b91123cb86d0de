from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from layouts import kohya_lora, lora_matrices, part_tensors, peft_lora
from nitro_export.checkpoint import part_files
from nitro_export.lazy import lazy_tensors
from nitro_export.lora import PARTS, Lora, fused, read_lora, require_fit
from nitro_rt.errors import ConfigError, ExportError

ROUNDING = 3e-6
"""Of float32, against weights of up to 5: PEFT multiplies the scale into another factor."""


def ours(checkpoint: Path, path: Path, scale: float) -> dict[str, dict[str, Tensor]]:
    lora = read_lora(path, layers_per_block=2)
    parts = {part: lazy_tensors(part_files(checkpoint / part, part)) for part in PARTS}
    require_fit(lora, parts)
    return {
        part: {name: tensor.read() for name, tensor in fused(part, tensors, [(lora, scale)]).items()}
        for part, tensors in parts.items()
    }


def diffusers(checkpoint: Path, path: Path, scale: float) -> dict[str, dict[str, Tensor]]:
    pipe = StableDiffusionXLPipeline.from_pretrained(checkpoint)
    pipe.load_lora_weights(path)
    pipe.fuse_lora(components=list(PARTS), lora_scale=scale)
    pipe.unload_lora_weights()
    return {part: getattr(pipe, part).state_dict() for part in PARTS}


def require_same(found: dict[str, dict[str, Tensor]], wanted: dict[str, dict[str, Tensor]]) -> None:
    for part in PARTS:
        names = {name.removeprefix("text_model."): tensor for name, tensor in wanted[part].items()}
        assert len(found[part]) == len(names)
        for name, tensor in found[part].items():
            reference = names[name.removeprefix("text_model.")]
            torch.testing.assert_close(tensor, reference, rtol=0, atol=ROUNDING, msg=f"{part}.{name}")


@pytest.mark.parametrize("layout", ["kohya", "kohya without alphas", "kohya, diffusers' names", "peft"])
def test_a_fused_lora_is_what_diffusers_makes_of_it(tiny_kl: Path, tmp_path: Path, layout: str) -> None:
    path = tmp_path / "lora.safetensors"
    if layout == "peft":
        peft_lora(tiny_kl, path)
    else:
        kohya_lora(tiny_kl, path, original="names" not in layout, alphas=() if "without" in layout else (2.0,))
    found = ours(tiny_kl, path, 0.7)
    require_same(found, diffusers(tiny_kl, path, 0.7))
    changed = {
        (part, name.removesuffix(".weight").removeprefix("text_model."))
        for part in PARTS
        for name, tensor in part_tensors(tiny_kl, part).items()
        if not torch.equal(found[part][name], tensor)
    }
    left_out = {("unet", "add_embedding.linear_2")} if "names" in layout else set()
    assert changed == set(lora_matrices(tiny_kl)) - left_out


def test_every_layer_has_its_own_alpha(tiny_kl: Path, tmp_path: Path) -> None:
    """Checked by hand: diffusers 0.42 gives attention layers of kohya's the most common alpha of the file."""
    path, alphas = kohya_lora(tiny_kl, tmp_path / "lora.safetensors", alphas=(2.0, 3.0, 5.0)), (2.0, 3.0, 5.0)
    found = ours(tiny_kl, path, 0.5)
    for number, ((part, module), (down, up)) in enumerate(lora_matrices(tiny_kl).items()):
        name = next(name for name in found[part] if name.removeprefix("text_model.") == f"{module}.weight")
        weight = part_tensors(tiny_kl, part)[name]
        delta = (up.flatten(1) @ down.flatten(1)).view(weight.shape) * 0.5 * alphas[number % 3] / len(down)
        torch.testing.assert_close(found[part][name], weight + delta, rtol=0, atol=ROUNDING, msg=module)


def test_pefts_settings_in_the_metadata_give_the_scale(tiny_kl: Path, tmp_path: Path) -> None:
    plain, settled = peft_lora(tiny_kl, tmp_path / "plain.safetensors"), tmp_path / "settled.safetensors"
    settings = {f"{part}.lora_alpha": 6 for part in PARTS} | {"unet.alpha_pattern": {"conv_in": 12}, "unet.use_rslora": True}
    peft_lora(tiny_kl, settled, {"lora_adapter_metadata": json.dumps(settings)})
    before, after = (read_lora(path, 2) for path in (plain, settled))
    for part, module, factor in (
        ("unet", "conv_in", 12 / 4**0.5),
        ("unet", "time_embedding.linear_1", 6 / 3**0.5),
        ("text_encoder", "text_model.encoder.layers.0.self_attn.q_proj", 6 / before_rank(before, "text_encoder")),
    ):
        assert before.layers[part][module].factor == 1
        assert after.layers[part][module].factor == pytest.approx(factor)


def before_rank(lora: Lora, part: str) -> int:
    first, *_ = lora.layers[part].values()
    return first.down.shape[0]


def test_the_sum_of_loras_is_rounded_once(tmp_path: Path) -> None:
    weight = torch.full((2, 2), 1.0, dtype=torch.float16)
    step = {"unet.conv_in.lora_A.weight": torch.eye(2), "unet.conv_in.lora_B.weight": torch.eye(2) * 3e-4}
    save_file({"conv_in.weight": weight}, tmp_path / "unet.safetensors")
    save_file(step, tmp_path / "lora.safetensors")
    lora = read_lora(tmp_path / "lora.safetensors", 2)
    tensors = lazy_tensors([tmp_path / "unet.safetensors"])
    once, thrice = (fused("unet", tensors, [(lora, 1.0)] * number)["conv_in.weight"] for number in (1, 3))
    assert torch.equal(once.read(), weight)  # less than half a step of float16
    assert thrice.read()[0, 0] == torch.tensor(1.0009, dtype=torch.float16) and thrice.dtype == torch.float16
    assert torch.equal(fused("unet", tensors, [(lora, 0.0)])["conv_in.weight"].read(), weight)


def test_weights_that_overflow_are_refused(tmp_path: Path) -> None:
    save_file({"conv_in.weight": torch.ones(2, 2, dtype=torch.float16)}, tmp_path / "unet.safetensors")
    save_file({f"unet.conv_in.lora_{side}.weight": torch.eye(2) for side in "AB"}, tmp_path / "l.safetensors")
    tensors = fused("unet", lazy_tensors([tmp_path / "unet.safetensors"]), [(read_lora(tmp_path / "l.safetensors", 2), 1e6)])
    with pytest.raises(ExportError, match="conv_in.weight is no longer finite.*smaller scale"):
        tensors["conv_in.weight"].read()


def test_a_lora_for_another_base(tiny_kl: Path, tmp_path: Path) -> None:
    tensors = load_file(peft_lora(tiny_kl, tmp_path / "good.safetensors"))
    tensors["unet.conv_in.lora_A.weight"] = torch.zeros(4, 9, 3, 3)
    for part in "AB":
        tensors[f"unet.down_blocks.0.attentions.0.proj_in.lora_{part}.weight"] = torch.zeros(4, 4)
    save_file(tensors, tmp_path / "bad.safetensors", {"ss_base_model_version": "sd_v1"})
    parts = {part: lazy_tensors(part_files(tiny_kl / part, part)) for part in PARTS}
    with pytest.raises(ConfigError) as caught:
        require_fit(read_lora(tmp_path / "bad.safetensors", 2), parts)
    for said in (
        "another base: of its 19 layers 1 are not in the model: unet.down_blocks.0.attentions.0.proj_in",
        "1 have another shape: unet.conv_in [16, 4, 3, 3], the LoRA has [16, 4, 1, 1] x [4, 9, 3, 3]",
        "for sd_v1",
    ):
        assert said in str(caught.value)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["lora_unet_conv_in.hada_w1_a"], "LoHa"),
        (["lora_unet_conv_in.lokr_w1"], "LoKr"),
        (["lora_unet_conv_in.lora_down.weight", "lora_unet_conv_in.dora_scale"], "DoRA"),
        (["lora_unet_conv_in.diff"], "full differences"),
        (["unet.conv_in.lora_A.weight"], "no counterpart"),
        (["unet.conv_in.lora_B.weight"], "not all are pairs"),
        (["lora_unet_conv_in.lora_down.weight"], "not those of an SDXL LoRA"),
        (["lora_unet_conv_in.weird"], "neither up nor down"),
        (["unet.conv_in.weird"], "neither up nor down"),
        (["conv_in.weight"], "no LoRA that is read here"),
        (["lora_unet_input_blocks_77_0_in_layers_2_lora.lora_down.weight"], "not those of an SDXL LoRA"),
        ([], "no LoRA that is read here"),
    ],
)
def test_what_is_no_lora_is_refused(tmp_path: Path, names: list[str], said: str) -> None:
    path = tmp_path / "x.safetensors"
    save_file({name: torch.zeros(2, 2) for name in names}, path)
    with pytest.raises(ConfigError, match=said):
        read_lora(path, 2)


def test_names_in_two_layouts_are_refused(tiny_kl: Path, tmp_path: Path) -> None:
    both = {
        original: load_file(kohya_lora(tiny_kl, tmp_path / "l.safetensors", original=original)) for original in (True, False)
    }
    save_file(both[True] | both[False], tmp_path / "l.safetensors")
    with pytest.raises(ConfigError, match="in two ways"):
        read_lora(tmp_path / "l.safetensors", 2)


def test_damaged_files(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"\x10")
    with pytest.raises(ExportError, match="cut"):
        read_lora(path, 2)
    save_file({"unet.conv_in.lora_A.weight": torch.zeros(2)}, path, {"lora_adapter_metadata": "{"})
    with pytest.raises(ExportError, match="no JSON"):
        read_lora(path, 2)


def test_a_dora_by_its_settings_is_refused(tmp_path: Path) -> None:
    save_file({}, tmp_path / "x.safetensors", {"lora_adapter_metadata": json.dumps({"unet.use_dora": True})})
    tensors = {f"unet.conv_in.lora_{side}.weight": torch.zeros(2, 2) for side in "AB"}
    save_file(tensors, tmp_path / "x.safetensors", {"lora_adapter_metadata": json.dumps({"unet.use_dora": True})})
    with pytest.raises(ConfigError, match="DoRA"):
        read_lora(tmp_path / "x.safetensors", 2)

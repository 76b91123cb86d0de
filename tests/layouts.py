"""A diffusers checkpoint in the layouts that other tools write: the original UNet's names, ComfyUI's file, kohya's LoRA.

The tables are written out here, by the block structure of the original code, so that they check diffusers' converters
instead of repeating them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")
TIME = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"}
TIME |= {"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}
ENDS = {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0"}
RESNET |= {"conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
OPENCLIP = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
OPENCLIP |= {"self_attn.out_proj": "attn.out_proj"}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def part_tensors(checkpoint: Path, part: str) -> dict[str, Tensor]:
    (path,) = (checkpoint / part).glob("*.safetensors")
    return load_file(path)


def original_unet_name(name: str) -> str:
    """down_blocks.1.attentions.0.norm.weight -> input_blocks.4.1.norm.weight; SDXL's three levels of two layers."""
    module, _, kind = name.rpartition(".")
    if module in TIME | ENDS:
        return f"{(TIME | ENDS)[module]}.{kind}"
    side, *parts = module.split(".")
    if side == "mid_block":
        what, index, *rest = parts
        return ".".join(["middle_block", "1" if what == "attentions" else ("0", "2")[int(index)], *_inner(what, rest), kind])
    block, what, index, *rest = parts
    if side == "down_blocks":
        number = 1 + 3 * int(block) + (2 if what == "downsamplers" else int(index))
        inner = ["0", "op"] if what == "downsamplers" else [str(int(what == "attentions")), *_inner(what, rest)]
        return ".".join(["input_blocks", str(number), *inner, kind])
    number = 3 * int(block) + (2 if what == "upsamplers" else int(index))
    inner = ["2", "conv"] if what == "upsamplers" else [str(int(what == "attentions")), *_inner(what, rest)]
    return ".".join(["output_blocks", str(number), *inner, kind])


def _inner(what: str, rest: list[str]) -> list[str]:
    return rest if what == "attentions" else [RESNET[rest[0]], *rest[1:]]


def comfyui_file(checkpoint: Path, path: Path, parts: tuple[str, ...] = PARTS) -> Path:
    """All parts in one file, as ComfyUI's CheckpointSave writes them."""
    tensors: dict[str, Tensor] = {}
    for part in parts:
        tensors |= _COMFYUI[part](part_tensors(checkpoint, part))
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    return path


def _unet(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"model.diffusion_model.{original_unet_name(name)}": tensor for name, tensor in tensors.items()}


def _text_encoder(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    prefix = "conditioner.embedders.0.transformer.text_model."
    found = {prefix + name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
    return found | {f"{prefix}embeddings.position_ids": torch.arange(77)[None]}


def _text_encoder_2(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    prefix = "conditioner.embedders.1.model."
    found = {f"{prefix}logit_scale": torch.tensor(4.6)}
    for name, tensor in tensors.items():
        name = name.removeprefix("text_model.")
        if name == "text_projection.weight":
            found[f"{prefix}text_projection"] = tensor.T
        elif name.startswith("embeddings."):
            found[prefix + ("token_embedding.weight" if "token" in name else "positional_embedding")] = tensor
        elif name.startswith("final_layer_norm."):
            found[prefix + name.replace("final_layer_norm", "ln_final")] = tensor
        elif "self_attn.q_proj" in name:
            block = prefix + name.replace("encoder.layers", "transformer.resblocks").split(".self_attn")[0]
            three = [tensors[f"text_model.{name}".replace("q_proj", f"{which}_proj")] for which in "qkv"]
            found[f"{block}.attn.in_proj_{name.rpartition('.')[2]}"] = torch.cat(three)
        elif not any(which in name for which in ("k_proj", "v_proj")):
            for ours, theirs in OPENCLIP.items():
                name = name.replace(ours, theirs)
            found[prefix + name.replace("encoder.layers", "transformer.resblocks")] = tensor
    return found


def _vae(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    levels = 1 + max(int(name.split(".")[2]) for name in tensors if ".up_blocks." in name)
    found = {}
    for name, tensor in tensors.items():
        parts = name.split(".")
        if "mid_block" in parts:
            what, index, *rest = parts[2:]
            if what == "attentions":
                inner = ".".join(rest[:-1])
                rest = [VAE_ATTENTION[inner], rest[-1]]
                tensor = tensor[:, :, None, None] if tensor.ndim == 2 else tensor
            parts = [parts[0], "mid", "attn_1" if what == "attentions" else f"block_{int(index) + 1}", *rest]
        elif parts[1] in ("down_blocks", "up_blocks"):
            side, level, what, index, *rest = parts[1:]
            number = level if side == "down_blocks" else str(levels - 1 - int(level))
            sampler = {"downsamplers": "downsample", "upsamplers": "upsample"}.get(what)
            parts = [parts[0], side.removesuffix("_blocks"), number, *([sampler] if sampler else ["block", index]), *rest]
        changed = ".".join(parts).replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        found[f"first_stage_model.{changed}"] = tensor
    return found


_COMFYUI: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    "unet": _unet,
    "vae": _vae,
    "text_encoder": _text_encoder,
    "text_encoder_2": _text_encoder_2,
}

LORA_LAYERS = {
    "unet": (
        "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
        "down_blocks.1.attentions.1.transformer_blocks.0.attn2.to_out.0",
        "up_blocks.0.attentions.2.transformer_blocks.1.ff.net.0.proj",
        "mid_block.attentions.0.proj_in",
        "down_blocks.0.resnets.1.conv1",
        "down_blocks.1.resnets.0.time_emb_proj",
        "down_blocks.1.resnets.0.conv_shortcut",
        "down_blocks.0.downsamplers.0.conv",
        "up_blocks.1.upsamplers.0.conv",
        "conv_in",
        "time_embedding.linear_1",
        "add_embedding.linear_2",
    ),
    "text_encoder": ("encoder.layers.0.self_attn.q_proj", "encoder.layers.1.self_attn.out_proj", "encoder.layers.1.mlp.fc1"),
    "text_encoder_2": ("encoder.layers.2.self_attn.v_proj", "encoder.layers.0.self_attn.out_proj", "encoder.layers.2.mlp.fc2"),
}


def lora_matrices(checkpoint: Path, *, rank: int = 3, seed: int = 5) -> dict[tuple[str, str], tuple[Tensor, Tensor]]:
    """(part, module) -> random down and up, for linear layers and convolutions; their sum changes pictures visibly."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for part, modules in LORA_LAYERS.items():
        tensors = part_tensors(checkpoint, part)
        for number, module in enumerate(modules):
            weight = tensors.get(f"{module}.weight", tensors.get(f"text_model.{module}.weight"))
            assert weight is not None, module
            own = rank + number % 2  # ranks are mixed
            out, into, *kernel = weight.shape
            down = torch.randn(own, into, *kernel, generator=generator) / into**0.5
            up = torch.randn(out, own, *(1 for _ in kernel), generator=generator) * weight.std()
            found[part, module] = down, up
    return found


def kohya_lora(checkpoint: Path, path: Path, *, original: bool = True, alphas: tuple[float, ...] = (2.0,)) -> Path:
    """As kohya's sd-scripts write it; `original`: with the original UNet's names, as for SDXL, else with diffusers'.

    Args:
        alphas: taken in turn by the layers; none at all if empty.
    """
    tensors = {}
    for number, ((part, module), (down, up)) in enumerate(lora_matrices(checkpoint).items()):
        if not original and module.startswith("add_embedding"):
            continue  # diffusers does not know it under this name
        if part == "unet":
            name = original_unet_name(f"{module}.weight").removesuffix(".weight") if original else module
        else:
            name = f"text_model.{module}"
        prefix = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}[part]
        name = prefix + name.replace(".", "_")
        tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"] = down, up
        if alphas:
            tensors[f"{name}.alpha"] = torch.tensor(alphas[number % len(alphas)])
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    return path


def peft_lora(checkpoint: Path, path: Path, metadata: dict[str, str] | None = None) -> Path:
    """As diffusers' `save_lora_weights` writes it; no alphas."""
    tensors = {}
    for (part, module), (down, up) in lora_matrices(checkpoint).items():
        name = f"{part}.{module}" if part == "unet" else f"{part}.text_model.{module}"
        tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = down, up
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata)
    return path

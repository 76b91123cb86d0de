"""A seeded random checkpoint of SDXL's exact architecture, for measurements at full size where no weights can be fetched.

    python -m nitro_bench.synthetic sdxl DIR --size full --seed 0

Everything but the pictures' meaning is real: parts, names, shapes, number types, shards, tokenizers. Weights preserve the
variance of what flows through them, so predictions have unit variance, images are neither uniform nor saturated, another
prompt gives another image, and nothing comes near the end of float16. Names and shapes are read from modules on torch's
meta device and tensors are drawn and written in parts, so the memory needed does not grow with the model.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from diffusers import AutoencoderKL, LCMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from nitro_bench._clip_vocabulary import write_clip_tokenizer
from nitro_export.sdxl import CONFIGS
from nitro_export.weights import TensorSpec, write_safetensors
from nitro_rt.errors import ConfigError, NitroError
from nitro_training.publish import published, require_free

SHIFT = 250
"""The timestep shift in run.json, NitroSD-Realism's."""
SHARD_BYTES = 2 * 10**9
PART_NUMBERS = 1 << 22
"""Numbers that are drawn at a time: 16 MiB in float32."""
DTYPES = {"fp16": torch.float16, "fp32": torch.float32, "bf16": torch.bfloat16}
SIZES = ("full", "half", "tiny")

AFTER_SILU = 1.68
"""1 / sqrt(E[silu(x)^2]) of a standard normal x: what makes up for the spread that the activation takes."""
AFTER_GELU = 1.53
TIME_GAIN = 2.0
"""Of time and pooled text in a block, beside features of unit variance."""
BRANCH_GAIN = 2.0
"""Of all residual branches together, beside what skips them: what the prompt says is in the branches."""
POOLED_GAIN = 3.0
"""Of pooled text and sizes, beside the timestep."""
SELF_GAIN, CROSS_GAIN = 2.0, 3.0
"""What makes up for the spread that averaging over tokens takes. With text the average also is mostly over padding, which
all prompts share; hence more."""
KEY_GAIN = 0.6
"""Sharpness of attention to text, whose hidden states spread by 2.8: its logits spread by about 1.7. (Sharper still,
float16 errors grow.)"""
NOISE_STD, IMAGE_STD = 1.0, 0.4
"""Spread of noise predictions, and of images in -1..1."""
BIAS_STD, NORM_STD = 0.05, 0.05
"""Biases around 0 and norms around 1: not exactly these, or a graph that lost one would not be noticed."""

Report = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Part:
    """A network of the checkpoint."""

    name: str
    stem: str
    """Of its weight files."""
    specs: Mapping[str, TensorSpec]
    std: Callable[[str], tuple[float, float]]
    """Tensor name -> mean and standard deviation of its numbers."""
    save_config: Callable[[Path], Any]

    @property
    def num_bytes(self) -> int:
        return sum(spec.num_bytes for spec in self.specs.values())


def make_sdxl(out: Path, *, seed: int = 0, size: str = "full", dtype: str = "fp16", report: Report = print) -> Path:
    """Write the checkpoint; equal arguments write equal bytes (with the same versions of NumPy and diffusers).

    Args:
        out: not there yet. It is assembled in a hidden sibling and appears by one rename; what a killed run left is removed.
        size: "full" is SDXL base 1.0 (2.57 B parameters in the UNet, 1024 px), "half" has half its widths (512 px) and all
            its depths, "tiny" is of a few MB (64 px).
        dtype: "fp16", "fp32" or "bf16".
    Returns: `out`.
    Raises: ConfigError for a wrong argument or where something stands at `out`; TrainingError if it cannot be written.
    """
    if size not in SIZES:
        raise ConfigError(f"size {size!r} is not made; available: {', '.join(SIZES)}")
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is not made; available: {', '.join(DTYPES)}")
    if os.path.lexists(out):
        raise ConfigError(f"{out} is there already; remove it or choose another folder")
    configs = _configs(size)
    parts = _parts(configs, DTYPES[dtype])
    place = require_free(out, force=False, inputs=())
    with published(place, num_bytes=sum(part.num_bytes for part in parts)) as folder:
        folder.mkdir()
        for part in parts:
            started = time.perf_counter()
            _write_part(folder / part.name, part, seed)
            numbers = sum(math.prod(spec.shape) for spec in part.specs.values())
            report(f"{part.name}: {numbers:,} parameters in {time.perf_counter() - started:.0f} s")
        num_tokens = configs["text_encoder"]["max_position_embeddings"]
        for name, pad in (("tokenizer", None), ("tokenizer_2", "!")):
            vocab_size = configs["text_encoder"]["vocab_size"]
            write_clip_tokenizer(folder / name, vocab_size=vocab_size, num_tokens=num_tokens, pad=pad)
        _scheduler().save_config(folder / "scheduler")
        _write_json(folder / "model_index.json", _model_index())
        facts = {"seed": seed, "size": size, "dtype": dtype}
        run = {"name": f"synthetic-sdxl-{size}", "licence": "CC0-1.0", "shifted_timestep": SHIFT, "synthetic": facts}
        _write_json(folder / "run.json", run)
    return out


# --- configurations -----------------------------------------------------------------------------------------------------


def _configs(size: str) -> dict[str, dict[str, Any]]:
    """Of the four networks. SDXL's VAE says `force_upcast`, since its trained weights overflow in float16; these do not."""
    parts = ("text_encoder", "text_encoder_2", "unet", "vae")
    built_in = {part: {key: value for key, value in CONFIGS[part].items() if key != "_class_name"} for part in parts}
    built_in["vae"] |= {"force_upcast": False}
    return {name: config | _CHANGES[size].get(name, {}) for name, config in built_in.items()}


_HALF: dict[str, dict[str, Any]] = {
    "unet": {
        "sample_size": 64,
        "block_out_channels": [160, 320, 640],
        "cross_attention_dim": 1024,
        "addition_time_embed_dim": 128,
        "projection_class_embeddings_input_dim": 1408,
    },
    "text_encoder": {"hidden_size": 384, "intermediate_size": 1536, "projection_dim": 384, "num_attention_heads": 6},
    "text_encoder_2": {"hidden_size": 640, "intermediate_size": 2560, "projection_dim": 640, "num_attention_heads": 10},
    "vae": {"block_out_channels": [64, 128, 256, 256], "sample_size": 512},
}
_TINY: dict[str, dict[str, Any]] = {
    "unet": {
        "sample_size": 8,
        "block_out_channels": [16, 32, 48],
        "transformer_layers_per_block": [1, 1, 2],
        "attention_head_dim": [1, 2, 3],
        "norm_num_groups": 8,
        "cross_attention_dim": 80,
        "addition_time_embed_dim": 16,
        "projection_class_embeddings_input_dim": 144,
    },
    "text_encoder": {
        "vocab_size": 2000,
        "hidden_size": 32,
        "intermediate_size": 64,
        "projection_dim": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    },
    "text_encoder_2": {
        "vocab_size": 2000,
        "hidden_size": 48,
        "intermediate_size": 96,
        "projection_dim": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
    },
    "vae": {"block_out_channels": [8, 16, 16, 16], "norm_num_groups": 4, "sample_size": 64},
}
_CHANGES: dict[str, dict[str, dict[str, Any]]] = {"full": {}, "half": _HALF, "tiny": _TINY}


def _scheduler() -> LCMScheduler:
    """SDXL's betas; LCM over the four timesteps that one to four steps use."""
    return LCMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", original_inference_steps=4)


def _model_index() -> dict[str, Any]:
    return {
        "_class_name": "StableDiffusionXLPipeline",
        "add_watermarker": False,
        "feature_extractor": [None, None],
        "force_zeros_for_empty_prompt": True,
        "image_encoder": [None, None],
        "scheduler": ["diffusers", "LCMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }


# --- weights ------------------------------------------------------------------------------------------------------------


def _parts(configs: Mapping[str, Mapping[str, Any]], dtype: torch.dtype) -> list[Part]:
    # Modules on the meta device have names and shapes, and no memory.
    with torch.device("meta"):
        text = CLIPTextModel(CLIPTextConfig(**configs["text_encoder"]))
        text_2 = CLIPTextModelWithProjection(CLIPTextConfig(**configs["text_encoder_2"]))
        unet = UNet2DConditionModel(**configs["unet"])
        vae = AutoencoderKL(**configs["vae"])
    text.config.architectures, text_2.config.architectures = ["CLIPTextModel"], ["CLIPTextModelWithProjection"]
    part = _PartMaker(dtype)
    return [
        part("text_encoder", "model", text, _text_gain, text.config.save_pretrained),
        part("text_encoder_2", "model", text_2, _text_gain, text_2.config.save_pretrained),
        part("unet", "diffusion_pytorch_model", unet, _unet_gain, unet.save_config),
        part("vae", "diffusion_pytorch_model", vae, _vae_gain, vae.save_config),
    ]


@dataclass(frozen=True)
class _PartMaker:
    dtype: torch.dtype

    def __call__(
        self,
        name: str,
        stem: str,
        module: torch.nn.Module,
        gain: Callable[[str, Mapping[str, TensorSpec]], float],
        save_config: Callable[[Path], Any],
    ) -> Part:
        # transformers 5 dropped this prefix from one of its two text encoders; SDXL's files, and other versions, have it.
        prefix = "text_model." if isinstance(module, CLIPTextModel) else ""
        specs = {prefix + key: TensorSpec(self.dtype, tuple(tensor.shape)) for key, tensor in module.state_dict().items()}

        def std(key: str) -> tuple[float, float]:
            """Of one tensor."""
            if key.endswith(".bias"):
                return 0.0, BIAS_STD
            if len(specs[key].shape) == 1:
                return 1.0, NORM_STD
            if "embedding.weight" in key:
                return 0.0, gain(key, specs)
            return 0.0, gain(key, specs) / math.sqrt(math.prod(specs[key].shape[1:]))

        return Part(name=name, stem=stem, specs=specs, std=std, save_config=save_config)


def _text_gain(key: str, specs: Mapping[str, TensorSpec]) -> float:
    """CLIP starts its embeddings at a spread of 0.02, as if no prompt mattered; trained ones have about 1."""
    branches = 2 * sum(name.endswith("mlp.fc2.weight") for name in specs)
    return _first_match(
        key,
        {
            r"token_embedding": 1.0,
            r"position_embedding": 0.3,
            r"self_attn\.out_proj": SELF_GAIN * BRANCH_GAIN / math.sqrt(branches),
            r"mlp\.fc2": AFTER_GELU * BRANCH_GAIN / math.sqrt(branches),
        },
    )


def _unet_gain(key: str, specs: Mapping[str, TensorSpec]) -> float:
    outer = sum(name.endswith(("conv2.weight", "proj_out.weight")) for name in specs)
    transformer = key.partition(".transformer_blocks.")[0] + ".transformer_blocks."
    inner = 3 * sum(name.startswith(transformer) and name.endswith("ff.net.2.weight") for name in specs)
    return _first_match(
        key,
        {
            r"^conv_out": AFTER_SILU * NOISE_STD,
            r"conv1": AFTER_SILU,
            r"conv2": AFTER_SILU * BRANCH_GAIN / math.sqrt(outer),
            r"time_emb_proj": AFTER_SILU * TIME_GAIN,
            r"add_embedding\.linear_2": AFTER_SILU * POOLED_GAIN,
            r"time_embedding\.linear_2": AFTER_SILU,
            r"proj_out": BRANCH_GAIN / math.sqrt(2 * outer),  # its branches have doubled the transformer's variance
            r"attn1\.to_out": SELF_GAIN / math.sqrt(inner or 1),
            r"attn2\.to_out": CROSS_GAIN / math.sqrt(inner or 1),
            r"attn2\.to_k": KEY_GAIN,
            r"ff\.net\.2": AFTER_GELU / math.sqrt(inner or 1),
        },
    )


def _vae_gain(key: str, specs: Mapping[str, TensorSpec]) -> float:
    branches = sum(name.startswith("decoder.") and name.endswith(("conv2.weight", "to_out.0.weight")) for name in specs)
    return _first_match(
        key,
        {
            r"^post_quant_conv": 0.13025,  # latents come divided by the scaling factor
            r"^decoder\.conv_out": AFTER_SILU * IMAGE_STD,
            r"^encoder\.conv_out": AFTER_SILU,
            r"conv1": AFTER_SILU,
            r"conv2": AFTER_SILU / math.sqrt(branches),
            r"to_out": SELF_GAIN / math.sqrt(branches),
        },
    )


def _first_match(key: str, gains: Mapping[str, float]) -> float:
    return next((gain for pattern, gain in gains.items() if re.search(pattern, key)), 1.0)


def _write_part(folder: Path, part: Part, seed: int) -> None:
    folder.mkdir()
    part.save_config(folder)
    shards = _shards(part.specs)
    names = [f"{part.stem}-{index:05d}-of-{len(shards):05d}.safetensors" for index in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = [f"{part.stem}.safetensors"]
    for name, specs in zip(names, shards, strict=True):
        write_safetensors(folder / name, specs, lambda key: _draw(part, key, seed), {"format": "pt"})
    if len(shards) > 1:
        weight_map = {key: name for name, specs in zip(names, shards, strict=True) for key in specs}
        index = {"metadata": {"total_size": part.num_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        _write_json(folder / f"{part.stem}.safetensors.index.json", index)


def _shards(specs: Mapping[str, TensorSpec]) -> list[dict[str, TensorSpec]]:
    shards: list[dict[str, TensorSpec]] = [{}]
    num_bytes = 0
    for key, spec in specs.items():
        if shards[-1] and num_bytes + spec.num_bytes > SHARD_BYTES:
            shards.append({})
            num_bytes = 0
        shards[-1][key] = spec
        num_bytes += spec.num_bytes
    return shards


def _draw(part: Part, key: str, seed: int) -> Iterator[Tensor]:
    """A tensor's numbers in order. Each tensor has a stream of its own, so the order of writing does not matter."""
    spec = part.specs[key]
    mean, std = part.std(key)
    entropy = int.from_bytes(hashlib.sha256(f"{seed}/{part.name}/{key}".encode()).digest(), "big")
    generator = np.random.Generator(np.random.SFC64(entropy))
    left = math.prod(spec.shape)
    while left:
        numbers = generator.standard_normal(min(left, PART_NUMBERS), dtype=np.float32)
        left -= len(numbers)
        yield torch.from_numpy(numbers).mul_(std).add_(mean).to(spec.dtype)


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


# --- command ------------------------------------------------------------------------------------------------------------


@click.command()
@click.argument("kind", type=click.Choice(["sdxl"]))
@click.argument("out", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--seed", default=0, show_default=True)
@click.option("--size", type=click.Choice(SIZES), default="full", show_default=True)
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="fp16", show_default=True)
def main(kind: str, out: Path, seed: int, size: str, dtype: str) -> None:
    """Write a seeded random checkpoint of SDXL's architecture into DIR."""
    try:
        make_sdxl(out, seed=seed, size=size, dtype=dtype, report=lambda line: click.echo(line, err=True))
    except NitroError as exc:
        click.echo(f"error: {exc}", err=True)
        sys.exit(1)
    click.echo(f"{kind} checkpoint in {out}")


if __name__ == "__main__":
    main()

"""Tiny random checkpoints in the diffusers SDXL layout, made on the fly: nothing is downloaded.

The block structure is SDXL's own (three levels, the first without attention, `text_time` conditioning, two text
encoders whose tokenizers pad differently); only widths, depths (1/1/2 for 1/2/10) and the vocabulary are cut.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, LCMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
MAX_LENGTH = 77
WORDS = ("apple", "red", "green", "blue", "cat", "dog", "star", "house", "photo", "of", "on", "the", "and", "with", "heart")
VAE_FACTOR = 8
LOUDER = {"attn2.to_k": 4.0, "attn2.to_out": 8.0, "add_embedding": 2.0}
"""What carries the prompt, against torch's initial weights: with those all 77 tokens weigh the same, most of them
padding, and another prompt gives nearly the same image. (With still sharper attention, float16 errors grow tenfold.)"""


def make_tiny_sdxl(folder: Path, *, seed: int = 0, size_px: int = 64, vae: Literal["kl", "tiny"] = "kl") -> Path:
    """Write a random SDXL-layout checkpoint of about 3 MB into `folder`; equal arguments write equal weights.

    The last convolutions of the UNet and the decoder are scaled so that noise predictions and images have a natural
    spread: images are neither uniform nor saturated, and a wrong timestep, prompt or noise shows.

    Args:
        size_px: the side of its native images, a multiple of 32 (factor 8, three levels).
        vae: "kl" for AutoencoderKL as in SDXL, "tiny" for AutoencoderTiny.
    Returns: `folder`, holding model_index.json, the six parts and run.json (shift 500).
    """
    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        tokenizer = _tokenizer(folder / "tokenizer", pad=EOS)
        tokenizer_2 = _tokenizer(folder / "tokenizer_2", pad="!")
        text_encoder = CLIPTextModel(_text_config(tokenizer, width=32, layers=2)).eval()
        text_encoder_2 = CLIPTextModelWithProjection(_text_config(tokenizer_2, width=48, layers=3)).eval()
        _spread_embeddings(text_encoder)
        _spread_embeddings(text_encoder_2)
        unet = _unet(size_px // VAE_FACTOR)
        autoencoder = _autoencoder_kl(size_px) if vae == "kl" else _autoencoder_tiny()
        StableDiffusionXLPipeline(
            vae=autoencoder,
            text_encoder=text_encoder,
            text_encoder_2=text_encoder_2,
            tokenizer=tokenizer,
            tokenizer_2=tokenizer_2,
            unet=unet,
            scheduler=LCMScheduler(original_inference_steps=4),
            add_watermarker=False,
        ).save_pretrained(folder, safe_serialization=True)
    run = {"name": f"tiny-sdxl-{vae}", "licence": "CC0-1.0", "shifted_timestep": 500}
    (folder / "run.json").write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")
    return folder


def _tokenizer(folder: Path, *, pad: str) -> CLIPTokenizer:
    """A byte-level BPE in CLIP's format (vocab.json + merges.txt) that knows `WORDS` whole and spells all else."""
    folder.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(ByteLevel.alphabet())
    tokens = alphabet + [letter + "</w>" for letter in alphabet]
    merges: list[str] = []
    for word in WORDS:
        pieces = [*word[:-1], word[-1] + "</w>"]
        left = pieces[0]
        for right in pieces[1:]:
            if f"{left} {right}" not in merges:
                merges.append(f"{left} {right}")
                tokens.append(left + right)
            left += right
    vocab = {token: index for index, token in enumerate([*dict.fromkeys(tokens), BOS, EOS])}
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    special = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": pad}
    config = {**special, "tokenizer_class": "CLIPTokenizer", "model_max_length": MAX_LENGTH}
    (folder / "special_tokens_map.json").write_text(json.dumps(special), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    tokenizer: CLIPTokenizer = CLIPTokenizer.from_pretrained(folder)
    return tokenizer


def _text_config(tokenizer: CLIPTokenizer, *, width: int, layers: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 16,
        max_position_embeddings=MAX_LENGTH,
        hidden_act="gelu" if layers == 3 else "quick_gelu",  # SDXL's second encoder differs in this, too
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=2,  # SDXL's configs carry this old value: the pooled token is then the highest id
        pad_token_id=1,
    )


def _spread_embeddings(encoder: nn.Module) -> None:
    """CLIP starts its embeddings at a spread of 0.02, as if no prompt mattered; trained ones have about 1."""
    for name, parameter in encoder.named_parameters():
        if "token_embedding" in name or "position_embedding" in name:
            parameter.mul_((1.0 if "token" in name else 0.3) / parameter.std())


def _unet(sample_size: int) -> UNet2DConditionModel:
    unet = UNet2DConditionModel(
        sample_size=sample_size,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(16, 32, 48),
        layers_per_block=2,
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=(1, 2, 3),  # numbers of heads, by SDXL's naming
        norm_num_groups=8,
        cross_attention_dim=32 + 48,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=16,
        projection_class_embeddings_input_dim=48 + 6 * 16,
    ).eval()
    for name, parameter in unet.named_parameters():
        for part, factor in LOUDER.items():
            if part in name and name.endswith("weight"):
                parameter.mul_(factor)
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 4, sample_size, sample_size, generator=generator)
    words = torch.randn(2, MAX_LENGTH, 80, generator=generator)
    added = {"text_embeds": torch.randn(2, 48, generator=generator), "time_ids": torch.zeros(2, 6)}
    _spread_output(unet.conv_out, unet(latents, 499, words, added_cond_kwargs=added).sample, std=1.0)
    return unet


def _autoencoder_kl(size_px: int) -> AutoencoderKL:
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 16, 16, 16),
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=0.13025,
        sample_size=size_px,
    ).eval()
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2)) / 0.13025
    _spread_output(vae.decoder.conv_out, vae.decode(latents).sample, std=0.4)
    return vae


def _autoencoder_tiny() -> AutoencoderTiny:
    vae = AutoencoderTiny(
        encoder_block_out_channels=(16, 16, 16, 16),
        decoder_block_out_channels=(16, 16, 16, 16),
        num_encoder_blocks=(1, 1, 1, 1),
        num_decoder_blocks=(1, 1, 1, 1),
    ).eval()
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    last_output = (vae.decode(latents).sample + 1) / 2  # the decoder ends with 2 x - 1
    _spread_output(vae.decoder.layers[-1], last_output, std=0.2, mean=0.5)
    return vae


def _spread_output(layer: nn.Conv2d, output: Tensor, *, std: float, mean: float = 0.0) -> None:
    """Scale the last layer so that `output`, which it gave, gets this mean and spread in every channel."""
    assert layer.bias is not None
    scale = std / output.std(dim=(0, 2, 3))
    layer.weight.mul_(scale.view(-1, 1, 1, 1))
    layer.bias.copy_((layer.bias - output.mean(dim=(0, 2, 3))) * scale + mean)

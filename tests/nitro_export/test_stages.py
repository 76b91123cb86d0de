"""The stages, in torch, against diffusers' own code: each alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor

from nitro_export import read_checkpoint
from nitro_export.loading import load_part
from nitro_export.stages import DecodeStage, DenoiseNetwork, DenoiseStage, TextStage, latent_scale_and_shift
from nitro_rt.errors import ExportError
from nitro_rt.schedule import alphas_cumprod_from_config, step_schedule
from oracle import ShiftedLCMScheduler, oracle_pipeline

PROMPTS = ["a red apple", "the blue cat " * 40]


@pytest.fixture(scope="module")
def pipe(tiny_kl: Path) -> StableDiffusionXLPipeline:
    return oracle_pipeline(tiny_kl, 500)


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def _encoders(folder: Path) -> list[Any]:
    return [load_part(read_checkpoint(folder), part) for part in ("text_encoder", "text_encoder_2")]


def test_text_is_encode_prompt(tiny_kl: Path, pipe: StableDiffusionXLPipeline) -> None:
    stage = TextStage(*_encoders(tiny_kl), batch=2, num_tokens=77)
    ids = [
        tokenizer(PROMPTS, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
        for tokenizer in (pipe.tokenizer, pipe.tokenizer_2)
    ]
    embeds, pooled = stage(*ids)
    expected, _, expected_pooled, _ = pipe.encode_prompt(PROMPTS, do_classifier_free_guidance=False)
    # Eager here, fused attention there: the order of summation differs.
    torch.testing.assert_close(embeds, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(pooled, expected_pooled, rtol=1e-4, atol=1e-5)
    assert tuple(embeds.shape) == stage.outputs[0].shape and tuple(pooled.shape) == stage.outputs[1].shape


@pytest.mark.parametrize("shift", [250, 500, 1000])
@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_denoise_is_unet_and_scheduler(tiny_kl: Path, pipe: StableDiffusionXLPipeline, steps: int, shift: int) -> None:
    checkpoint = read_checkpoint(tiny_kl)
    schedule = step_schedule(steps, shift, alphas_cumprod_from_config(checkpoint.scheduler))
    network = DenoiseNetwork(load_part(checkpoint, "unet"))
    stage = DenoiseStage(network, schedule, size_px=64, latent_size=8, batch=2, num_tokens=77)
    scheduler = ShiftedLCMScheduler.shifted(dict(pipe.scheduler.config), shift)
    scheduler.set_timesteps(steps)
    assert tuple(scheduler.timesteps.tolist()) == schedule.shifted_timesteps
    assert tuple(scheduler.original_timesteps.tolist()) == schedule.timesteps
    scheduler.set_begin_index(0)

    draw = torch.Generator().manual_seed(3)
    embeds, pooled = torch.randn(2, 77, 80, generator=draw), torch.randn(2, 48, generator=draw)
    added = {"text_embeds": pooled, "time_ids": torch.tensor([[64, 64, 0, 0, 64, 64]] * 2, dtype=torch.float32)}
    latents = torch.randn(2, 4, 8, 8, generator=draw)
    for index, told in enumerate(scheduler.timesteps):
        before = draw.get_state()
        eps = pipe.unet(latents, told, embeds, added_cond_kwargs=added).sample
        expected = scheduler.step(eps, told, latents, generator=draw).prev_sample
        noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().set_state(before))
        found = stage(latents, embeds, pooled, torch.tensor([index]), noise)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        latents = expected


def test_sizes_reach_the_network(tiny_kl: Path) -> None:
    network = DenoiseNetwork(load_part(read_checkpoint(tiny_kl), "unet"))
    assert not torch.equal(network.size_embedding(64), network.size_embedding(96))
    assert tuple(network.size_embedding(64).shape) == (1, 6 * 16)


@pytest.mark.parametrize("kind", ["kl", "tiny"])
def test_decode_is_the_pipelines_decode(request: pytest.FixtureRequest, kind: str) -> None:
    folder: Path = request.getfixturevalue(f"tiny_{kind}")
    vae = load_part(read_checkpoint(folder), "vae")
    stage = DecodeStage(vae, latent_size=8, size_px=64, batch=2)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    pipe = oracle_pipeline(folder, 500)
    pixels = vae.decode(latents / vae.config.scaling_factor).sample
    expected = np.stack([np.asarray(image) for image in pipe.image_processor.postprocess(pixels, output_type="pil")])
    found = stage(latents)
    assert found.dtype == torch.uint8
    assert np.abs(found.numpy().astype(int) - expected).max() <= 1  # x / s and x * (1 / s) may round apart


def test_scale_and_shift_come_from_the_config() -> None:
    latents = torch.randn(1, 4, 2, 2)

    def decoded(**config: object) -> Tensor:
        scale, shift = latent_scale_and_shift(SimpleNamespace(**config))
        return latents * scale + shift

    torch.testing.assert_close(decoded(scaling_factor=0.5), latents * 2)
    torch.testing.assert_close(decoded(scaling_factor=0.5, shift_factor=0.25), latents * 2 + 0.25)
    mean, std = [1.0, 2.0, 3.0, 4.0], [0.5, 1.0, 1.5, 2.0]
    expected = latents * torch.tensor(std).view(1, 4, 1, 1) / 0.5 + torch.tensor(mean).view(1, 4, 1, 1)
    torch.testing.assert_close(decoded(scaling_factor=0.5, latents_mean=mean, latents_std=std), expected)


@pytest.mark.parametrize("part", ["unet", "text_encoder_2", "vae"])
def test_cut_weights_are_refused(copied: Path, part: str) -> None:
    (path,) = (copied / part).glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ExportError, match=f"{part}.* was cut"):
        load_part(read_checkpoint(copied), part)


@pytest.mark.parametrize("part", ["unet", "text_encoder", "vae"])
@pytest.mark.parametrize("change", ["missing", "extra", "reshaped"])
def test_every_weight_is_accounted_for(copied: Path, part: str, change: str) -> None:
    from safetensors.torch import load_file, save_file

    (path,) = (copied / part).glob("*.safetensors")
    weights = load_file(path)
    name = sorted(name for name in weights if name.endswith("bias"))[0]
    if change == "missing":
        del weights[name]
    elif change == "extra":
        weights["somebody.elses.weight"] = torch.zeros(2)
    else:
        weights[name] = torch.zeros(weights[name].shape[0] + 1)
    save_file(weights, path, metadata={"format": "pt"})
    says = {"missing": "lacks 1 of", "extra": "somebody.elses.weight", "reshaped": "1 tensors have other shapes"}[change]
    with pytest.raises(ExportError, match=f"{part}.*{says}"):
        load_part(read_checkpoint(copied), part)

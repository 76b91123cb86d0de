"""The parent draws what diffusers draws, whatever its weights are stored in, and keeps no wide copy of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from nitro_export import read_checkpoint
from nitro_export.parent import Parent
from nitro_rt.errors import ConfigError, ExportError
from nitro_rt.schedule import alphas_cumprod_from_config, step_schedule
from oracle import oracle_images

PROMPT = "a red apple"


def _parent(folder: Path) -> Parent:
    return Parent(read_checkpoint(folder), size_px=64)


@pytest.mark.parametrize("steps", [1, 3])
def test_it_draws_what_diffusers_draws(tiny_kl: Path, steps: int) -> None:
    parent = _parent(tiny_kl)
    schedule = step_schedule(steps, 500, alphas_cumprod_from_config(parent.checkpoint.scheduler))
    drawing = parent.draw([PROMPT], [7], schedule)
    assert drawing.images_BHWC is not None
    expected = oracle_images(tiny_kl, [PROMPT], seed=7, steps=steps, shift=500)
    # Eager attention here, fused there: a level on the edge may round either way.
    assert np.abs(drawing.images_BHWC.numpy().astype(int) - expected).max() <= 1
    assert [int(step["step_index"]) for step in drawing.steps] == list(range(steps))
    assert parent.draw([PROMPT], [7], schedule, decode=False).images_BHWC is None


def test_weights_stored_in_float16_compute_in_float32(copied: Path) -> None:
    """Rounded weights, wide arithmetic: as if the rounded weights had been stored in float32."""
    schedule = step_schedule(1, 500, alphas_cumprod_from_config(read_checkpoint(copied).scheduler))
    latents = []
    for dtype in (torch.float16, torch.float32):
        for path in copied.glob("*/*.safetensors"):
            save_file({key: value.half().to(dtype) for key, value in load_file(path).items()}, path, metadata={"format": "pt"})
        parent = _parent(copied)
        latents.append(parent.draw([PROMPT], [0], schedule, decode=False).x0_BChw)
        assert {value.dtype for value in parent.network.unet.parameters()} == {dtype}  # nothing wide is left behind
    # Sums are ordered by where a weight lies in memory (3.6e-6 seen); one layer in float16 would be 1e-3 off.
    torch.testing.assert_close(*latents, rtol=1e-4, atol=2e-5)


def test_a_batch_needs_as_many_prompts(tiny_kl: Path) -> None:
    with pytest.raises(ConfigError, match="2 prompts for a batch of 1"):
        _parent(tiny_kl).tokens([PROMPT, PROMPT])


def test_a_damaged_tokenizer_is_named(copied: Path) -> None:
    for path in (copied / "tokenizer").glob("*.json"):
        path.write_text("{")
    (copied / "tokenizer" / "vocab.json").write_text("{")
    with pytest.raises(ExportError, match="tokenizer that cannot be read"):
        _parent(copied).tokens([PROMPT])

"""The discriminator's eyes: ten features of a frozen encoder, and gradients that pass through it but not into it."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import UNet2DConditionModel
from tiny_student import CROP, SIDE, backbone, condition, copies, is_free_of_gradient, latents, same, unet
from torch import Tensor, nn

from nitro_rt.errors import ConfigError
from nitro_training.backbone import UNetFeatures, crop_time_ids
from nitro_training.model import ModelConfig, build_unet, time_ids

SDXL = ModelConfig(text_widths=(768, 1280), channels=(320, 640, 1280), norm_groups=32, heads=(5, 10, 20), time_id_dim=256)
"""SDXL's widths; the depth of its transformers decides no shape."""


def look(eyes: nn.Module, x: Tensor, time: int = 250) -> tuple[Tensor, ...]:
    given = condition(len(x))
    found: tuple[Tensor, ...] = eyes(
        x, torch.full((len(x),), time), given.embeds_BTC, given.pooled_BP, time_ids(len(x), x.shape[-1] * 8)
    )
    return found


@pytest.mark.parametrize("side", [128, 64])
def test_sdxl_gives_ten_features_of_the_known_shapes(side: int) -> None:
    """The table of SDXL's features, at 1024 px and for crops of 512 px; on meta tensors."""
    with torch.device("meta"):
        eyes = UNetFeatures(build_unet(SDXL, 1024))
        found = eyes(
            torch.empty(1, 4, side, side), torch.empty(1), torch.empty(1, 77, 2048), torch.empty(1, 1280), torch.empty(1, 6)
        )
    full, half, quarter = side, side // 2, side // 4
    widths = (320, 320, 320, 320, 640, 640, 640, 1280, 1280, 1280)
    sides = (full, full, full, half, half, half, quarter, quarter, quarter, quarter)
    assert [tuple(feature.shape) for feature in found] == [(1, w, s, s) for w, s in zip(widths, sides, strict=True)]
    assert eyes.channels() == widths and eyes.sides(side) == sides


def test_every_skip_tensor_and_the_middle_are_what_the_whole_unet_computes() -> None:
    """Against the tensors that flow inside diffusers' own forward pass."""
    whole, inside = unet(), []
    hooks = [whole.conv_in.register_forward_hook(lambda module, args, output: inside.append(output))]
    hooks += [block.register_forward_hook(lambda module, args, output: inside.extend(output[1])) for block in whole.down_blocks]
    hooks += [whole.mid_block.register_forward_hook(lambda module, args, output: inside.append(output))]
    x, given = latents(), condition()
    added = {"text_embeds": given.pooled_BP, "time_ids": time_ids(2, SIDE * 8)}
    with torch.no_grad():
        whole(x, torch.tensor([250, 250]), given.embeds_BTC, added_cond_kwargs=added)
    for hook in hooks:
        hook.remove()
    found = look(UNetFeatures(whole), x)
    assert len(found) == len(inside) == 10
    for feature, expected in zip(found, inside, strict=True):
        torch.testing.assert_close(feature, expected)


def test_channels_and_sides_are_those_of_the_features() -> None:
    for side in (SIDE, CROP):
        found = look(backbone(), torch.randn(2, 4, side, side))
        assert backbone().channels() == tuple(feature.shape[1] for feature in found)
        assert backbone().sides(side) == tuple(feature.shape[2] for feature in found)


def test_no_decoder_is_kept_and_the_caller_keeps_its_own() -> None:
    whole = unet()
    num = sum(p.numel() for p in whole.parameters())
    eyes = UNetFeatures(whole)
    assert len(eyes.unet.up_blocks) == 0 and not list(eyes.unet.conv_out.parameters())
    assert sum(p.numel() for p in eyes.parameters()) < 0.7 * num
    assert len(whole.up_blocks) == 3 and isinstance(whole.conv_out, nn.Conv2d)
    assert sum(p.numel() for p in whole.parameters()) == num
    assert not {id(p) for p in eyes.parameters()} & {id(p) for p in whole.parameters()}, "a copy"


def test_the_caller_keeps_its_decoder_when_there_is_no_memory_for_the_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(module: nn.Module) -> nn.Module:
        raise MemoryError

    whole = copy.deepcopy(unet())
    monkeypatch.setattr("nitro_training.backbone.copy.deepcopy", fail)
    with pytest.raises(MemoryError):
        UNetFeatures(whole)
    assert len(whole.up_blocks) == 3 and isinstance(whole.conv_out, nn.Conv2d)


def test_gradients_pass_through_the_backbone_and_not_into_it() -> None:
    eyes = UNetFeatures(unet())
    before, x = copies(eyes), latents().requires_grad_(True)
    for feature in look(eyes, x):
        (gradient,) = torch.autograd.grad(feature.square().mean(), x, retain_graph=True)
        assert gradient.abs().sum() > 0
    look(eyes, x)[-1].square().mean().backward()
    assert is_free_of_gradient(eyes) and not any(p.requires_grad for p in eyes.parameters())
    assert same(before, eyes) and not eyes.unet.training


def test_recomputing_changes_neither_features_nor_gradients() -> None:
    found = []
    for recompute in (False, True):
        x = latents().requires_grad_(True)
        features = look(UNetFeatures(unet(), recompute=recompute), x)
        torch.stack([feature.square().mean() for feature in features]).sum().backward()
        found.append((features, x.grad))
    for plain, recomputed in zip(found[0][0], found[1][0], strict=True):
        assert torch.equal(plain, recomputed)
    torch.testing.assert_close(found[0][1], found[1][1])


def test_the_noise_level_the_prompt_and_the_size_are_seen() -> None:
    x, given, ids = latents(), condition(), time_ids(2, SIDE * 8)
    times = torch.tensor([250, 250])
    seen = backbone()(x, times, given.embeds_BTC, given.pooled_BP, ids)[-1]
    for changed in (
        backbone()(x, times + 250, given.embeds_BTC, given.pooled_BP, ids),
        backbone()(x, times, 1 + given.embeds_BTC.flip(0), given.pooled_BP, ids),
        backbone()(x, times, given.embeds_BTC, 1 + given.pooled_BP, ids),
        backbone()(x, times, given.embeds_BTC, given.pooled_BP, 2 * ids),
    ):
        assert (changed[-1] - seen).abs().max() > 1e-5


def test_the_size_conditioning_of_a_crop_is_the_picture_the_offset_and_the_window() -> None:
    """SDXL's order is height before width, and the offset from the top before that from the left."""
    found = crop_time_ids(128, torch.tensor([[0, 64], [8, 3]]), 64)
    assert found.tolist() == [[1024, 1024, 0, 512, 512, 512], [1024, 1024, 64, 24, 512, 512]]


def test_latents_that_cannot_be_halved_are_refused() -> None:
    with pytest.raises(ConfigError, match="side 18 cannot be halved 2 times"):
        backbone().sides(18)


def test_a_unet_that_is_not_conditioned_as_sdxls_is_refused() -> None:
    other = UNet2DConditionModel(
        block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=8, cross_attention_dim=8,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    with pytest.raises(ConfigError, match="text_time"):
        UNetFeatures(other)

"""Folded doublings: the same picture as diffusers' own decoder, with fewer multiplications."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import diffusers
import onnx
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from nitro_export.checkpoint import read_checkpoint
from nitro_export.export import export_checkpoint
from nitro_export.loading import empty_part_of_graph, fill
from nitro_export.parent import Parent
from nitro_export.stored import stored_tensors
from nitro_export.subpixel import SubpixelConv2d, fold_doublings, folded_bias, folded_weight


def _doubled(conv: nn.Conv2d, image: Tensor) -> Tensor:
    return conv(nn.functional.interpolate(image, scale_factor=2.0, mode="nearest"))


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 5), (7, 4)])
def test_the_folded_convolution_is_that_of_the_doubled_image(height: int, width: int) -> None:
    generator = torch.Generator().manual_seed(height)
    conv = nn.Conv2d(3, 5, 3, padding=1).requires_grad_(False).double()
    image = torch.randn(2, 3, height, width, generator=generator, dtype=torch.float64)
    folded = SubpixelConv2d(conv).requires_grad_(False)
    assert conv.bias is not None and folded.bias is not None
    folded.weight.copy_(folded_weight(conv.weight))
    folded.bias.copy_(folded_bias(conv.bias))
    found, expected = folded(image), _doubled(conv, image)
    assert found.shape == expected.shape == (2, 5, 2 * height, 2 * width)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)  # the folding is in float32


@pytest.mark.parametrize("kind", ["kl", "tiny"])
def test_a_decoder_keeps_its_picture(request: pytest.FixtureRequest, kind: str) -> None:
    checkpoint: Path = request.getfixturevalue(f"tiny_{kind}")
    name = {"kl": "AutoencoderKL", "tiny": "AutoencoderTiny"}[kind]
    original: Any = getattr(diffusers, name).from_pretrained(checkpoint / "vae").eval()
    folded, stored = empty_part_of_graph(read_checkpoint(checkpoint), "vae")
    fill(folded, stored, torch.float32)
    assert sum(isinstance(module, SubpixelConv2d) for module in folded.modules()) == 3
    latents = torch.randn(2, 4, 6, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found, expected = folded.decode(latents).sample, original.decode(latents).sample
    assert expected.std() > 0.05
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_parent_draws_with_the_original_and_is_looked_at_folded(tiny_kl: Path) -> None:
    parent = Parent(read_checkpoint(tiny_kl), size_px=64)
    original, folded = parent.decode_stage, parent.folded_decode_stage
    assert [sum(isinstance(m, SubpixelConv2d) for m in stage.modules()) for stage in (original, folded)] == [0, 3]
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(folded.levels(latents), original.levels(latents), rtol=1e-4, atol=1e-2)  # of 255


def _file(folder: Path, network: nn.Module) -> Path:
    save_file(network.state_dict(), folder / "weights.safetensors")
    return folder / "weights.safetensors"


@pytest.mark.parametrize(
    "layers",
    [
        (nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(4, 4, 3, padding=1)),
        (nn.Upsample(scale_factor=3), nn.Conv2d(4, 4, 3, padding=1)),
        (nn.Upsample(scale_factor=2), nn.Conv2d(4, 4, 3)),
        (nn.Upsample(scale_factor=2), nn.Conv2d(4, 4, 3, padding=1, groups=2)),
        (nn.Upsample(scale_factor=2), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1)),
        (nn.Conv2d(4, 4, 3, padding=1), nn.Upsample(scale_factor=2)),
    ],
    ids=["bilinear", "threefold", "unpadded", "grouped", "not next to it", "before it"],
)
def test_what_is_no_doubling_with_a_3x3_convolution_stays(tmp_path: Path, layers: tuple[nn.Module, ...]) -> None:
    network = nn.Sequential(*layers).requires_grad_(False)
    stored = stored_tensors([_file(tmp_path, network)])
    image = torch.randn(1, 4, 4, 4)
    before = network(image)
    assert fold_doublings(network, stored) == stored
    assert not any(isinstance(module, SubpixelConv2d) for module in network)
    torch.testing.assert_close(network(image), before, rtol=0, atol=0)


def test_the_graph_has_no_doubled_image_and_a_file_for_what_is_folded(tiny_kl: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    manifest = export_checkpoint(tiny_kl, tmp_path / "graphs", steps=(1,), report=lines.append)
    model = onnx.load(tmp_path / "graphs" / "decode.onnx", load_external_data=False)
    kinds = Counter(node.op_type for node in model.graph.node)
    assert kinds["DepthToSpace"] == 3 and not kinds["Resize"] and not kinds["Upsample"]
    suffixes = Counter(Path(file.path).suffix for file in manifest.decode.files)
    assert suffixes == {".onnx": 1, ".safetensors": 1, ".data": 1}
    assert any("1 written; 6 tensors folded" in line for line in lines)

"""Child process of `export`: what a user of torch would write, `torch.onnx.export` of the loaded module.

Prints one line of JSON; the request is the JSON in its argument.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn

from nitro_bench._export_meter import Meter, disk_usage

DTYPES = {"fp16": torch.float16, "fp32": torch.float32}


class PlainUNet(nn.Module):
    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, sample: Tensor, timestep: Tensor, embeds: Tensor, text_embeds: Tensor, time_ids: Tensor) -> Tensor:
        added = {"text_embeds": text_embeds, "time_ids": time_ids}
        return self.unet(sample, timestep, embeds, added_cond_kwargs=added, return_dict=False)[0]


class PlainDecoder(nn.Module):
    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latents: Tensor) -> Tensor:
        return self.vae.decode(latents, return_dict=False)[0]


def unet(folder: Path, dtype: torch.dtype, side: int) -> tuple[nn.Module, tuple[Tensor, ...]]:
    module: Any = UNet2DConditionModel.from_pretrained(folder, dtype=dtype)
    config = module.config
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    example = (
        torch.randn(1, 4, side, side, dtype=dtype),
        torch.tensor(249),
        torch.randn(1, 77, config.cross_attention_dim, dtype=dtype),
        torch.randn(1, pooled, dtype=dtype),
        torch.zeros(1, 6, dtype=dtype),
    )
    return PlainUNet(module).eval(), example


def decoder(folder: Path, dtype: torch.dtype, side: int) -> tuple[nn.Module, tuple[Tensor, ...]]:
    module: Any = AutoencoderKL.from_pretrained(folder, dtype=dtype)
    return PlainDecoder(module).eval(), (torch.randn(1, 4, side, side, dtype=dtype),)


def accepted(path: Path) -> str:
    """What ONNX Runtime says to the graph: "" or its complaint."""
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 4
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
    except Exception as exc:  # its errors share no class
        return str(exc).strip().splitlines()[0][:300]
    return ""


def main() -> None:
    request = json.loads(sys.argv[1])
    meter = Meter()
    checkpoint, out = Path(request["checkpoint"]), Path(request["out"])
    out.mkdir(parents=True, exist_ok=True)
    make, part = {"unet": (unet, "unet"), "decode": (decoder, "vae")}[request["part"]]
    module, example = make(checkpoint / part, DTYPES[request["precision"]], request["size_px"] // 8)
    meter.mark("load")
    torch.onnx.export(module, example, str(out / "model.onnx"), dynamo=True, external_data=True, verbose=False)
    meter.mark("export")
    summary = meter.summary() | disk_usage(out)
    print(json.dumps(summary | {"refused_by_onnxruntime": accepted(out / "model.onnx")}))


if __name__ == "__main__":
    main()

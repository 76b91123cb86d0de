"""optimum-intel's OVStableDiffusionXLPipeline: diffusers' pipeline around OpenVINO models, compiled for one size and batch.

Unlike OpenVINO GenAI it takes any scheduler of diffusers, so it draws the same pictures with any number of steps. Options: as
of `openvino_genai_pipeline`.
"""

from __future__ import annotations

from importlib import metadata
from typing import Any

from nitro_bench.peers.openvino_common import compute_dtype, export, properties
from nitro_bench.peers.pipeline import PipelineAdapter


class Adapter(PipelineAdapter):
    def import_libraries(self) -> dict[str, str]:
        import openvino  # noqa: F401  what is timed
        from optimum.intel import OVStableDiffusionXLPipeline  # type: ignore[import-not-found]  # noqa: F401

        names = ("optimum-intel", "openvino", "diffusers", "torch", "transformers")
        return {name: metadata.version(name) for name in names}

    def load(self, request: dict[str, Any]) -> dict[str, Any]:
        import torch
        from optimum.intel import OVStableDiffusionXLPipeline

        options, size = request["options"], request["size_px"]
        ov_config = {name: str(value) for name, value in properties(options).items()}
        made = export(request)
        if "threads" in options:
            torch.set_num_threads(int(options["threads"]))
        pipe: Any = OVStableDiffusionXLPipeline.from_pretrained(made.folder, device="CPU", ov_config=ov_config, compile=False)
        pipe.reshape(batch_size=request["batch"], height=size, width=size, num_images_per_prompt=1)
        for part in (pipe.text_encoder, pipe.text_encoder_2, pipe.unet, pipe.vae_decoder):
            fix_batch(part.model, request["batch"])
        pipe.compile()
        self.adopt(pipe, request, torch.float32)
        return {"compute_dtype": compute_dtype(options), "notes": [made.note]}


def fix_batch(model: Any, batch: int) -> None:
    """Make every input's batch `batch`: optimum-intel's `reshape` doubles the UNet's, as if guidance were on."""
    shapes = {}
    for port in model.inputs:
        shape = port.get_partial_shape()
        if shape.rank.get_length() > 1:  # the timestep has no batch
            shape[0] = batch
        shapes[port] = shape
    model.reshape(shapes)

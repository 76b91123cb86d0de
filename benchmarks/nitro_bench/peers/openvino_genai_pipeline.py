"""OpenVINO GenAI's Text2ImagePipeline: the whole pipeline in C++, on a folder that optimum-intel exported.

Options: `precision` (the compiled networks': f32, bf16), `weights` (stored: fp16, fp32, int8; left out: the checkpoint's own
type), `models` (the folder that keeps conversions), `export_python`, `export_pins` (the environment that converts), `threads`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from nitro_bench.peers.adapter import CannotRun
from nitro_bench.peers.genai_schedule import DIFFERS, scheduler_config
from nitro_bench.peers.openvino_common import compute_dtype, export, properties


class Adapter:
    thread_safe = False  # a generate call works on its pipeline's scheduler and requests

    def import_libraries(self) -> dict[str, str]:
        import numpy  # noqa: F401  what is timed
        import openvino_genai  # type: ignore[import-not-found]  # noqa: F401

        return {name: metadata.version(name) for name in ("openvino-genai", "openvino", "openvino-tokenizers")}

    def load(self, request: dict[str, Any]) -> dict[str, Any]:
        import openvino_genai

        options, size = request["options"], request["size_px"]
        compiled_with = properties(options)
        made = export(request)
        self._work, self._shift, self._batch = Path(request["work"]), request["shift"], request["batch"]
        self._config = json.loads((Path(request["model"]) / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
        pipe = openvino_genai.Text2ImagePipeline(made.folder)
        pipe.reshape(self._batch, size, size, 0.0)  # guidance 0: the UNet batch is the image batch
        pipe.compile("CPU", **compiled_with)
        self._pipe = pipe
        facts: dict[str, Any] = {"compute_dtype": compute_dtype(options), "notes": [made.note]}
        return facts | ({"differs": DIFFERS} if max(request["steps"]) > 1 else {})

    def prepare(self, drawing: dict[str, Any]) -> Callable[[], Any]:
        import numpy as np
        import openvino
        import openvino_genai

        prompts, steps, size = drawing["prompts"], drawing["steps"], drawing["size_px"]
        if len(prompts) != self._batch:
            raise CannotRun(f"was loaded for {self._batch} images per call, and got {len(prompts)} prompts")
        if len(set(prompts)) > 1:
            raise CannotRun("draws several images of one prompt per call, and got different prompts")
        noise_NBCHW = np.load(drawing["noise"])
        path = self._work / f"scheduler_config_{steps}.json"
        path.write_text(json.dumps(scheduler_config(self._config, self._shift, steps)), encoding="utf-8")
        self._pipe.set_scheduler(openvino_genai.Scheduler.from_config(path, openvino_genai.Scheduler.Type.LCM))

        class GivenNoise(openvino_genai.Generator):
            """Hands out the benchmark's noise: the latents, then what each step but the last mixes in."""

            def __init__(self) -> None:
                super().__init__()
                self._draws = iter(noise_NBCHW)

            def randn_tensor(self, shape: Any) -> Any:
                return openvino.Tensor(np.array(next(self._draws)).reshape(list(shape)))

        def draw() -> Any:
            images = self._pipe.generate(
                prompts[0],
                num_images_per_prompt=self._batch,
                num_inference_steps=steps,
                guidance_scale=0.0,
                height=size,
                width=size,
                generator=GivenNoise(),
            )
            return np.array(images.data)

        return draw

    def timings_ms(self) -> dict[str, float]:
        found = self._pipe.get_performance_metrics()
        return {
            "text": sum(found.get_text_encoder_infer_duration().values()),
            "denoise": sum(duration for duration in found.raw_metrics.unet_inference_durations) / 1e3,
            "decode": found.get_vae_decoder_infer_duration(),
        }

    def device_peak_bytes(self) -> int | None:
        return None

    def close(self) -> None:
        del self._pipe

"""Child process of `lean`: the first image of a bundle with nitro_rt, or of its checkpoint with diffusers.

Run as a script by the interpreter of the environment that is measured, with the request as JSON in its argument; prints one
line of JSON. It imports only what is installed there, and each side only its own.
"""

import json
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

Draw = Callable[[], Any]
"""Draws the request's image, a PIL image."""


def load_nitro_rt(request: dict[str, Any]) -> tuple[dict[str, Any], Draw]:
    start_s = time.perf_counter()
    import nitro_rt  # noqa: F401  what is timed

    import_ms = 1e3 * (time.perf_counter() - start_s)
    from nitro_rt import Pipeline

    facts: dict[str, Any] = {"import_ms": import_ms, "import_pipeline_ms": 1e3 * (time.perf_counter() - start_s)}
    pipe = Pipeline.load(request["bundle"])
    facts |= {"version": metadata.version("nitro-rt")}

    def draw() -> Any:
        return pipe(request["prompt"], seed=request["seed"], steps=request["steps"]).images[0]

    return facts, draw


def load_diffusers(request: dict[str, Any]) -> tuple[dict[str, Any], Draw]:
    start_s = time.perf_counter()
    import diffusers  # noqa: F401  what is timed

    import_ms = 1e3 * (time.perf_counter() - start_s)
    from diffusers import StableDiffusionXLPipeline

    facts: dict[str, Any] = {"import_ms": import_ms, "import_pipeline_ms": 1e3 * (time.perf_counter() - start_s)}
    import torch

    pipe: Any = StableDiffusionXLPipeline.from_pretrained(request["checkpoint"], dtype=torch.float32, add_watermarker=False)
    pipe.scheduler = shifted_scheduler(pipe.scheduler.config, request["shift"])
    pipe.set_progress_bar_config(disable=True)
    size = request["size_px"]

    def draw() -> Any:
        generator = torch.Generator().manual_seed(request["seed"])
        return pipe(
            request["prompt"],
            num_inference_steps=request["steps"],
            guidance_scale=0.0,
            generator=generator,
            height=size,
            width=size,
        ).images[0]

    return facts | {"version": metadata.version("diffusers")}, draw


def shifted_scheduler(config: Any, shift: int) -> Any:
    """What a user of diffusers has to write: LCM that tells the network t' = floor(t * shift / T).

    Fresh noise is mixed in at the original next time. Source: reference scheduler of github.com/ChenDarYen/NitroFusion.
    """
    from diffusers import LCMScheduler

    class ShiftedLCM(LCMScheduler):
        timesteps: Any

        def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
            super().set_timesteps(*args, **kwargs)
            self.original = self.timesteps
            self.timesteps = self.timesteps * shift // self.config.num_train_timesteps

        # A pipeline hands its generator only to a step that names one; fresh noise would come from torch's global one.
        def step(self, noise: Any, timestep: Any, sample: Any, generator: Any = None, return_dict: bool = True) -> Any:
            if self.step_index is None:
                self._init_step_index(timestep)
            told, self.timesteps = self.timesteps, self.original
            result = super().step(noise, timestep, sample, generator=generator, return_dict=return_dict)
            self.timesteps = told
            return result

    return ShiftedLCM.from_config(config, original_inference_steps=4)


def peak_rss_bytes() -> int:
    # VmHWM and not getrusage: ru_maxrss of a child starts at what its parent had when it forked.
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM")


def main() -> None:
    request = json.loads(sys.argv[1])
    facts, draw = {"nitro_rt": load_nitro_rt, "diffusers": load_diffusers}[request["side"]](request)
    image = draw()
    # CLOCK_MONOTONIC, so the parent may subtract the moment at which it started this process.
    facts |= {"first_image_at_s": time.perf_counter(), "first_image_cpu_s": time.process_time()}
    facts |= {"peak_rss_bytes": peak_rss_bytes(), "image_ms": []}
    for _ in range(request["num_more_images"]):
        start_s = time.perf_counter()
        draw()
        facts["image_ms"].append(1e3 * (time.perf_counter() - start_s))
    image.save(request["png"])
    print(json.dumps(facts | {"modules": sorted({name.partition(".")[0] for name in sys.modules})}))


if __name__ == "__main__":
    main()

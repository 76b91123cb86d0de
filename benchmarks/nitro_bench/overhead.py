"""What one image costs beside the engines: a device bundle on a GPU that does nothing, and diffusers with empty networks.

    python -m nitro_bench.overhead BUNDLE --checkpoint DIR [--images 2000] [--json FILE]

BUNDLE is of tensorrt or tensorrt-rtx engines and DIR its checkpoint. No GPU is used: `nitro_bench.null_device` stands in
its place and answers at once, so what is timed is Python, binding, the copies to and from pinned memory, and the queue.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nitro_bench._draw import shifted_scheduler
from nitro_bench.machine import commit, machine
from nitro_bench.null_device import null_modules
from nitro_rt.bundle import Bundle, open_bundle
from nitro_rt.device_executor import DeviceExecutor
from nitro_rt.errors import ConfigError
from nitro_rt.executor import DEVICE_BACKENDS, DeviceOptions
from nitro_rt.pipeline import Pipeline

PROMPT = "a red apple"
ROUNDS = 10
CALLER_PARTS = ("tokenize", "noise")
"""Of a call's timings: done in the calling thread while the engines draw for others."""


@dataclass(frozen=True, kw_only=True)
class Overhead:
    """Microseconds per image, medians, beside the engines; all sides in turns in one process."""

    steps: int
    size_px: int
    batch: int
    executor_us: float
    """`DeviceExecutor.draw`: pinned buffers, events, replay, the copy of the picture."""
    pipeline_us: float
    """`pipe(...)` without its tokenising and noise: the executor, the queue there and back, the result."""
    tokenize_us: float
    noise_us: float
    diffusers_us: float | None
    """`StableDiffusionXLPipeline` with empty text encoders, UNet and VAE, tokenising and noise counted; None where no
    checkpoint was given."""
    growth_bytes: int
    """Traced memory after all images less before, of the executor."""
    num_images: int


def measure(bundle: Bundle, checkpoint: Path | None, num_images: int) -> Overhead:
    """Raises: ConfigError if the bundle is not of device engines, or diffusers cannot load the checkpoint."""
    if bundle.backend not in DEVICE_BACKENDS:
        raise ConfigError(f"{bundle.folder} runs on {bundle.backend}; give a bundle of {' or '.join(DEVICE_BACKENDS)} engines")
    steps, size_px = bundle.built_steps[0], bundle.manifest.sizes_px[0]
    per_round = max(1, num_images // ROUNDS)
    draw, close = _executor(bundle, steps, size_px)
    diffusers = _diffusers(checkpoint, bundle, steps, size_px) if checkpoint else None
    executor_us, pipeline_us, tokenize_us, noise_us, diffusers_us = [], [], [], [], []
    with Pipeline.of(bundle, open_executor=lambda: _opened(bundle)) as pipe:
        for _ in range(ROUNDS):
            executor_us += _times_us(draw, per_round)
            for total_us, parts_ms in _calls_us(pipe, steps, per_round):
                pipeline_us.append(total_us - 1e3 * sum(parts_ms[part] for part in CALLER_PARTS))
                tokenize_us.append(1e3 * parts_ms["tokenize"])
                noise_us.append(1e3 * parts_ms["noise"])
            if diffusers:
                diffusers_us += _times_us(diffusers, max(1, per_round // 20))
    growth = _growth_bytes(draw, num_images)
    close()
    return Overhead(
        steps=steps,
        size_px=size_px,
        batch=bundle.manifest.batch,
        executor_us=statistics.median(executor_us),
        pipeline_us=statistics.median(pipeline_us),
        tokenize_us=statistics.median(tokenize_us),
        noise_us=statistics.median(noise_us),
        diffusers_us=statistics.median(diffusers_us) if diffusers_us else None,
        growth_bytes=growth,
        num_images=num_images,
    )


def _opened(bundle: Bundle) -> DeviceExecutor:
    return DeviceExecutor(bundle, DeviceOptions(runtime_cache=False), null_modules(bundle))


def _executor(bundle: Bundle, steps: int, size_px: int) -> tuple[Callable[[], object], Callable[[], None]]:
    executor = _opened(bundle)
    executor.prepare(steps, size_px)
    ids_BT = np.zeros(bundle.manifest.text.inputs[0].shape, np.int64)
    noise_NBCHW = np.zeros((steps, bundle.manifest.batch, *bundle.latent_CHW_at(size_px)), np.float32)
    return lambda: executor.draw(steps, size_px, ids_BT, ids_BT, noise_NBCHW), executor.close


def _times_us(call: Callable[[], object], count: int) -> list[float]:
    times = []
    for _ in range(count):
        start = time.perf_counter_ns()
        call()
        times.append((time.perf_counter_ns() - start) / 1e3)
    return times


def _calls_us(pipe: Pipeline, steps: int, count: int) -> list[tuple[float, dict[str, float]]]:
    calls = []
    for seed in range(count):
        start = time.perf_counter_ns()
        result = pipe(PROMPT, seed=seed, steps=steps)
        calls.append(((time.perf_counter_ns() - start) / 1e3, result.timings_ms))
    return calls


def _growth_bytes(draw: Callable[[], object], count: int) -> int:
    """What stays allocated of `count` images, by Python's and NumPy's own account."""
    draw()
    gc.collect()
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        for _ in range(count):
            draw()
        gc.collect()
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return after - before


def _diffusers(checkpoint: Path, bundle: Bundle, steps: int, size_px: int) -> Callable[[], object]:
    """diffusers' own pipeline over networks that give zeros at once."""
    import torch
    from diffusers import StableDiffusionXLPipeline
    from transformers.models.clip.modeling_clip import CLIPTextModelOutput

    try:
        pipe: Any = StableDiffusionXLPipeline.from_pretrained(str(checkpoint), dtype=torch.float32, add_watermarker=False)
    except (OSError, ValueError) as exc:
        raise ConfigError(f"--checkpoint {checkpoint}: diffusers cannot load it: {' '.join(str(exc).split())}") from exc
    pipe.scheduler = shifted_scheduler(pipe.scheduler.config, bundle.manifest.schedule.shift)
    pipe.set_progress_bar_config(disable=True)
    pipe.safety_checker = None
    embeds_spec, pooled_spec = bundle.manifest.text.outputs
    first = pipe.text_encoder.config.hidden_size
    for encoder, width in ((pipe.text_encoder, first), (pipe.text_encoder_2, embeds_spec.shape[-1] - first)):
        state = torch.zeros(1, embeds_spec.shape[1], width)
        pooled = torch.zeros(1, pooled_spec.shape[-1])
        output = CLIPTextModelOutput(text_embeds=pooled, last_hidden_state=state, hidden_states=(state, state, state))
        encoder.forward = lambda *args, output=output, **kwargs: output
    eps = torch.zeros(1, *bundle.latent_CHW_at(size_px))
    pipe.unet.forward = lambda *args, **kwargs: (eps,)
    picture = torch.zeros(1, 3, size_px, size_px)
    pipe.vae.decode = lambda *args, **kwargs: (picture,)

    def draw() -> object:
        generator = torch.Generator().manual_seed(0)
        options = {"num_inference_steps": steps, "guidance_scale": 0.0, "height": size_px, "width": size_px}
        return pipe(PROMPT, generator=generator, output_type="np", **options).images

    draw()
    return draw


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m nitro_bench.overhead", description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--checkpoint", type=Path, help="the bundle's checkpoint, for diffusers; left out, it is not timed")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    found = measure(open_bundle(options.bundle), options.checkpoint, options.images)
    content = {"overhead": asdict(found), "machine": machine(), "commit": commit()}
    if options.json:
        options.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(content, indent=2))


if __name__ == "__main__":
    main()

"""diffusers' StableDiffusionXLPipeline in torch: eager, or with its UNet and decoder compiled by Inductor or Torch-TensorRT.

Options: `dtype` (float32, bfloat16, float16), `device` (cpu, cuda), `compile` (inductor, torch_tensorrt), `models` (the folder
that keeps compiled kernels), `threads`.
"""

from __future__ import annotations

import os
import shutil
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from nitro_bench.peers.adapter import CannotRun
from nitro_bench.peers.pipeline import PipelineAdapter

COMPILERS = ("inductor", "torch_tensorrt")


class Adapter(PipelineAdapter):
    def import_libraries(self) -> dict[str, str]:
        import torch  # noqa: F401  what is timed
        from diffusers import StableDiffusionXLPipeline  # noqa: F401

        return {name: metadata.version(name) for name in ("diffusers", "torch", "transformers")}

    def load(self, request: dict[str, Any]) -> dict[str, Any]:
        import torch
        from diffusers import StableDiffusionXLPipeline

        options = request["options"]
        device, compiler = options.get("device", "cpu"), options.get("compile")
        require_device(device)
        if "threads" in options:
            torch.set_num_threads(int(options["threads"]))
        dtype = getattr(torch, options.get("dtype", "float32"))
        pipe: Any = StableDiffusionXLPipeline.from_pretrained(request["model"], dtype=dtype, add_watermarker=False)
        pipe = pipe.to(device)
        # What diffusers' page on speed tells: convolutions work on channels last, and fused projections save small matmuls.
        for module in (pipe.unet, pipe.vae):
            module.to(memory_format=torch.channels_last)
        self._device = device
        if compiler is None:
            self.adopt(pipe, request, dtype, device)
            return {"compute_dtype": options.get("dtype", "float32"), "notes": notes(device)}

        compile_parts(pipe, compiler, Path(options["models"]))
        self.adopt(pipe, request, dtype, device)
        start_s = time.perf_counter()
        self._compile_by_drawing(request)
        capture_ms = 1e3 * (time.perf_counter() - start_s)
        return {"compute_dtype": options.get("dtype", "float32"), "notes": notes(device), "capture_ms": capture_ms}

    def _compile_by_drawing(self, request: dict[str, Any]) -> None:
        """torch.compile works at the first call. Every step count gives the networks the same shapes, so one image will do."""
        import torch

        unet, vae = self._pipe.unet.config, self._pipe.vae.config
        side = request["size_px"] // 2 ** (len(vae.block_out_channels) - 1)
        latents = torch.zeros(1, request["batch"], unet.in_channels, side, side, **self._noise_as)
        self._pipe.scheduler.noise = latents
        size = request["size_px"]
        prompts = ["a photo"] * request["batch"]
        self._pipe(prompts, latents=latents[0], num_inference_steps=1, guidance_scale=0.0, height=size, width=size)

    def device_peak_bytes(self) -> int | None:
        if self._device == "cpu":
            return None
        import torch

        # What torch has taken from the driver at most. TensorRT's own allocations and the CUDA context are not in it.
        return int(torch.cuda.max_memory_reserved())


def require_device(device: str) -> None:
    """Raises: CannotRun if torch finds no such device."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        build = (
            f"torch {torch.__version__} for CUDA {torch.version.cuda}" if torch.version.cuda else f"torch {torch.__version__}"
        )
        raise CannotRun(f"needs an NVIDIA GPU and its driver, and {build} finds none")


def compile_parts(pipe: Any, compiler: str, models: Path) -> None:
    """Have the UNet and the decoder compiled at their first call, whole, for the shapes that they then get."""
    import torch

    if compiler not in COMPILERS:
        raise CannotRun(f"no compiler {compiler!r}; there are {', '.join(COMPILERS)}")
    options: dict[str, Any] | None = None
    if compiler == "torch_tensorrt":
        try:
            import torch_tensorrt  # type: ignore[import-not-found]  # noqa: F401  registers the backend
        except ImportError as exc:
            raise CannotRun(f"torch_tensorrt does not import: {exc}") from exc
        # Types as in the checkpoint (strong typing), no node left to torch where TensorRT can take it.
        options = {"min_block_size": 1, "truncate_double": True}
    elif shutil.which(os.environ.get("CXX", "g++")) is None:
        raise CannotRun("torch.compile needs a C++ compiler, and there is no g++ on the path; name one in CXX")
    # A second process finds the kernels of the first, as a user's second start does. They are kept by their contents.
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(models / "inductor")
    how: dict[str, Any] = {"backend": compiler, "options": options, "dynamic": False, "fullgraph": compiler == "inductor"}
    pipe.unet.forward = torch.compile(pipe.unet.forward, **how)
    pipe.vae.decode = torch.compile(pipe.vae.decode, **how)


def notes(device: str) -> list[str]:
    import torch

    num_threads = torch.get_num_threads()
    threads = "1 thread" if num_threads == 1 else f"{num_threads} threads"
    return [f"{torch.cuda.get_device_name() if device == 'cuda' else threads}; UNet and decoder channels last"]

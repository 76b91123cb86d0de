"""optimum-onnx's ORTStableDiffusionXLPipeline: diffusers' pipeline around ONNX Runtime sessions.

Options: `provider` (CPUExecutionProvider, CUDAExecutionProvider, TensorrtExecutionProvider), `dtype` of the export (float32,
float16), `models` (the folder that keeps conversions), `pins`, `threads`.
"""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from nitro_bench.peers.adapter import CannotRun
from nitro_bench.peers.conversion import converted
from nitro_bench.peers.pipeline import PipelineAdapter

EXPORT = Path(__file__).resolve().parents[1] / "_export_optimum.py"
SHORT = {"float32": "fp32", "float16": "fp16"}
"""torch's name of a type -> optimum's."""
CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"
DISTRIBUTIONS = ("onnxruntime", "onnxruntime-gpu")


class Adapter(PipelineAdapter):
    def import_libraries(self) -> dict[str, str]:
        import onnxruntime  # noqa: F401  what is timed
        from optimum.onnxruntime import ORTStableDiffusionXLPipeline  # type: ignore[import-not-found]  # noqa: F401

        installed = {found.metadata["Name"].lower() for found in metadata.distributions()}
        names = ("optimum-onnx", *(name for name in DISTRIBUTIONS if name in installed), "diffusers", "torch", "transformers")
        return {name: metadata.version(name) for name in names}

    def load(self, request: dict[str, Any]) -> dict[str, Any]:
        import onnxruntime
        import torch
        from optimum.onnxruntime import ORTStableDiffusionXLPipeline

        options = request["options"]
        provider, dtype = options.get("provider", CPU), options.get("dtype", "float32")
        if provider not in onnxruntime.get_available_providers():
            built = ", ".join(onnxruntime.get_available_providers())
            raise CannotRun(f"this onnxruntime {onnxruntime.__version__} has no {provider}; it has {built}")
        on_gpu = provider != CPU
        if on_gpu and not torch.cuda.is_available():
            raise CannotRun(f"{provider} needs an NVIDIA GPU and its driver, and torch {torch.__version__} finds none")

        class LatentConsistencyModelXL(ORTStableDiffusionXLPipeline):
            """Only a name. With IO binding, optimum-onnx lets the UNet write its output over its input, unless the class is
            called so; a scheduler that needs both, like this one, would compute with the wrong latents."""

        made = converted(
            Path(options["models"]),
            Path(sys.executable),
            EXPORT,
            Path(request["model"]),
            {"dtype": SHORT[dtype]},
            Path(options["pins"]),
        )
        settings = onnxruntime.SessionOptions()
        settings.log_severity_level = 3
        if "threads" in options:
            settings.intra_op_num_threads = int(options["threads"])
            torch.set_num_threads(int(options["threads"]))
        # TensorRT leaves what it cannot take to CUDA; that is what ONNX Runtime tells its users to do.
        providers = [TENSORRT, CUDA] if provider == TENSORRT else [provider]
        pipe: Any = LatentConsistencyModelXL.from_pretrained(
            made.folder,
            export=False,
            providers=providers,
            provider_options=[provider_options(name, Path(request["work"]), dtype) for name in providers],
            session_options=settings,
        )
        for name in ("text_encoder", "text_encoder_2", "unet", "vae_decoder"):
            require_provider(getattr(pipe, name).session.get_providers(), provider, name)
        self.adopt(pipe, request, getattr(torch, dtype), "cuda" if on_gpu else "cpu")
        threads = "" if on_gpu else f"{options.get('threads', 'as many threads as physical cores')}; "
        return {"compute_dtype": dtype, "notes": [f"{threads}dynamic shapes, as optimum exports", made.note]}


def provider_options(provider: str, work: Path, dtype: str) -> dict[str, str]:
    """What a user sets: TensorRT's engines are kept, and may compute in the graph's own float16."""
    if provider != TENSORRT:
        return {}
    folder = work / "tensorrt"
    folder.mkdir(exist_ok=True)
    kept = {"trt_engine_cache_enable": "1", "trt_engine_cache_path": str(folder), "trt_timing_cache_enable": "1"}
    return kept | {"trt_fp16_enable": str(int(dtype == "float16"))}


def require_provider(found: list[str], provider: str, part: str) -> None:
    """ONNX Runtime carries on with the CPU where a provider does not load. Raises: CannotRun if it did."""
    if not found or found[0] != provider:
        raise CannotRun(f"{part} runs on {', '.join(found) or 'nothing'} instead of {provider}")

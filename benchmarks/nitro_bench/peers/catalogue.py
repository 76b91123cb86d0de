"""The peers that there are: name, adapter, interpreter, options. docs/peers.md says what each draws and what it does not."""

from __future__ import annotations

from pathlib import Path

from nitro_bench.peer import Peer

FOLDER = Path(__file__).resolve().parent
REQUIREMENTS = FOLDER / "requirements"
ENVIRONMENTS = FOLDER.parents[2] / "runs" / "peers"
"""Where `make peers` makes the environments, in the repository."""
MODELS = ENVIRONMENTS / "models"
"""What peers convert, kept from one benchmark to the next."""
HOW_TO_MAKE = "make peers, in the repository"
HOW_TO_MAKE_FOR_GPU = "make peers, in the repository, on a machine with an NVIDIA GPU"


def _python(environment: str) -> Path:
    return ENVIRONMENTS / environment / "bin" / "python"


def _diffusers(name: str, title: str, **options: str) -> Peer:
    return Peer(
        name=name,
        title=title,
        adapter=FOLDER / "diffusers_pipeline.py",
        python=_python("diffusers"),
        options={"models": str(MODELS), **options},
        how_to_make=HOW_TO_MAKE,
    )


def _diffusers_on_gpu(name: str, title: str, environment: str, **options: str) -> Peer:
    return Peer(
        name=name,
        title=title,
        adapter=FOLDER / "diffusers_pipeline.py",
        python=_python(environment),
        options={"device": "cuda", "dtype": "float16", "models": str(MODELS), **options},
        how_to_make=HOW_TO_MAKE if environment == "diffusers" else HOW_TO_MAKE_FOR_GPU,
    )


def _onnxruntime(name: str, title: str, environment: str, how_to_make: str, **options: str) -> Peer:
    return Peer(
        name=name,
        title=title,
        adapter=FOLDER / "onnxruntime_pipeline.py",
        python=_python(environment),
        options={"models": str(MODELS), "pins": str(REQUIREMENTS / "optimum-onnx.txt"), **options},
        how_to_make=how_to_make,
    )


def _onnxruntime_on_gpu(name: str, title: str, provider: str) -> Peer:
    return _onnxruntime(name, title, "onnxruntime-gpu", HOW_TO_MAKE_FOR_GPU, provider=provider, dtype="float16")


def _openvino(name: str, title: str, environment: str, adapter: str, **options: str) -> Peer:
    exported_by = {"export_python": str(_python("optimum-intel")), "export_pins": str(REQUIREMENTS / "optimum-intel.txt")}
    return Peer(
        name=name,
        title=title,
        adapter=FOLDER / adapter,
        python=_python(environment),
        options={"models": str(MODELS), **exported_by, **options},
        how_to_make=HOW_TO_MAKE,
    )


def _genai(name: str, title: str, **options: str) -> Peer:
    return _openvino(name, title, "openvino-genai", "openvino_genai_pipeline.py", **options)


PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        _diffusers("diffusers", "diffusers, eager, float32"),
        _diffusers("diffusers-bf16", "diffusers, eager, bfloat16", dtype="bfloat16"),
        _diffusers("diffusers-compile", "diffusers, torch.compile, float32", compile="inductor"),
        _diffusers("diffusers-compile-bf16", "diffusers, torch.compile, bfloat16", compile="inductor", dtype="bfloat16"),
        _onnxruntime("onnxruntime", "optimum-onnx on ONNX Runtime, float32", "onnxruntime", HOW_TO_MAKE),
        _openvino("optimum-intel", "optimum-intel on OpenVINO, float32", "optimum-intel", "openvino_pipeline.py"),
        _genai("openvino-genai", "OpenVINO GenAI, float32"),
        _genai("openvino-genai-bf16", "OpenVINO GenAI, bfloat16", precision="bf16"),
        _genai("openvino-genai-int8", "OpenVINO GenAI, INT8 weights", weights="int8"),
        _diffusers_on_gpu("diffusers-cuda", "diffusers on a GPU, eager, float16", "diffusers"),
        _diffusers_on_gpu(
            "diffusers-compile-cuda", "diffusers on a GPU, torch.compile, float16", "diffusers", compile="inductor"
        ),
        _diffusers_on_gpu(
            "torch-tensorrt", "diffusers on a GPU, Torch-TensorRT, float16", "torch-tensorrt", compile="torch_tensorrt"
        ),
        _onnxruntime_on_gpu("onnxruntime-cuda", "optimum-onnx on CUDA, float16", "CUDAExecutionProvider"),
        _onnxruntime_on_gpu("onnxruntime-tensorrt", "optimum-onnx on TensorRT, float16", "TensorrtExecutionProvider"),
    )
}
"""Name, as `--peers` takes it -> peer."""

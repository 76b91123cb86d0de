"""The ways to run one stage that are timed and compared: nitro-rt's graphs on two runtimes, and diffusers.

A side is loaded once and then called with the reference's arrays; each imports only its own libraries.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nitro_rt.manifest import EXPORT_FILE, Graph, GraphsManifest, from_json

Arrays = Mapping[str, NDArray[Any]]
Run = Callable[[Arrays], NDArray[Any]]
"""Named inputs to the stage's one output."""


def load(request: Mapping[str, Any]) -> Run:
    """The side that `request` names, ready to run, for the stage `denoise` or `decode`."""
    return _LOADERS[request["side"]](request)


def openvino_graph(request: Mapping[str, Any]) -> Run:
    """The engine of the graph, loaded with the backend's own options."""
    import openvino

    from nitro_engines.backends import load_backend
    from nitro_rt.openvino_model import read_model

    path, graph = _graph(request)
    core, backend = openvino.Core(), load_backend("openvino")
    options = backend.options(graph.compute_dtype)
    # Beside the graphs, so that weights are linked. What is compiled needs the files no more.
    with tempfile.TemporaryDirectory(prefix=".engine.", dir=path.parent.parent) as work:
        paths = backend.compile(path, graph, Path(work))
        model = read_model(core, tuple(paths), widen=options["INFERENCE_PRECISION_HINT"] == "f32")
        compiled = core.compile_model(model, "CPU", options)
    del model
    call = compiled.create_infer_request()

    def run(arrays: Arrays) -> NDArray[Any]:
        call.infer(_given(graph, arrays))
        return np.array(call.get_output_tensor(0).data)

    return run


def onnxruntime_graph(request: Mapping[str, Any], *, optimised: bool = True) -> Run:
    """The graph on ONNX Runtime."""
    import onnxruntime

    path, graph = _graph(request)
    levels = onnxruntime.GraphOptimizationLevel
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    settings.graph_optimization_level = levels.ORT_ENABLE_ALL if optimised else levels.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
    return lambda arrays: np.asarray(session.run(None, _given(graph, arrays))[0])


def onnxruntime_as_written(request: Mapping[str, Any]) -> Run:
    """Every operator as the graph says, quantisation too: what the numbers are worth before a kernel changes them."""
    return onnxruntime_graph(request, optimised=False)


def diffusers_module(request: Mapping[str, Any]) -> Run:
    """diffusers' module, eager or compiled, with what its users know to set: channels last, no gradients."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[request["precision"]]
    kind, part = {"denoise": (UNet2DConditionModel, "unet"), "decode": (AutoencoderKL, "vae")}[request["stage"]]
    module: Any = kind.from_pretrained(Path(request["checkpoint"]) / part, dtype=dtype)
    module = module.eval().requires_grad_(False).to(memory_format=torch.channels_last)
    size = float(request["size_px"])
    time_ids = torch.tensor([[size, size, 0.0, 0.0, size, size]], dtype=dtype)

    def unet(latents: Any, timestep: Any, embeds: Any, pooled: Any) -> Any:
        added = {"text_embeds": pooled, "time_ids": time_ids}
        return module(latents, timestep, embeds, added_cond_kwargs=added, return_dict=False)[0]

    def decoder(latents: Any) -> Any:
        return module.decode(latents / module.config.scaling_factor, return_dict=False)[0]

    network: Any = {"denoise": unet, "decode": decoder}[request["stage"]]
    if request["side"] == "diffusers-compile":
        network = torch.compile(network)

    @torch.no_grad()
    def run(arrays: Arrays) -> NDArray[Any]:
        given = {name: torch.from_numpy(array) for name, array in arrays.items()}
        latents = given["latents"].to(dtype, memory_format=torch.channels_last)
        if request["stage"] == "decode":
            pixels = network(latents).float()
            return (pixels * 0.5 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).mul(255).round().to(torch.uint8).numpy()
        embeds, pooled = given["prompt_embeds"].to(dtype), given["pooled_prompt_embeds"].to(dtype)
        eps = network(latents, given["timestep"], embeds, pooled).float()
        return ((given["latents"] - given["sigma"] * eps) / given["alpha"]).numpy()

    return run


_LOADERS: dict[str, Callable[[Mapping[str, Any]], Run]] = {
    "openvino": openvino_graph,
    "onnxruntime": onnxruntime_graph,
    "onnxruntime-as-written": onnxruntime_as_written,
    "diffusers": diffusers_module,
    "diffusers-compile": diffusers_module,
}


def reference_of(path: Path, stage: str, index: int) -> tuple[Arrays, NDArray[Any]]:
    """The stage's inputs and its output in float32, of one of the reference's images."""
    with np.load(path) as stored:
        own = {key.partition("/")[2]: stored[key] for key in stored.files if key.startswith(f"{index}/")}
        own |= {key: stored[key] for key in ("timestep", "alpha", "sigma")}
    if stage == "decode":
        return {"latents": own["x0"]}, own["images"]
    return own, own["x0"]


def sqnr_db(found: NDArray[Any], reference: NDArray[Any]) -> float:
    """Signal to noise of an output against its reference, both around the reference's mean: an offset is no signal."""
    signal = reference.astype(np.float64) - reference.astype(np.float64).mean()
    noise = found.astype(np.float64) - reference.astype(np.float64)
    if not np.isfinite(noise).all():
        return -np.inf
    return float(min(200.0, 10 * np.log10((signal**2).mean() / max(float((noise**2).mean()), 1e-30))))


def _graph(request: Mapping[str, Any]) -> tuple[Path, Graph]:
    folder = Path(request["graphs"])
    text = (folder / EXPORT_FILE).read_text(encoding="utf-8")
    manifest = from_json(GraphsManifest, text, where=str(folder / EXPORT_FILE))
    graph = manifest.decode if request["stage"] == "decode" else manifest.denoise[1]
    return folder / graph.files[0].path, graph


def _given(graph: Graph, arrays: Arrays) -> dict[str, NDArray[Any]]:
    return {spec.name: np.ascontiguousarray(arrays[spec.name].astype(spec.dtype)) for spec in graph.inputs}

"""A graphs folder made by hand in milliseconds: three ONNX graphs with the contract's bindings and arbitrary arithmetic.

Shapes: B batch, T tokens, C embedding width, P pooled width, h w latents, N steps.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from nitro_engines.cache import EngineCache
from nitro_rt.manifest import (
    SCHEMA_VERSION,
    FileRef,
    Graph,
    GraphsManifest,
    ScheduleSpec,
    Source,
    TensorSpec,
    TokenizerSpec,
    sha256_of,
    to_json,
)
from nitro_rt.schedule import alphas_cumprod_from_config, step_schedule

NUM_TOKENS, WIDTH, POOLED, VOCABULARY = 8, 64, 32, 128
MakeGraphs = Callable[..., Path]
GRAPHS = ("text", "denoise/1", "decode")


class CopyBackend:
    """A backend that needs no library: the engine is a copy of the graph. It counts its work in a file if told to."""

    name = "copy"

    def __init__(self, log: Path | None = None, seconds: float = 0.0) -> None:
        self.compiled: list[str] = []
        self.version, self.features = "1", "none"
        self._log, self._seconds = log, seconds

    def toolchain(self) -> dict[str, str]:
        return {"copy": self.version}

    def target(self) -> dict[str, str]:
        return {"device": "cpu", "features": self.features}

    def options(self, graph_dtype: str) -> dict[str, str]:
        return {"type": graph_dtype}

    def compute_dtype(self, graph_dtype: str) -> str:
        return graph_dtype

    def compile(self, onnx_path: Path, graph: Graph, work: Path, progress: Any = None) -> list[Path]:
        time.sleep(self._seconds)
        self.compiled.append(onnx_path.stem)
        if self._log:
            with self._log.open("a") as log:
                log.write(onnx_path.stem + "\n")
        engine = work / "engine.copy"
        engine.write_bytes(onnx_path.read_bytes())
        return [engine]


@pytest.fixture
def cache(tmp_path: Path) -> EngineCache:
    return EngineCache(tmp_path / "cache")


@pytest.fixture
def make_graphs(tmp_path: Path) -> MakeGraphs:
    """make_graphs(name="graphs", steps=(1,), size_px=32, batch=1, precision="fp32", seed=0, external=False) -> Path"""

    def make(name: str = "graphs", **options: object) -> Path:
        return write_graphs(tmp_path / name, **options)  # type: ignore[arg-type]

    return make


@pytest.fixture
def backend() -> CopyBackend:
    return CopyBackend()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint as far as anything but an export reads it: true configs, weights of a few bytes."""
    return write_checkpoint(tmp_path / "little")


@pytest.fixture(scope="session")
def tiny_kl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A true checkpoint with weights. Do not write into it: the tests share it."""
    from checkpoints import make_tiny_sdxl  # loads torch, which most tests here do without

    return make_tiny_sdxl(tmp_path_factory.mktemp("checkpoints") / "tiny-kl")


def write_checkpoint(folder: Path) -> Path:
    text = {"hidden_size": 8, "projection_dim": 8, "max_position_embeddings": 77, "vocab_size": 4}
    unet = {
        "in_channels": 4,
        "out_channels": 4,
        "sample_size": 8,
        "block_out_channels": [8, 8, 8],
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 2,
        "cross_attention_dim": 16,
        "projection_class_embeddings_input_dim": 20,
    }
    parts = {
        "text_encoder": ("transformers", "CLIPTextModel", text, "model"),
        "text_encoder_2": ("transformers", "CLIPTextModelWithProjection", text, "model"),
        "unet": ("diffusers", "UNet2DConditionModel", unet, "diffusion_pytorch_model"),
        "vae": ("diffusers", "AutoencoderKL", {"block_out_channels": [8, 8, 8, 8]}, "diffusion_pytorch_model"),
    }
    index: dict[str, object] = {"_class_name": "StableDiffusionXLPipeline", "scheduler": ["diffusers", "LCMScheduler"]}
    for part, (library, kind, config, stem) in parts.items():
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text(json.dumps(config))
        header = json.dumps({part: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
        (folder / part / f"{stem}.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
        index[part] = [library, kind]
    for part in ("tokenizer", "tokenizer_2"):
        (folder / part).mkdir()
        (folder / part / "tokenizer.json").write_text("{}")
        index[part] = ["transformers", "CLIPTokenizer"]
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text("{}")
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "run.json").write_text(json.dumps({"name": "little", "licence": "CC0-1.0", "shifted_timestep": 500}))
    return folder


def write_graphs(
    folder: Path,
    *,
    steps: tuple[int, ...] = (1,),
    size_px: int = 32,
    batch: int = 1,
    shift: int = 500,
    precision: str = "fp32",
    seed: int = 0,
    external: bool = False,
) -> Path:
    folder.mkdir(parents=True)
    kind = TensorProto.FLOAT if precision == "fp32" else TensorProto.FLOAT16
    alphas = alphas_cumprod_from_config({})
    schedule = ScheduleSpec(shift=shift, steps={count: step_schedule(count, shift, alphas) for count in steps})
    models = {"text": _text(batch, kind, seed), "decode": _decode(batch, size_px // 8, kind, seed)}
    models |= {f"denoise-{count}": _denoise(batch, size_px // 8, schedule.steps[count].alpha, kind, seed) for count in steps}
    graphs = {name: _save(model, folder, name, external) for name, model in models.items()}
    tokenizers = []
    for index in (1, 2):
        path = folder / f"tokenizer-{index}.json"
        path.write_text(json.dumps(_tokenizer(index)), encoding="utf-8")
        tokenizers.append(TokenizerSpec(file=_reference(path), max_length=NUM_TOKENS, bos_id=1, eos_id=2, pad_id=0))
    manifest = GraphsManifest(
        schema_version=SCHEMA_VERSION,
        source=Source(
            name="hand-made",
            checkpoint_sha256=hashlib.sha256(f"{seed}".encode()).hexdigest(),
            licence="CC0-1.0",
            origin="hand-made",
        ),
        schedule=schedule,
        size_px=size_px,
        batch=batch,
        precision=precision,
        text=graphs["text"],
        denoise={count: graphs[f"denoise-{count}"] for count in steps},
        decode=graphs["decode"],
        tokenizers=tuple(tokenizers),
        toolchain={"onnx": onnx.__version__},
    )
    (folder / "export.json").write_text(to_json(manifest), encoding="utf-8")
    return folder


def _tokenizer(index: int) -> dict[str, object]:
    """Whole words in the form of the `tokenizers` library; each index numbers them otherwise."""
    words = "a an the red green blue yellow apple cat dog house car street tree hill star on of in with".split()
    vocabulary = {"<pad>": 0, "<begin>": 1, "<end>": 2, "<unknown>": 3} | {word: 3 + index + i for i, word in enumerate(words)}
    return {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unknown>"},
    }


def _text(batch: int, kind: int, seed: int) -> onnx.ModelProto:
    random = np.random.default_rng(seed)
    nodes = [
        helper.make_node("Gather", ["table_1", "input_ids"], ["words_1"]),
        helper.make_node("Gather", ["table_2", "input_ids_2"], ["words_2"]),
        helper.make_node("Add", ["words_1", "words_2"], ["prompt_embeds"]),
        helper.make_node("ReduceMean", ["words_2", "axis"], ["mean"], keepdims=0),
        helper.make_node("MatMul", ["mean", "projection"], ["pooled_prompt_embeds"]),
    ]
    constants = {
        "table_1": _weights(random, (VOCABULARY, WIDTH), kind),
        "table_2": _weights(random, (VOCABULARY, WIDTH), kind),
        "projection": _weights(random, (WIDTH, POOLED), kind),
        "axis": np.array([1], np.int64),
    }
    inputs = {name: (TensorProto.INT64, (batch, NUM_TOKENS)) for name in ("input_ids", "input_ids_2")}
    outputs = {"prompt_embeds": (kind, (batch, NUM_TOKENS, WIDTH)), "pooled_prompt_embeds": (kind, (batch, POOLED))}
    return _model(nodes, constants, inputs, outputs)


def _denoise(batch: int, side: int, alpha_N: tuple[float, ...], kind: int, seed: int) -> onnx.ModelProto:
    random = np.random.default_rng(seed + 1)
    latents = (TensorProto.FLOAT, (batch, 4, side, side))
    nodes = [
        helper.make_node("Cast", ["latents"], ["_cast"], to=kind),
        helper.make_node("Conv", ["_cast", "kernel"], ["features"], pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["features", "kernel_out"], ["eps"], pads=[1, 1, 1, 1]),
        helper.make_node("ReduceMean", ["prompt_embeds", "axes"], ["words"], keepdims=0),
        helper.make_node("MatMul", ["words", "from_words"], ["bias_words"]),
        helper.make_node("MatMul", ["pooled_prompt_embeds", "from_pooled"], ["bias_pooled"]),
        helper.make_node("Add", ["bias_words", "bias_pooled"], ["bias"]),
        helper.make_node("Reshape", ["bias", "bias_shape"], ["bias_BC11"]),
        helper.make_node("Add", ["eps", "bias_BC11"], ["eps_biased"]),
        helper.make_node("Cast", ["eps_biased"], ["eps_32"], to=TensorProto.FLOAT),
        helper.make_node("Gather", ["alpha_N", "step_index"], ["alpha"]),
        helper.make_node("Mul", ["eps_32", "alpha"], ["scaled"]),
        helper.make_node("Mul", ["noise", "fraction"], ["fresh"]),
        helper.make_node("Add", ["scaled", "fresh"], ["next_latents"]),
    ]
    constants = {
        "alpha_N": np.array(alpha_N, np.float32),
        "fraction": np.array(0.25, np.float32),
        "kernel": _weights(random, (128, 4, 3, 3), kind),
        "kernel_out": _weights(random, (4, 128, 3, 3), kind),
        "from_words": _weights(random, (WIDTH, 4), kind),
        "from_pooled": _weights(random, (POOLED, 4), kind),
        "axes": np.array([1], np.int64),
        "bias_shape": np.array([batch, 4, 1, 1], np.int64),
    }
    inputs = {
        "latents": latents,
        "prompt_embeds": (kind, (batch, NUM_TOKENS, WIDTH)),
        "pooled_prompt_embeds": (kind, (batch, POOLED)),
        "step_index": (TensorProto.INT64, (1,)),
        "noise": latents,
    }
    return _model(nodes, constants, inputs, {"next_latents": latents})


def _decode(batch: int, side: int, kind: int, seed: int) -> onnx.ModelProto:
    random = np.random.default_rng(seed + 2)
    nodes = [
        helper.make_node("Cast", ["latents"], ["_cast"], to=kind),
        helper.make_node("Conv", ["_cast", "kernel"], ["wide"], pads=[1, 1, 1, 1]),
        helper.make_node("DepthToSpace", ["wide"], ["image"], blocksize=8),
        helper.make_node("Cast", ["image"], ["image_32"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["image_32", "gain"], ["bright"]),
        helper.make_node("Clip", ["bright", "low", "high"], ["clipped"]),
        helper.make_node("Round", ["clipped"], ["rounded"]),
        helper.make_node("Transpose", ["rounded"], ["image_BHWC"], perm=[0, 2, 3, 1]),
        helper.make_node("Cast", ["image_BHWC"], ["images"], to=TensorProto.UINT8),
    ]
    constants = {
        "kernel": _weights(random, (3 * 64, 4, 3, 3), kind),
        "gain": np.array(255, np.float32),
        "low": np.array(0, np.float32),
        "high": np.array(255, np.float32),
    }
    inputs = {"latents": (TensorProto.FLOAT, (batch, 4, side, side))}
    return _model(nodes, constants, inputs, {"images": (TensorProto.UINT8, (batch, 8 * side, 8 * side, 3))})


def _weights(random: np.random.Generator, shape: tuple[int, ...], kind: int) -> np.ndarray:
    return (random.standard_normal(shape) / 4).astype(helper.tensor_dtype_to_np_dtype(kind))


def _model(nodes: list, constants: dict, inputs: dict, outputs: dict) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "hand_made",
        [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()],
        [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in outputs.items()],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def _save(model: onnx.ModelProto, folder: Path, name: str, external: bool) -> Graph:
    path, data = folder / f"{name}.onnx", folder / "weights"
    specs = [[_spec(value) for value in values] for values in (model.graph.input, model.graph.output)]
    halves = any(tensor.data_type == TensorProto.FLOAT16 for tensor in model.graph.initializer)
    onnx.save_model(model, str(path), save_as_external_data=external, location=data.name, size_threshold=1024)
    files = [path]
    if external:  # under its content name, as the exporter writes it
        files.append(data.rename(folder / f"{sha256_of(data)}.data"))
        saved = onnx.load(str(path), load_external_data=False)
        for tensor in saved.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = files[1].name
        onnx.save_model(saved, str(path))
    return Graph(
        files=tuple(map(_reference, files)),
        inputs=tuple(specs[0]),
        outputs=tuple(specs[1]),
        parity_max_abs=0.0,
        compute_dtype="float16" if halves else "float32",
    )


def _spec(value: onnx.ValueInfoProto) -> TensorSpec:
    kind = value.type.tensor_type
    dtype = str(np.dtype(helper.tensor_dtype_to_np_dtype(kind.elem_type)))
    return TensorSpec(name=value.name, dtype=dtype, shape=tuple(dim.dim_value for dim in kind.shape.dim))


def _reference(path: Path) -> FileRef:
    return FileRef(path=path.name, sha256=sha256_of(path), num_bytes=path.stat().st_size)

"""Small bundles without a checkpoint: the formulas of `nitro_rt.reference_session` as reference, ONNX and OpenVINO engines."""

from __future__ import annotations

import hashlib
import json
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from nitro_rt import manifest as m
from nitro_rt.schedule import StepSchedule, alphas_cumprod_from_config, step_schedule

FACTOR = 8
LENGTH = 12
EMBED, POOLED = 6, 5
WORDS = "a an red blue green apple dog pear house on of the and with small large one two three four".split()


def hand_made_bundle(
    folder: Path,
    *,
    backend: str = "reference",
    steps: tuple[int, ...] = (1, 2),
    joined: bool = True,
    batch: int = 2,
    size_px: int = 32,
    more_sizes_px: tuple[int, ...] = (),
    shift: int = 250,
    compute_dtype: str = "float32",
    options: dict[str, str] | None = None,
    target: dict[str, str] | None = None,
) -> Path:
    """Write a bundle into `folder`: denoisers of `steps` at `size_px` and each of `more_sizes_px`; returns `folder`.

    Args:
        joined: one denoiser serves all step counts, as in a bundle that is built; otherwise each has its own.
    """
    files = folder / "files"
    files.mkdir(parents=True)
    embeds = m.TensorSpec(name="prompt_embeds", dtype="float32", shape=(batch, LENGTH, EMBED))
    pooled = m.TensorSpec(name="pooled_prompt_embeds", dtype="float32", shape=(batch, POOLED))
    ids = m.TensorSpec(name="input_ids", dtype="int64", shape=(batch, LENGTH))
    step_index = m.TensorSpec(name="step_index", dtype="int64", shape=(1,))
    schedules = {n: step_schedule(n, shift, alphas_cumprod_from_config({})) for n in steps}
    engine = partial(
        m.Engine, backend=backend, precision="fp32", compute_dtype=compute_dtype, key="k" * 64, options=options or {}
    )

    def compiled(
        kind: str, inputs: tuple[m.TensorSpec, ...], outputs: tuple[m.TensorSpec, ...], schedule: Any = None
    ) -> m.Engine:
        """One stage as the backend's files."""
        write = {"onnxruntime": _onnx_engine, "openvino": _openvino_engine}.get(backend, _json_engine)
        return engine(files=write(files, kind, inputs, outputs, schedule), inputs=inputs, outputs=outputs)

    text = compiled("text", (ids, replace(ids, name="input_ids_2")), (embeds, pooled))

    def sized(edge: int) -> m.SizeEngines:
        latents = m.TensorSpec(name="latents", dtype="float32", shape=(batch, 4, edge // FACTOR, edge // FACTOR))
        images = m.TensorSpec(name="images", dtype="uint8", shape=(batch, edge, edge, 3))
        inputs = (latents, embeds, pooled, step_index, replace(latents, name="noise"))
        outputs = (replace(latents, name="next_latents"),)
        if joined:
            one, row = compiled("denoise", inputs, outputs, _joined([schedules[n] for n in sorted(steps)])), 0
            denoise = {}
            for n in sorted(steps):
                denoise[n], row = replace(one, first_row=row), row + n
        else:
            denoise = {n: compiled("denoise", inputs, outputs, schedules[n]) for n in steps}
        return m.SizeEngines(denoise=denoise, decode=compiled("decode", (latents,), (images,)))

    first = sized(size_px)
    manifest = m.BundleManifest(
        schema_version=m.SCHEMA_VERSION,
        name="tiny",
        engine_key=hashlib.sha256(f'{{"backend":"{backend}","name":"tíny"}}'.encode()).hexdigest(),
        engine_key_fields={"name": "tíny", "backend": backend},
        source=m.Source(name="tiny", checkpoint_sha256="c" * 64, licence="none", origin="tiny"),
        schedule=m.ScheduleSpec(shift=shift, steps=schedules),
        sizes_px=(size_px, *more_sizes_px),
        batch=batch,
        text=text,
        denoise=first.denoise,
        decode=first.decode,
        more_sizes={edge: sized(edge) for edge in more_sizes_px},
        tokenizers=(_tokenizer(files, pad_id=1), _tokenizer(files, pad_id=0)),
        target=target or {"device": "cpu"},
        toolchain={"numpy": np.__version__},
        memory_plan=m.MemoryPlan(disk_bytes=1, weight_bytes=1, io_bytes=1),
    )
    (folder / m.BUNDLE_FILE).write_text(m.to_json(m.sealed(manifest)), encoding="utf-8")
    return folder


def _joined(schedules: list[StepSchedule]) -> StepSchedule:
    """The constants of all of them in one row after the other."""
    names = [field.name for field in fields(StepSchedule)]
    return StepSchedule(**{name: sum((getattr(schedule, name) for schedule in schedules), ()) for name in names})


def _store(files: Path, content: bytes, suffix: str) -> m.FileRef:
    digest = hashlib.sha256(content).hexdigest()
    (files / f"{digest}{suffix}").write_bytes(content)
    return m.FileRef(path=f"files/{digest}{suffix}", sha256=digest, num_bytes=len(content))


def _tokenizer(files: Path, pad_id: int) -> m.TokenizerSpec:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    vocabulary = {word: index for index, word in enumerate(["<pad>", "<end>", "<begin>", "<unknown>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.enable_truncation(4)  # must have no effect
    reference = _store(files, tokenizer.to_str().encode(), ".json")
    return m.TokenizerSpec(file=reference, max_length=LENGTH, bos_id=2, eos_id=1, pad_id=pad_id)


def _json_engine(files: Path, kind: str, inputs: Any, outputs: Any, schedule: StepSchedule | None) -> tuple[m.FileRef, ...]:
    constants: dict[str, Any] = {"kind": kind}
    if schedule is not None:
        constants |= {name: getattr(schedule, name) for name in ("alpha", "sigma", "next_alpha", "next_sigma")}
    return (_store(files, json.dumps(constants).encode(), ".json"),)


def _onnx_engine(files: Path, kind: str, inputs: Any, outputs: Any, schedule: StepSchedule | None) -> tuple[m.FileRef, ...]:
    return (_store(files, _onnx_model(kind, inputs, outputs, schedule), ".onnx"),)


def _openvino_engine(files: Path, kind: str, inputs: Any, outputs: Any, schedule: StepSchedule | None) -> tuple[m.FileRef, ...]:
    import openvino

    model = openvino.convert_model(_as_file(files, _onnx_model(kind, inputs, outputs, schedule)))
    xml = files / "model.xml"
    openvino.save_model(model, xml, compress_to_fp16=False)
    stored = (_store(files, xml.read_bytes(), ".xml"), _store(files, xml.with_suffix(".bin").read_bytes(), ".bin"))
    for leftover in (xml, xml.with_suffix(".bin"), files / "model.onnx"):
        leftover.unlink()
    return stored


def _as_file(files: Path, content: bytes) -> Path:
    path = files / "model.onnx"
    path.write_bytes(content)
    return path


def _onnx_model(kind: str, inputs: Any, outputs: Any, schedule: StepSchedule | None) -> bytes:
    """The formulas of the reference session as a graph."""
    from onnx import TensorProto, checker, helper, numpy_helper

    constants: dict[str, Any] = {}
    node = helper.make_node

    def number(name: str, value: Any, dtype: Any = np.float32) -> str:
        constants[name] = np.asarray(value, dtype=dtype)
        return name

    if kind == "text":
        nodes = [
            node("Cast", ["input_ids"], ["ids"], to=TensorProto.FLOAT),
            node("Mul", ["ids", number("tenth", 0.1)], ["scaled"]),
            node("Unsqueeze", ["scaled", number("last", [2], np.int64)], ["column"]),
            node("Add", ["column", number("channels", np.arange(EMBED))], ["phase"]),
            node("Sin", ["phase"], ["prompt_embeds"]),
            node("Cast", ["input_ids_2"], ["ids_2"], to=TensorProto.FLOAT),
            node("ReduceSum", ["ids_2", number("axis", [1], np.int64)], ["sum_2"], keepdims=1),
            node("Mul", ["sum_2", "tenth"], ["scaled_2"]),
            node("Add", ["scaled_2", number("pooled_channels", np.arange(POOLED))], ["phase_2"]),
            node("Cos", ["phase_2"], ["pooled_prompt_embeds"]),
        ]
    elif kind == "denoise":
        assert schedule is not None
        nodes = [
            *(
                node("Gather", [number(f"{name}s", getattr(schedule, name)), "step_index"], [name])
                for name in ("alpha", "sigma", "next_alpha", "next_sigma")
            ),
            node("ReduceMean", ["prompt_embeds", number("axes", [1, 2], np.int64)], ["mean"], keepdims=0),
            node("ReduceMean", ["pooled_prompt_embeds", number("axis", [1], np.int64)], ["mean_2"], keepdims=0),
            node("Add", ["mean", "mean_2"], ["condition"]),
            node("Unsqueeze", ["condition", number("rest", [1, 2, 3], np.int64)], ["condition_B111"]),
            node("Mul", ["latents", number("half", 0.5)], ["half_latents"]),
            node("Add", ["half_latents", "condition_B111"], ["eps"]),
            node("Mul", ["sigma", "eps"], ["noisy"]),
            node("Sub", ["latents", "noisy"], ["clean"]),
            node("Div", ["clean", "alpha"], ["x0"]),
            node("Mul", ["next_alpha", "x0"], ["kept"]),
            node("Mul", ["next_sigma", "noise"], ["fresh"]),
            node("Add", ["kept", "fresh"], ["next_latents"]),
        ]
    else:
        nodes = [
            node("Gather", ["latents", number("rgb", [0, 1, 2], np.int64)], ["three"], axis=1),
            node(
                "Resize",
                ["three", "", number("scales", [1, 1, FACTOR, FACTOR])],
                ["large"],
                mode="nearest",
                nearest_mode="floor",
                coordinate_transformation_mode="asymmetric",
            ),
            node("Transpose", ["large"], ["large_BHWC"], perm=[0, 2, 3, 1]),
            node("Mul", ["large_BHWC", number("gain", 64)], ["scaled"]),
            node("Add", ["scaled", number("middle", 128)], ["shifted"]),
            node("Round", ["shifted"], ["rounded"]),
            node("Clip", ["rounded", number("low", 0), number("high", 255)], ["clipped"]),
            node("Cast", ["clipped"], ["images"], to=TensorProto.UINT8),
        ]
    types = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64, "uint8": TensorProto.UINT8}
    infos = {s.name: helper.make_tensor_value_info(s.name, types[s.dtype], s.shape) for s in (*inputs, *outputs)}
    graph = helper.make_graph(
        nodes,
        kind,
        [infos[spec.name] for spec in inputs],
        [infos[spec.name] for spec in outputs],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    checker.check_model(model, full_check=True)
    return model.SerializeToString()

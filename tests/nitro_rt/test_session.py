"""Sessions check names, types and shapes when they are bound, and say what does not fit."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from nitro_rt.bundle import open_bundle
from nitro_rt.errors import BackendUnavailable, BundleError, EngineMismatch, ShapeError
from nitro_rt.executor import DEVICE_BACKENDS, EXECUTORS, DeviceOptions, open_executor
from nitro_rt.manifest import Engine, TensorSpec
from nitro_rt.onnxruntime_session import OnnxRuntimeSession
from nitro_rt.openvino_session import OpenVinoSession
from nitro_rt.reference_session import ReferenceSession
from nitro_rt.session import Session, SessionFactory

SESSIONS: dict[str, SessionFactory] = {
    "reference": ReferenceSession,
    "onnxruntime": OnnxRuntimeSession,
    "openvino": OpenVinoSession,
}
BACKENDS = list(SESSIONS)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def decode(backend: str, make_bundle: Any, tmp_path: Path) -> tuple[Engine, tuple[Path, ...], Callable[..., Session]]:
    options = {"INFERENCE_PRECISION_HINT": "f32"} if backend == "openvino" else {}
    bundle = open_bundle(make_bundle(tmp_path / "bundle", backend=backend, options=options))
    engine = bundle.manifest.decode
    paths = tuple(bundle.path(reference) for reference in engine.files)
    return engine, paths, lambda engine=engine: SESSIONS[backend]("decode", engine, paths)


@pytest.mark.parametrize("options", [None, DeviceOptions()])
@pytest.mark.parametrize(
    ("precision", "weight_bits", "features", "is_said"),
    [
        ("int8", 8, "avx2", True),
        ("int8", 7, "avx2", False),
        ("int8", 8, "avx2 avx_vnni", False),
        ("fp8", 8, "avx2", False),  # computed in floats
    ],
)
def test_openvino_says_where_8_bit_weights_saturate(
    make_bundle: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: DeviceOptions | None,
    precision: str,
    weight_bits: int,
    features: str,
    is_said: bool,
) -> None:
    monkeypatch.setattr("nitro_rt.executor.cpu_target", lambda: {"features": features})
    bundle = open_bundle(make_bundle(tmp_path / "bundle", backend="openvino", options={"INFERENCE_PRECISION_HINT": "f32"}))
    recipe = {"precision": precision, "weight_bits": weight_bits}
    executor = open_executor(replace(bundle, manifest=replace(bundle.manifest, quantisation=recipe)), options)
    notes = executor.notes
    executor.close()
    assert len(notes) == is_said and all("INT8 weights of 8 bits" in note and "which saturate" in note for note in notes)


def _buffers() -> dict[str, Any]:
    return {"latents": np.zeros((2, 4, 4, 4), np.float32), "images": np.zeros((2, 32, 32, 3), np.uint8)}


def test_a_bound_session_reads_and_writes_in_place(decode: Any) -> None:
    _, _, open_session = decode
    session, buffers = open_session(), _buffers()
    session.bind(buffers)
    for value, expected in ((0.0, 128), (1.0, 192), (-9.0, 0)):
        buffers["latents"][:] = value
        session.execute()
        assert (buffers["images"] == expected).all()
    assert session.compute_dtype == "float32"
    session.close()
    session.close()


BAD_BUFFERS: dict[str, tuple[dict[str, Any], str]] = {
    "missing": ({"images": None}, "was given the buffers \\['latents'\\], it needs"),
    "unknown": ({"noise": np.zeros(1)}, "was given the buffers"),
    "shape": ({"latents": np.zeros((1, 4, 4, 4), np.float32)}, "latents float32 \\[1, 4, 4, 4\\], it needs .*\\[2, 4, 4, 4\\]"),
    "dtype": ({"latents": np.zeros((2, 4, 4, 4))}, "latents float64 .* it needs latents float32"),
    "strided": ({"latents": np.zeros((4, 4, 4, 2), np.float32).T}, "strided"),
}


@pytest.mark.parametrize("name", BAD_BUFFERS)
def test_buffers_that_do_not_fit_are_refused(name: str, decode: Any) -> None:
    changes, message = BAD_BUFFERS[name]
    _, _, open_session = decode
    session = open_session()
    with pytest.raises(ShapeError, match=message):
        session.bind({key: value for key, value in {**_buffers(), **changes}.items() if value is not None})
    session.close()


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"], indirect=True)
@pytest.mark.parametrize(
    "change", [{"name": "z"}, {"dtype": "float16"}, {"shape": (3, 4, 4, 4)}], ids=["name", "dtype", "shape"]
)
def test_an_engine_that_is_not_the_manifest_s_is_refused(change: dict[str, Any], decode: Any) -> None:
    engine, _, open_session = decode
    other: TensorSpec = replace(engine.inputs[0], **change)
    with pytest.raises(ShapeError, match="its manifest says"):
        open_session(replace(engine, inputs=(other,)))


@pytest.mark.parametrize("content", [b"", b"rubbish"])
def test_an_engine_that_does_not_load_is_refused_in_one_line(content: bytes, decode: Any) -> None:
    _, paths, open_session = decode
    paths[0].write_bytes(content)
    with pytest.raises(EngineMismatch, match="decode") as caught:
        open_session()
    assert "\n" not in str(caught.value)


def test_a_truncated_onnx_or_weights_file(decode: Any, backend: str) -> None:
    _, paths, open_session = decode
    paths[-1].write_bytes(paths[-1].read_bytes()[: paths[-1].stat().st_size // 2])
    with pytest.raises(EngineMismatch, match="decode"):
        open_session()


@pytest.mark.parametrize("backend", ["onnxruntime"], indirect=True)
def test_onnxruntime_options(decode: Any) -> None:
    engine, _, open_session = decode
    open_session(replace(engine, options={"graph_optimization_level": "basic"})).close()
    with pytest.raises(BundleError, match="graph_optimization_level 'most'; available: disable"):
        open_session(replace(engine, options={"graph_optimization_level": "most"}))
    with pytest.raises(BundleError, match="unknown option 'threads'"):
        open_session(replace(engine, options={"threads": "3"}))
    with pytest.raises(BackendUnavailable, match="asks for Wishful; this ONNX Runtime has no Wishful, it has .*CPU"):
        open_session(replace(engine, options={"provider": "Wishful"}))


@pytest.mark.parametrize("backend", ["onnxruntime"], indirect=True)
def test_a_provider_that_does_not_start_is_not_replaced_by_the_cpu(decode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, _, open_session = decode
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["Wishful", "CPUExecutionProvider"])

    class Fallen:
        def __init__(self, *args: Any, **kwargs: Any) -> None: ...

        def get_providers(self) -> list[str]:
            return ["CPUExecutionProvider"]

    monkeypatch.setattr("onnxruntime.InferenceSession", Fallen)
    with pytest.raises(
        BackendUnavailable, match="decode: Wishful does not start .ONNX Runtime .* started CPUExecutionProvider"
    ):
        open_session(replace(engine, options={"provider": "Wishful"}))


@pytest.mark.parametrize("backend", ["onnxruntime"], indirect=True)
def test_onnxruntime_binds_values_of_a_device(decode: Any) -> None:
    """Here of the CPU; on a GPU they stay there between the stages."""
    _, _, open_session = decode
    session, buffers = open_session(), _buffers()
    values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(buffer) for name, buffer in buffers.items()}
    session.bind_values(values)
    values["latents"].update_inplace(np.ones((2, 4, 4, 4), np.float32))
    session.execute()
    assert (values["images"].numpy() == 192).all()
    assert session.elsewhere() == {}
    for wrong in (np.zeros((1, 4, 4, 4), np.float32), np.zeros((2, 4, 4, 4), np.float64)):
        with pytest.raises(ShapeError, match="decode was given latents .* it needs latents float32 \\[2, 4, 4, 4\\]"):
            session.bind_values({**values, "latents": onnxruntime.OrtValue.ortvalue_from_numpy(wrong)})
    session.close()


@pytest.mark.parametrize("backend", ["openvino"], indirect=True)
def test_openvino_refuses_unknown_options(decode: Any) -> None:
    engine, _, open_session = decode
    with pytest.raises(EngineMismatch, match="cannot load decode"):
        open_session(replace(engine, options={"NO_SUCH_PROPERTY": "1"}))


def test_a_missing_library_names_the_extra(
    backend: str, make_bundle: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "reference":
        pytest.skip("needs no library")
    bundle = open_bundle(make_bundle(tmp_path / "bundle", backend=backend))
    monkeypatch.setitem(__import__("sys").modules, f"nitro_rt.{backend}_session", None)
    with pytest.raises(BackendUnavailable, match="pip install 'nitro-rt\\[cpu\\]'"):
        open_executor(bundle)


def test_every_backend_has_a_factory() -> None:
    assert {*EXECUTORS, *DEVICE_BACKENDS} == {"onnxruntime", "openvino", "reference", "tensorrt", "tensorrt-rtx"}


LOADS = """
import gc, sys
from pathlib import Path
from nitro_rt import Pipeline

def load_and_draw():
    with Pipeline.load(sys.argv[1]) as pipeline:
        pipeline("a dog", seed=0)

def resident_mib():
    gc.collect()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))

for _ in range(3):
    load_and_draw()
before = resident_mib()
for _ in range(6):
    load_and_draw()
print(resident_mib() - before)
"""


def test_loading_many_bundles_in_turn_leaks_nothing(backend: str, make_bundle: Any, tmp_path: Path) -> None:
    """In a process of its own: what other tests left in the allocators of this one comes and goes."""
    options = {"INFERENCE_PRECISION_HINT": "f32"} if backend == "openvino" else {}
    # 4 MiB of images per bundle: six bundles that stayed would show above the allocators' own few MiB of warm-up.
    folder = make_bundle(tmp_path / "bundle", backend=backend, batch=4, size_px=592, steps=(1,), options=options)
    # One arena: else those of the loads' threads, 16 on two cores, each keep a few MiB until all of them are there.
    environment = os.environ | {"MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, "-c", LOADS, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 16

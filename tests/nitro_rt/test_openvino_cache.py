"""What OpenVINO compiled is loaded again with equal bits, and never when it is damaged or another machine's."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

openvino = pytest.importorskip("openvino")
onnx = pytest.importorskip("onnx")

from onnx import TensorProto, helper  # noqa: E402

from nitro_rt import Pipeline, openvino_cache, openvino_model  # noqa: E402
from nitro_rt.bundle import open_bundle  # noqa: E402
from nitro_rt.errors import ConfigError  # noqa: E402
from nitro_rt.executor import DeviceOptions, open_executor  # noqa: E402
from nitro_rt.manifest import Engine, FileRef, TensorSpec, sha256_of  # noqa: E402
from nitro_rt.openvino_cache import DIGEST_LENGTH, ModelCache, model_cache_folder  # noqa: E402
from nitro_rt.openvino_session import OpenVinoSession  # noqa: E402
from nitro_rt.pipeline import ComputeTypeDiffers  # noqa: E402

KINDS = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
    "int8": TensorProto.INT8,
}
SHAPES = {"kernel": (64, 64, 3, 3), "matrix": (1024, 64), "table": (1024,)}
LARGEST_WITHOUT = 1 << 16
"""Bytes: the graph, its small constants and two digests, but less than the weights in int8."""
F32 = {"INFERENCE_PRECISION_HINT": "f32"}

Stage = tuple[Engine, tuple[Path, ...]]


def _write_stage(folder: Path, kind: str, num_weight_files: int) -> Stage:
    """x [1, 64, 8, 8] -> convolution -> matrix -> + table -> sine -> * an inline constant -> y [1, 8, 8, 1024].

    The weights lie in files beside the graph; in int8 they and what they are multiplied by are quantised.
    """
    folder.mkdir(exist_ok=True)
    is_int8, random, tensors = kind == "int8", np.random.default_rng(0), []
    float_kind = KINDS["float32" if is_int8 else kind]
    paths = [folder / "graph.onnx", *(folder / f"{number}.data" for number in range(num_weight_files))]
    for number, (name, shape) in enumerate(SHAPES.items()):
        file, tensor_kind = paths[1 + number % num_weight_files], KINDS["int8"] if is_int8 and len(shape) > 1 else float_kind
        values = 20 * random.standard_normal(shape) if tensor_kind == KINDS["int8"] else random.standard_normal(shape)
        content = values.astype(helper.tensor_dtype_to_np_dtype(tensor_kind)).tobytes()
        offset = file.stat().st_size if file.exists() else 0
        with file.open("ab") as out:
            out.write(content)
        tensor = TensorProto(name=name, data_type=tensor_kind, dims=shape, data_location=TensorProto.EXTERNAL)
        for key, value in (("location", file.name), ("offset", offset), ("length", len(content))):
            tensor.external_data.add(key=key, value=str(value))
        tensors.append(tensor)
    scale = random.standard_normal(1024).astype(helper.tensor_dtype_to_np_dtype(float_kind)).tobytes()
    tensors.append(helper.make_tensor("scale", float_kind, (1024,), scale, raw=True))
    tensors += [helper.make_tensor("step", float_kind, (), [0.05]), helper.make_tensor("zero", TensorProto.INT8, (), [0])]
    step = ["step", "zero"]
    quantised = [
        helper.make_node("QuantizeLinear", ["x_float", *step], ["x_int8"]),
        helper.make_node("DequantizeLinear", ["x_int8", *step], ["x_in"]),
        helper.make_node("DequantizeLinear", ["kernel", *step], ["kernel_in"]),
        helper.make_node("DequantizeLinear", ["matrix", *step], ["matrix_in"]),
    ]
    infos = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", [1, 64, 8, 8]), ("y", [1, 8, 8, 1024]))]
    x, kernel, matrix = ("x_in", "kernel_in", "matrix_in") if is_int8 else ("x_float", "kernel", "matrix")
    nodes = [
        helper.make_node("Cast", ["x"], ["x_float"], to=float_kind),
        *(quantised if is_int8 else ()),
        helper.make_node("Conv", [x, kernel], ["seen"], pads=[1, 1, 1, 1]),
        helper.make_node("Transpose", ["seen"], ["last"], perm=[0, 2, 3, 1]),
        helper.make_node("Transpose", [matrix], ["matrix_T"], perm=[1, 0]),
        helper.make_node("MatMul", ["last", "matrix_T"], ["product"]),
        helper.make_node("Add", ["product", "table"], ["sum"]),
        helper.make_node("Sin", ["sum"], ["wave"]),
        helper.make_node("Mul", ["wave", "scale"], ["scaled"]),
        helper.make_node("Cast", ["scaled"], ["y"], to=TensorProto.FLOAT),
    ]
    graph = helper.make_graph(nodes, "g", infos[:1], infos[1:], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    paths[0].write_bytes(model.SerializeToString())
    engine = Engine(
        backend="openvino",
        precision="fp32",
        compute_dtype="float32",
        files=tuple(FileRef(path=path.name, sha256=sha256_of(path), num_bytes=path.stat().st_size) for path in paths),
        inputs=(TensorSpec(name="x", dtype="float32", shape=(1, 64, 8, 8)),),
        outputs=(TensorSpec(name="y", dtype="float32", shape=(1, 8, 8, 1024)),),
        key="k",
        options=F32,
    )
    return engine, tuple(paths)


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    """In float16, with one weight file."""
    return _write_stage(tmp_path / "stage", "float16", 1)


def _output(stage: Stage, cache: ModelCache | None = None) -> np.ndarray:
    engine, paths = stage
    session = OpenVinoSession("decode", engine, paths, cache)
    x = np.random.default_rng(1).standard_normal((1, 64, 8, 8)).astype(np.float32)
    y = np.zeros((1, 8, 8, 1024), np.float32)
    session.bind({"x": x, "y": y})
    session.execute()
    session.close()
    assert np.isfinite(y).all() and y.std() > 0.1
    return y


def _kept(folder: Path) -> Path:
    (file,) = folder.iterdir()
    return file


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """A function that forbids a method of OpenVINO's core: `compile_model` or `import_model`."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("this was not to be called")

    yield lambda name: monkeypatch.setattr(openvino.Core, name, refuse)


@pytest.mark.parametrize("num_weight_files", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_a_kept_model_gives_equal_bits(kind: str, num_weight_files: int, tmp_path: Path, without: Any) -> None:
    stage, folder = _write_stage(tmp_path / "stage", kind, num_weight_files), tmp_path / "kept"
    notes: list[str] = []
    fresh = _output(stage)
    assert np.array_equal(_output(stage, ModelCache(folder, notes)), fresh)
    without("compile_model")
    moved = stage[1][0].parent.rename(tmp_path / "moved")
    stage = stage[0], tuple(moved / path.name for path in stage[1])
    assert np.array_equal(_output(stage, ModelCache(folder, notes)), fresh)
    assert notes == []
    size, num_weight_bytes = _kept(folder).stat().st_size, sum(path.stat().st_size for path in stage[1][1:])
    assert (size < LARGEST_WITHOUT < num_weight_bytes) if num_weight_files == 1 else (size > num_weight_bytes)


def test_weights_stay_in_their_file_for_the_version_that_is_tested_here() -> None:
    """On an upgrade: run this file, and where the bits are equal add the version."""
    assert openvino.__version__.startswith(openvino_cache.WEIGHTLESS)


def test_of_other_versions_a_model_is_kept_whole(stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino, "__version__", "2025.3.0")
    _output(stage, ModelCache(tmp_path / "kept", []))
    assert _kept(tmp_path / "kept").stat().st_size > sum(path.stat().st_size for path in stage[1])


def test_a_large_one_of_several_weight_files_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino_cache, "LARGEST_BYTES", 1 << 10)
    stage = _write_stage(tmp_path / "stage", "float32", 2)
    notes: list[str] = []
    _output(stage, ModelCache(tmp_path / "kept", notes))
    assert notes == [] and not (tmp_path / "kept").exists()


def test_an_engine_of_gigabytes_is_not_kept(stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino_cache, "LARGEST_ENGINE_BYTES", 1 << 10)
    notes: list[str] = []
    _output(stage, ModelCache(tmp_path / "kept", notes))
    assert notes == [] and not (tmp_path / "kept").exists()


def test_an_export_that_grew_is_not_kept(stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino_cache, "LARGEST_BYTES", 1 << 10)
    notes: list[str] = []
    _output(stage, ModelCache(tmp_path / "kept", notes))
    assert notes == [] and not (tmp_path / "kept").exists()


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "rubbish": lambda content: b"rubbish",
    "cut": lambda content: content[:-1],
    "cut in its head": lambda content: content[:DIGEST_LENGTH],
    "a bit": lambda content: content[:-9] + bytes([content[-9] ^ 1]) + content[-8:],
    "another key": lambda content: content[:DIGEST_LENGTH] + b"0" * DIGEST_LENGTH + content[2 * DIGEST_LENGTH :],
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_file_is_noted_not_loaded_and_replaced(name: str, stage: Stage, tmp_path: Path, without: Any) -> None:
    folder = tmp_path / "kept"
    notes: list[str] = []
    fresh = _output(stage, ModelCache(folder, notes))
    whole = _kept(folder).read_bytes()
    _kept(folder).write_bytes(DAMAGES[name](whole))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(openvino.Core, "import_model", None)
        assert np.array_equal(_output(stage, ModelCache(folder, notes)), fresh)
    assert len(notes) == 1 and "OpenVINO compiled for decode is cut or damaged" in notes[0] and "kept" in notes[0]
    without("compile_model")
    assert np.array_equal(_output(stage, ModelCache(folder, notes)), fresh)
    assert len(notes) == 1


CHANGES: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "cpu": lambda patch: patch.setattr(openvino_cache, "_cpu_features", lambda: "flags: other"),
    "number of cpus": lambda patch: patch.setattr(openvino_cache, "_num_cpus", lambda: [99, 99]),
    "openvino": lambda patch: patch.setattr(openvino, "__version__", "2026.4.9-other"),
    "reader": lambda patch: patch.setattr(openvino_model, "__file__", __file__),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_another_machine_compiled_is_noted_not_loaded_and_replaced(name: str, stage: Stage, tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    notes: list[str] = []
    _output(stage, ModelCache(folder, notes))
    with pytest.MonkeyPatch.context() as patch:
        CHANGES[name](patch)
        patch.setattr(openvino.Core, "import_model", None)
        _output(stage, ModelCache(folder, notes))
        assert len(notes) == 1 and "kept for decode is of another engine, OpenVINO, CPU or nitro-rt" in notes[0]
    with pytest.MonkeyPatch.context() as patch:
        CHANGES[name](patch)
        patch.setattr(openvino.Core, "compile_model", None)
        _output(stage, ModelCache(folder, notes))
    assert len(notes) == 1


def test_options_and_weights_decide_too(stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, paths = stage
    _output(stage, ModelCache(tmp_path / "kept", []))
    monkeypatch.setattr(openvino.Core, "import_model", None)
    weights = replace(engine.files[1], sha256="0" * 64)
    for other in (replace(engine, options=F32 | {"NUM_STREAMS": "2"}), replace(engine, files=(engine.files[0], weights))):
        notes: list[str] = []
        _output((other, paths), ModelCache(tmp_path / "kept", notes))
        assert len(notes) == 1 and "of another engine, OpenVINO, CPU or nitro-rt" in notes[0]


def test_what_openvino_does_not_take_is_compiled_again(stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole file with the right key, whose model OpenVINO itself refuses."""
    folder = tmp_path / "kept"
    notes: list[str] = []
    fresh = _output(stage, ModelCache(folder, notes))
    key = _kept(folder).read_bytes()[DIGEST_LENGTH : 2 * DIGEST_LENGTH]
    blob = memoryview(b"no model at all")
    _kept(folder).write_bytes(openvino_cache._digest(key, blob) + key + blob)
    assert np.array_equal(_output(stage, ModelCache(folder, notes)), fresh)
    assert (
        len(notes) == 1 and notes[0].startswith("OpenVINO does not take what it compiled for decode") and "\n" not in notes[0]
    )


def test_a_place_that_cannot_be_written_is_a_note(stage: Stage, tmp_path: Path) -> None:
    fresh = _output(stage)
    (tmp_path / "kept").write_bytes(b"a file where the folder would be")
    notes: list[str] = []
    assert np.array_equal(_output(stage, ModelCache(tmp_path / "kept", notes)), fresh)
    assert len(notes) == 1 and f"cannot be kept in {tmp_path / 'kept'} (File exists)" in notes[0]
    assert "runtime_cache=False" in notes[0]


KILLED = """
import os, sys
from pathlib import Path
from nitro_rt import Pipeline
os.replace = lambda *_: os._exit(9)
Pipeline.load(sys.argv[1])
"""


def test_killed_while_it_is_written(make_bundle: Any, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle", backend="openvino", options=F32)
    assert subprocess.run([sys.executable, "-c", KILLED, str(bundle)], timeout=120).returncode == 9
    folder = model_cache_folder(bundle)
    (left,) = folder.iterdir()
    assert left.suffix == ".new"
    with Pipeline.load(bundle) as pipe:
        assert pipe("a dog", seed=0).warnings == ()
    assert left.exists(), "perhaps of a process that is still writing"
    os.utime(left, (0, 0))
    for blob in folder.glob("*.blob"):
        blob.unlink()
    with Pipeline.load(bundle):
        pass
    assert sorted(path.suffix for path in folder.iterdir()) == [".blob"] * 3


AT_ONCE = """
import sys
from pathlib import Path
from nitro_rt import openvino_cache
from nitro_rt.bundle import open_bundle
from nitro_rt.openvino_session import OpenVinoSession

openvino_cache._num_cpus = lambda: [int(sys.argv[2])]  # each takes the other's files for another machine's
bundle, notes = open_bundle(sys.argv[1]), []
cache = openvino_cache.ModelCache(openvino_cache.model_cache_folder(bundle.folder), notes)
decode = bundle.manifest.decode
paths = tuple(bundle.path(reference) for reference in decode.files)
for _ in range(40):
    OpenVinoSession("decode", decode, paths, cache).close()
print(sum("of another engine, OpenVINO, CPU or nitro-rt" in note for note in notes), len(notes))
"""


def test_two_processes_at_once(make_bundle: Any, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle", backend="openvino", options=F32)
    command = [sys.executable, "-c", AT_ONCE, str(bundle)]
    both = [subprocess.Popen([*command, str(number)], stdout=subprocess.PIPE, text=True) for number in (1, 2)]
    counts = [tuple(map(int, process.communicate(timeout=120)[0].split())) for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert all(num_foreign == num_notes for num_foreign, num_notes in counts), "never cut, never unwritable"
    assert sum(num_notes for _, num_notes in counts) > 0, "they did meet"
    assert [path.suffix for path in model_cache_folder(bundle).iterdir()] == [".blob"]


def test_a_pipeline_keeps_it_beside_the_bundle(make_bundle: Any, tmp_path: Path, without: Any) -> None:
    bundle = make_bundle(tmp_path / "bundle", backend="openvino", options=F32)
    before = sorted(bundle.rglob("*"))
    with Pipeline.load(bundle, runtime_cache=False) as pipe:
        fresh = pipe(["a dog", "a pear"], seed=3, steps=2).array_BHWC
    with Pipeline.of(open_bundle(bundle)):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle"]
    with Pipeline.load(bundle) as pipe:
        assert np.array_equal(pipe(["a dog", "a pear"], seed=3, steps=2).array_BHWC, fresh)
    num_engines = len({engine.files for _, engine in open_bundle(bundle).engines()})
    names = sorted(path.name for path in (tmp_path / "bundle.openvino").iterdir())
    assert len(names) == num_engines and {"decode.blob", "denoise-1.blob", "text.blob"} <= {*names}
    without("compile_model")
    with Pipeline.load(bundle) as pipe:
        result = pipe(["a dog", "a pear"], seed=3, steps=2)
    assert np.array_equal(result.array_BHWC, fresh) and result.warnings == ()
    assert sorted(bundle.rglob("*")) == before


def test_notes_reach_the_caller(make_bundle: Any, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle", backend="openvino", options=F32)
    (tmp_path / "bundle.openvino").write_bytes(b"")
    with pytest.warns(ComputeTypeDiffers, match="cannot be kept in .*bundle.openvino") as caught:
        pipe = Pipeline.load(bundle)
    with pipe:
        assert len(caught) == 1
        assert len(pipe("a dog", seed=0).warnings) == 1


@pytest.mark.parametrize("backend", ["onnxruntime", "reference"])
def test_other_host_backends_refuse_the_option(backend: str, make_bundle: Any, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle", backend=backend)
    with pytest.raises(ConfigError, match="leave .*runtime_cache=False.* out"):
        Pipeline.load(bundle, runtime_cache=False)
    with pytest.raises(ConfigError, match="leave .*device=1.* out"):
        open_executor(open_bundle(bundle), DeviceOptions(device=1))

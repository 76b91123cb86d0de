"""OpenVINO and ONNX Runtime: what is built computes what the graph says."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest

from nitro_engines.backends import load_backend
from nitro_engines.bundle import build_bundle
from nitro_engines.cache import EngineCache
from nitro_engines.graphs import graphs_of, read_graphs
from nitro_rt.errors import BuildError, ConfigError
from nitro_rt.manifest import Engine, TensorSpec, resolve
from nitro_rt.openvino_model import read_model

MakeGraphs = Callable[..., Path]
TOLERANCES = {"float32": 1e-5, "float16": 2e-2, "bfloat16": 1e-1}
"""Largest difference relative to the largest value; float16 keeps 11 bits, bfloat16 8, over sums of some hundred products."""


@pytest.mark.parametrize("external", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
def test_engines_compute_what_the_graphs_do(
    make_graphs: MakeGraphs, cache: EngineCache, tmp_path: Path, backend: str, precision: str, external: bool
) -> None:
    graphs, out = make_graphs(steps=(1, 2), precision=precision, external=external), tmp_path / "bundle"
    manifest = build_bundle(graphs, out, backend=backend, cache=cache)
    engines = {"text": manifest.text, "decode": manifest.decode} | {f"denoise/{n}": e for n, e in manifest.denoise.items()}
    for stage, graph in graphs_of(read_graphs(graphs)):
        engine = engines[stage]
        inputs = {spec.name: _example(spec) for spec in graph.inputs}
        expected = _run_onnxruntime([resolve(graphs, graph.files[0])], inputs)
        found = (_run_openvino if backend == "openvino" else _run_onnxruntime)(
            [resolve(out, reference) for reference in engine.files], inputs, engine
        )
        for name, reference in expected.items():
            tolerance = TOLERANCES[engine.compute_dtype if precision == "fp16" else "float32"]
            if precision == "fp16":
                tolerance = max(tolerance, TOLERANCES["float16"])  # the reference computes in either
            scale = max(1.0, float(np.abs(reference.astype(np.float32)).max()))
            difference = np.abs(found[name].astype(np.float32) - reference.astype(np.float32)).max() / scale
            assert found[name].dtype == reference.dtype
            assert difference <= (tolerance if reference.dtype != np.uint8 else max(tolerance, 1.01 / 255)), (stage, name)


def test_openvino_never_computes_fp32_in_less(make_graphs: MakeGraphs, cache: EngineCache, tmp_path: Path) -> None:
    manifest = build_bundle(make_graphs(), tmp_path / "bundle", backend="openvino", cache=cache)
    for engine in (manifest.text, *manifest.denoise.values(), manifest.decode):
        assert engine.options == {"INFERENCE_PRECISION_HINT": "f32"} and engine.compute_dtype == "float32"


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_compiled_openvino_ports_have_the_contracts_names_and_no_other(
    make_graphs: MakeGraphs, cache: EngineCache, tmp_path: Path, precision: str
) -> None:
    """In fp32 the graph's first cast does nothing, and OpenVINO folds it into the input."""
    out, core = tmp_path / "bundle", openvino.Core()
    manifest = build_bundle(make_graphs(precision=precision), out, backend="openvino", cache=cache)
    for engine in (manifest.text, manifest.denoise[1], manifest.decode):
        paths = tuple(resolve(out, reference) for reference in engine.files)
        widen = engine.compute_dtype == "float32"
        compiled = core.compile_model(read_model(core, paths, widen=widen), "CPU", dict(engine.options))
        found = [set(port.get_names()) for port in (*compiled.inputs, *compiled.outputs)]
        assert found == [{spec.name} for spec in (*engine.inputs, *engine.outputs)]


@pytest.mark.parametrize(
    ("native", "dtype", "hint"),
    [(["FP32", "BF16"], "bfloat16", "bf16"), (["FP32", "FP16"], "float16", "f16"), (["FP32"], "float32", "f32")],
)
def test_openvino_computes_fp16_graphs_in_the_cpus_own_type(
    monkeypatch: pytest.MonkeyPatch, native: list[str], dtype: str, hint: str
) -> None:
    backend = load_backend("openvino")
    monkeypatch.setattr(backend, "_core", type("Core", (), {"get_property": lambda *_: native})())
    assert backend.compute_dtype("float16") == dtype and backend.options("float16") == {"INFERENCE_PRECISION_HINT": hint}
    assert backend.compute_dtype("float32") == "float32" and backend.options("float32") == {"INFERENCE_PRECISION_HINT": "f32"}


def test_what_cannot_run_is_refused_by_name() -> None:
    assert load_backend("openvino").compute_dtype("bfloat16") in ("bfloat16", "float16", "float32")
    with pytest.raises(
        ConfigError, match="no bfloat16 kernels for MatMul and Conv; say --precision fp16 .* --backend openvino"
    ):
        load_backend("onnxruntime").compute_dtype("bfloat16")


def test_openvino_takes_the_hint_that_the_manifest_records(make_graphs: MakeGraphs, cache: EngineCache, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    engine = build_bundle(make_graphs(precision="fp16"), out, backend="openvino", cache=cache).decode
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(resolve(out, engine.files[0])), "CPU", dict(engine.options))
    taken = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    assert {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}[taken] == engine.compute_dtype


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
def test_the_denoiser_shares_its_weights_with_the_graphs(
    make_graphs: MakeGraphs, cache: EngineCache, tmp_path: Path, backend: str
) -> None:
    """Weights of gigabytes take no space again: not per step count, nor in the cache, nor in the bundle."""
    graphs = make_graphs(steps=(1, 2, 4), external=True)
    manifest = build_bundle(graphs, tmp_path / "bundle", backend=backend, cache=cache)
    for _, graph in graphs_of(read_graphs(graphs)):
        for reference in graph.files[1:]:
            exported, published = graphs / reference.path, tmp_path / "bundle" / "files" / reference.path
            assert exported.samefile(published)
    (files,) = {engine.files for engine in manifest.denoise.values()}
    assert [manifest.denoise[count].first_row for count in (1, 2, 4)] == [0, 1, 3]
    assert files[1].num_bytes > 4 * files[0].num_bytes


def test_onnxruntime_refuses_weights_without_a_content_name(make_graphs: MakeGraphs, tmp_path: Path) -> None:
    graphs = make_graphs()
    manifest = read_graphs(graphs)
    onnx.save_model(
        onnx.load(str(graphs / "decode.onnx")),
        str(graphs / "decode.onnx"),
        save_as_external_data=True,
        location="weights",
        size_threshold=16,
    )
    with pytest.raises(BuildError, match="keeps weights in 'weights', which is no content name"):
        load_backend("onnxruntime").compile(graphs / "decode.onnx", manifest.decode, tmp_path)


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
def test_a_graph_that_is_none_is_refused(make_graphs: MakeGraphs, tmp_path: Path, backend: str) -> None:
    graphs = make_graphs()
    manifest = read_graphs(graphs)
    (graphs / "text.onnx").write_bytes(b"no graph")
    with pytest.raises(BuildError, match="text.onnx (cannot be read as an ONNX graph|into OpenVINO failed)"):
        load_backend(backend).compile(graphs / "text.onnx", manifest.text, tmp_path)


def test_cut_weights_are_noticed_by_openvino(make_graphs: MakeGraphs, tmp_path: Path) -> None:
    """It maps them; a cut file would be a bus error while the engine is loaded."""
    graphs = make_graphs(external=True)
    graph = read_graphs(graphs).text
    (graphs / graph.files[1].path).write_bytes(b"cut")
    with pytest.raises(BuildError, match="reading text.onnx into OpenVINO failed"):
        load_backend("openvino").compile(graphs / "text.onnx", graph, tmp_path)


def _example(spec: TensorSpec) -> np.ndarray:
    random = np.random.default_rng(len(spec.name))
    if spec.name == "step_index":
        return np.array([0], np.int64)
    if spec.dtype == "int64":
        return random.integers(0, 100, spec.shape, np.int64)
    return random.standard_normal(spec.shape).astype(spec.dtype)


def _run_onnxruntime(paths: list[Path], inputs: dict[str, np.ndarray], engine: Engine | None = None) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(str(paths[0]), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


def _run_openvino(paths: list[Path], inputs: dict[str, np.ndarray], engine: Engine) -> dict[str, np.ndarray]:
    core = openvino.Core()
    model = read_model(core, tuple(paths), widen=engine.compute_dtype == "float32")
    compiled = core.compile_model(model, "CPU", dict(engine.options))
    outputs = compiled(inputs)
    return {port.get_any_name(): np.array(outputs[port]) for port in compiled.outputs}


def test_graphs_may_be_moved(make_graphs: MakeGraphs, cache: EngineCache, tmp_path: Path) -> None:
    """Nothing of the graphs folder's place is in the key."""
    graphs = make_graphs(external=True)
    shutil.copytree(graphs, tmp_path / "copy")
    first = build_bundle(graphs, tmp_path / "a", backend="onnxruntime", cache=cache)
    assert build_bundle(tmp_path / "copy", tmp_path / "b", backend="onnxruntime", cache=cache) == first

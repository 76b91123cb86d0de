"""TensorRT-RTX's real parser and compiler, which need no GPU. What a plan computes is seen on a GPU only."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from nitro_engines.backends import load_backend
from nitro_engines.backends.rtx_targets import CAPABILITIES, capabilities, check_precision
from nitro_engines.bundle import build_bundle
from nitro_engines.cache import EngineCache
from nitro_engines.graphs import read_graphs
from nitro_rt.bundle import open_bundle
from nitro_rt.errors import BuildError, ConfigError

MakeGraphs = Callable[..., Path]


def test_targets_are_ordered_and_named() -> None:
    assert capabilities(("sm120", "sm86")) == {"sm86": (8, 6), "sm120": (12, 0)}
    with pytest.raises(ConfigError, match="sm90 is not one .* available: sm75, sm80, sm86, sm89, sm120, sm121"):
        capabilities(("sm86", "sm90"))
    with pytest.raises(ConfigError, match="needs the GPUs to build for"):
        capabilities(())


def test_eight_bit_floats_need_a_gpu_that_has_them() -> None:
    check_precision(("sm89", "sm120"), "fp8")
    check_precision(("sm75", "sm86"), "int8")
    with pytest.raises(ConfigError, match="--precision fp8 needs .* sm89 or later; sm75, sm86 has none"):
        check_precision(("sm75", "sm86", "sm89"), "fp8")


@pytest.mark.trt
def test_turing_cannot_take_bf16() -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    assert load_backend("tensorrt-rtx", ("sm80",)).compute_dtype("bfloat16") == "bfloat16"
    with pytest.raises(ConfigError, match="sm75 .Turing. has no bfloat16"):
        load_backend("tensorrt-rtx", ("sm75", "sm80")).compute_dtype("bfloat16")


@pytest.mark.trt
@pytest.mark.parametrize(("precision", "external"), [("fp32", False), ("fp16", True)])
def test_one_plan_for_three_targets(
    make_graphs: MakeGraphs, cache: EngineCache, tmp_path: Path, precision: str, external: bool
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    graphs, out = make_graphs(precision=precision, external=external), tmp_path / "bundle"
    manifest = build_bundle(graphs, out, backend="tensorrt-rtx", targets=("sm120", "sm86", "sm89"), cache=cache)
    open_bundle(out).verify()
    assert manifest.target == {
        "device": "cuda",
        "targets": "sm86 sm89 sm120",
        "compute_capabilities": "8.6 8.9 12.0",
    }
    assert manifest.toolchain["tensorrt-rtx"].startswith("1.") and "polygraphy" in manifest.toolchain
    for engine in (manifest.text, *manifest.denoise.values(), manifest.decode):
        assert [Path(reference.path).suffix for reference in engine.files] == [".plan"]
        assert engine.compute_dtype == ("float32" if precision == "fp32" else "float16")
        assert engine.files[0].num_bytes > 10_000


@pytest.mark.trt
@pytest.mark.parametrize("target", CAPABILITIES)
def test_every_target_compiles_fp16(make_graphs: MakeGraphs, tmp_path: Path, target: str) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    graphs = make_graphs(precision="fp16")
    manifest = read_graphs(graphs)
    (plan,) = load_backend("tensorrt-rtx", (target,)).compile(graphs / "decode.onnx", manifest.decode, tmp_path)
    assert plan.stat().st_size > 10_000


@pytest.mark.trt
def test_turing_cannot_take_fp32(make_graphs: MakeGraphs, cache: EngineCache, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    with pytest.raises(ConfigError, match="sm75 .Turing.; say --precision fp16"):
        build_bundle(make_graphs(), tmp_path / "bundle", backend="tensorrt-rtx", targets=("sm75",), cache=cache)


@pytest.mark.trt
def test_the_parsers_own_words_are_in_the_error(
    make_graphs: MakeGraphs, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    graphs = make_graphs()
    model = onnx.load(str(graphs / "decode.onnx"))
    next(node for node in model.graph.node if node.op_type == "Round").op_type = "NoSuchOperator"
    onnx.save_model(model, str(graphs / "decode.onnx"))
    with pytest.raises(BuildError, match="refused decode.onnx for sm89: .*NoSuchOperator"):
        load_backend("tensorrt-rtx", ("sm89",)).compile(graphs / "decode.onnx", read_graphs_unchecked(graphs), tmp_path)
    assert "NoSuchOperator" not in "".join(capfd.readouterr())


def read_graphs_unchecked(graphs: Path):  # noqa: ANN201
    from nitro_rt.manifest import GraphsManifest, from_json

    return from_json(GraphsManifest, (graphs / "export.json").read_text(), where="export.json").decode


@pytest.mark.trt
def test_a_full_disk_is_named(make_graphs: MakeGraphs, tmp_path: Path) -> None:
    """`/dev/full` refuses every write, as a full disk does; the compiler itself only hears of a short count."""
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    graphs = make_graphs(precision="fp16")
    (tmp_path / "engine.plan").symlink_to("/dev/full")
    with pytest.raises(BuildError, match="writing the plan failed at .*engine.plan: No space left on device; .* MiB are free"):
        load_backend("tensorrt-rtx", ("sm89",)).compile(graphs / "decode.onnx", read_graphs(graphs).decode, tmp_path)

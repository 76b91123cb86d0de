from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nitro_engines.backends import load_backend
from nitro_engines.bundle import build_bundle, bundle_from_graphs
from nitro_engines.cache import EngineCache
from nitro_engines.files import source_sha256
from nitro_engines.keys import key_of
from nitro_rt import Pipeline
from nitro_rt.bundle import open_bundle
from nitro_rt.errors import BackendUnavailable, BuildError, BundleError, ConfigError, EngineMismatch, ModelNotFound

MakeGraphs = Callable[..., Path]
CHILD = Path(__file__).parent / "build_child.py"


def child(graphs: Path, out: Path, cache: EngineCache, backend: str, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(CHILD), str(graphs), str(out), str(cache.root), backend, *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _replace(path: Path, old: str, new: str) -> None:
    path.write_text(path.read_text().replace(old, new))


def nothing_left(out: Path, cache: EngineCache) -> bool:
    hidden = [path for path in out.parent.iterdir() if ".nitro-" in path.name]
    return not hidden and not list((cache.root / "work").iterdir())


def test_a_bundle_and_its_manifest(make_graphs: MakeGraphs, cache: EngineCache, backend: Any, tmp_path: Path) -> None:
    graphs, lines = make_graphs(steps=(1, 2, 4), batch=2), []
    result = bundle_from_graphs(graphs, tmp_path / "bundle", backend, cache, lines.append)
    manifest = result.manifest
    bundle = open_bundle(tmp_path / "bundle")
    bundle.verify()
    assert bundle.manifest == manifest and result.published
    assert result.stages == dict.fromkeys(("text", "denoise/1", "denoise/2", "denoise/4", "decode"), "built")
    assert (manifest.name, manifest.sizes_px, manifest.batch) == ("hand-made-1-2-4step", (32,), 2)
    assert manifest.engine_key == key_of(manifest.engine_key_fields)
    assert manifest.toolchain["copy"] == "1" and "onnx" in manifest.toolchain
    assert any("built in" in line for line in lines) and "published" in lines[-1]


@pytest.mark.parametrize("sizes_px", [(32, 64), (64, 32)])
def test_one_bundle_for_two_sizes(
    make_graphs: MakeGraphs, cache: EngineCache, backend: Any, tmp_path: Path, sizes_px: tuple[int, int]
) -> None:
    folders = [make_graphs(f"at-{size_px}", size_px=size_px, steps=(1, 2), external=True) for size_px in sizes_px]
    result = bundle_from_graphs(folders[0], tmp_path / "bundle", backend, cache, more_sizes=folders[1:])
    bundle, second = open_bundle(tmp_path / "bundle"), sizes_px[1]
    bundle.verify()
    assert bundle.manifest.sizes_px == sizes_px and bundle.manifest.engine_key_fields["sizes_px"] == list(sizes_px)
    sized = (f"denoise/1@{second}", f"denoise/2@{second}", f"decode@{second}")
    assert tuple(result.stages) == ("text", "denoise/1", "denoise/2", "decode", *sized)
    assert backend.compiled.count("text") == 1 and len(backend.compiled) == 5
    for size_px in sizes_px:
        assert bundle.engines_at(size_px).decode.outputs[0].shape == (1, size_px, size_px, 3)
        assert bundle.at_size(size_px).manifest.text == bundle.manifest.text
    # An engine is the same whichever size comes first in a bundle.
    backend.compiled.clear()
    other = bundle_from_graphs(folders[1], tmp_path / "other", backend, cache, more_sizes=folders[:1])
    assert set(other.stages.values()) == {"cached"} and other.manifest.engine_key != result.manifest.engine_key
    alone = bundle_from_graphs(folders[1], tmp_path / "alone", backend, cache)
    assert set(alone.stages.values()) == {"cached"} and alone.manifest.decode == bundle.engines_at(second).decode


def test_sizes_share_their_weight_files(make_graphs: MakeGraphs, cache: EngineCache, tmp_path: Path) -> None:
    folders = [make_graphs(f"at-{size_px}", size_px=size_px, external=True) for size_px in (32, 64)]
    backend = load_backend("openvino")
    manifest = bundle_from_graphs(folders[0], tmp_path / "bundle", backend, cache, more_sizes=folders[1:]).manifest
    assert manifest.more_sizes[64].decode.files[1:] == manifest.decode.files[1:]
    assert manifest.more_sizes[64].denoise[1].files[1:] == manifest.denoise[1].files[1:]
    with Pipeline.load(tmp_path / "bundle") as pipe:
        assert pipe("a red apple", seed=0).images[0].size == (32, 32)
        assert pipe("a red apple", seed=0, size=64).images[0].size == (64, 64)
        with pytest.raises(EngineMismatch, match="not built for 48 pixels; built: 32, 64; the nearest built size is 32"):
            pipe("a red apple", size=48)


def test_graphs_that_are_no_sizes_of_one_checkpoint(
    make_graphs: MakeGraphs, cache: EngineCache, backend: Any, tmp_path: Path
) -> None:
    first = make_graphs("first")
    for number, (options, message) in enumerate(
        (
            ({"size_px": 64, "seed": 7}, "differ in source"),
            ({"size_px": 64, "batch": 2}, "differ in batch"),
            ({"size_px": 64, "steps": (1, 2)}, "differ in schedule"),
            ({"size_px": 64, "precision": "fp16"}, "differ in precision"),
            ({}, r"have the sizes \[32, 32\]"),
        )
    ):
        other = make_graphs(f"other-{number}", **options)
        with pytest.raises(BundleError, match=message):
            bundle_from_graphs(first, tmp_path / "bundle", backend, cache, more_sizes=[other])
    assert not (tmp_path / "bundle").exists()


def test_the_memory_plan_is_what_is_there(make_graphs: MakeGraphs, cache: EngineCache, backend: Any, tmp_path: Path) -> None:
    manifest = bundle_from_graphs(make_graphs(batch=2), tmp_path / "bundle", backend, cache).manifest
    files = {path.name: path.stat().st_size for path in (tmp_path / "bundle" / "files").iterdir()}
    assert manifest.memory_plan.disk_bytes == sum(files.values())
    engines = (manifest.text, manifest.denoise[1], manifest.decode)
    assert manifest.memory_plan.weight_bytes == sum(engine.files[0].num_bytes for engine in engines)
    latents, tokens, words, pooled, image = 2 * 4 * 4 * 4 * 4, 2 * 8 * 8, 2 * 8 * 64 * 4, 2 * 32 * 4, 2 * 32 * 32 * 3
    assert manifest.memory_plan.io_bytes == 3 * latents + 2 * tokens + words + pooled + image + math.prod((1,)) * 8


def test_the_second_build_does_nothing(make_graphs: MakeGraphs, cache: EngineCache, backend: Any, tmp_path: Path) -> None:
    graphs = make_graphs()
    first = bundle_from_graphs(graphs, tmp_path / "bundle", backend, cache)
    second = bundle_from_graphs(graphs, tmp_path / "bundle", backend, cache)
    assert len(backend.compiled) == 3
    assert set(second.stages.values()) == {"cached"} and not second.published
    assert second.manifest == first.manifest


@pytest.mark.parametrize(
    ("options", "rebuilt"),
    [
        ({"steps": (1, 2)}, {"denoise-1-2"}),
        ({"shift": 250}, {"denoise-1"}),
        ({"batch": 2}, {"text", "denoise-1", "decode"}),
        ({"size_px": 64}, {"denoise-1", "decode"}),
        ({"precision": "fp16"}, {"text", "denoise-1", "decode"}),
        ({"seed": 7}, {"text", "denoise-1", "decode"}),
    ],
)
def test_what_changes_is_built_and_nothing_else(
    make_graphs: MakeGraphs, cache: EngineCache, backend: Any, tmp_path: Path, options: dict[str, Any], rebuilt: set[str]
) -> None:
    first = bundle_from_graphs(make_graphs("first"), tmp_path / "a", backend, cache).manifest
    backend.compiled.clear()
    second = bundle_from_graphs(make_graphs("second", **options), tmp_path / "b", backend, cache).manifest
    assert set(backend.compiled) == rebuilt
    assert first.engine_key != second.engine_key


@pytest.mark.parametrize("attribute", ["version", "features"])
def test_another_toolchain_or_machine_builds_again(
    make_graphs: MakeGraphs, cache: EngineCache, backend: Any, tmp_path: Path, attribute: str
) -> None:
    graphs = make_graphs()
    bundle_from_graphs(graphs, tmp_path / "bundle", backend, cache)
    setattr(backend, attribute, "another")
    result = bundle_from_graphs(graphs, tmp_path / "bundle", backend, cache)
    assert set(result.stages.values()) == {"built"}
    assert open_bundle(tmp_path / "bundle").manifest == result.manifest  # the older bundle was replaced


def test_the_backends_code_is_part_of_the_key(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1")
    before = source_sha256(tmp_path)
    (tmp_path / "a.py").write_text("x = 2")
    assert source_sha256(tmp_path) != before


def test_what_is_left_out_is_no_part_of_the_key(tmp_path: Path) -> None:
    (tmp_path / "cli").mkdir()
    (tmp_path / "a.py").write_text("x = 1")
    before = source_sha256(tmp_path, without=("cli/",))
    (tmp_path / "cli" / "words.py").write_text("x = 1")
    assert source_sha256(tmp_path, without=("cli/",)) == before != source_sha256(tmp_path)
    (tmp_path / "client.py").write_text("x = 1")
    assert source_sha256(tmp_path, without=("cli/",)) != before


def test_a_damaged_cache_is_noticed_and_the_bundle_is_whole(
    make_graphs: MakeGraphs, cache: EngineCache, backend: Any, tmp_path: Path
) -> None:
    graphs, lines = make_graphs(), []
    manifest = bundle_from_graphs(graphs, tmp_path / "bundle", backend, cache).manifest
    cache.path(manifest.decode.files[0]).write_bytes(b"damaged")  # by its hard link, in the bundle too
    result = bundle_from_graphs(graphs, tmp_path / "bundle", backend, cache, lines.append)
    assert result.stages == {"text": "cached", "denoise/1": "cached", "decode": "built"}
    assert any("is damaged and is built again" in line for line in lines)
    open_bundle(tmp_path / "bundle").verify()


def test_two_builders_at_once_do_the_work_once(make_graphs: MakeGraphs, cache: EngineCache, tmp_path: Path) -> None:
    graphs, out, log = make_graphs(), tmp_path / "engines" / "bundle", tmp_path / "log"
    builders = [child(graphs, out, cache, "copy", "--log", str(log), "--seconds", "0.5") for _ in range(2)]
    for builder in builders:
        _, errors = builder.communicate(timeout=120)
        assert builder.returncode == 0, errors
    assert sorted(log.read_text().split()) == ["decode", "denoise-1", "text"]
    open_bundle(out).verify()
    assert nothing_left(out, cache)


@pytest.mark.parametrize("older", [False, True])
def test_killed_at_any_moment_it_is_whole_or_absent(make_graphs: MakeGraphs, backend: Any, tmp_path: Path, older: bool) -> None:
    first, second = make_graphs("first"), make_graphs("second", seed=3)

    def place(moment: int) -> tuple[Path, EngineCache]:
        out, cache = tmp_path / "out" / str(moment) / "bundle", EngineCache(tmp_path / "cache" / str(moment))
        for folder in (out.parent, cache.root):  # so that every build makes the same changes
            folder.mkdir(parents=True, exist_ok=True)
        if older and not out.exists():
            bundle_from_graphs(first, out, backend, cache)
        return out, cache

    def run(moments: list[int]) -> str:
        for moment in moments:
            place(moment)
        listed = ",".join(map(str, moments))
        process = child(second, tmp_path / "out", EngineCache(tmp_path / "cache"), "copy", "--kill-at", listed)
        output, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        return output

    num_changes = int(run([0]))
    assert num_changes > 50
    # Every seventh change of the file system, and every second of the publication, which comes last.
    moments = sorted({*range(1, num_changes, 7), *range(num_changes - 30, num_changes, 2)})
    assert run(moments) == ""
    found = set()
    for moment in moments:
        out, cache = place(moment)
        if out.exists():
            open_bundle(out).verify()
        found.add(out.exists())
        result = bundle_from_graphs(second, out, backend, cache)
        assert open_bundle(out).manifest == result.manifest
        open_bundle(out).verify()
        assert nothing_left(out, cache)
    assert True in found  # killed after the publication, or before the older one was moved


def test_killed_at_twenty_random_moments_the_cache_is_whole(
    make_graphs: MakeGraphs, cache: EngineCache, tmp_path: Path
) -> None:
    """On one cache and one output folder, one kill after the other, as a user's machine sees them."""
    graphs, out = make_graphs(), tmp_path / "engines" / "bundle"
    shares = [f"{random.Random(seed).uniform(0, 1.1):.3f}" for seed in range(20)]
    process = child(graphs, out, cache, "copy", "--kill-after", ",".join(shares))
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    found = [line.split() for line in output.splitlines()]
    assert len(found) == 20 and sum(how == "killed" for how, _ in found) >= 10
    assert int(found[-1][1]) > 10, "engines of many of these builds were finished and stay"
    result = bundle_from_graphs(graphs, out, load_backend("openvino"), cache)
    assert open_bundle(out).manifest == result.manifest and nothing_left(out, cache)


def test_a_full_disk_is_said_and_nothing_is_published(make_graphs: MakeGraphs, cache: EngineCache, tmp_path: Path) -> None:
    """A limit on file sizes stands in for a full disk, and weights must be copied: there are no hard links."""
    graphs, out = make_graphs(), tmp_path / "engines" / "bundle"
    process = child(graphs, out, cache, "openvino", "--file-limit", "20000", "--no-links")
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 1, errors
    assert output.startswith("BuildError: linking text.onnx failed") and "MiB are free" in output
    assert not out.exists() and nothing_left(out, cache)
    build_bundle(graphs, out, backend="openvino", cache=cache)
    open_bundle(out).verify()


def test_an_interrupt_leaves_nothing_half_done(
    make_graphs: MakeGraphs, cache: EngineCache, backend: Any, tmp_path: Path
) -> None:
    graphs, out = make_graphs(), tmp_path / "engines" / "bundle"
    copy = backend.compile

    def interrupted(onnx_path: Path, *rest: Any) -> Any:
        if onnx_path.stem == "decode":
            raise KeyboardInterrupt
        return copy(onnx_path, *rest)

    backend.compile = interrupted
    with pytest.raises(KeyboardInterrupt):
        bundle_from_graphs(graphs, out, backend, cache)
    assert not out.exists() and nothing_left(out, cache)
    backend.compile = copy
    result = bundle_from_graphs(graphs, out, backend, cache)
    assert result.stages == {"text": "cached", "denoise/1": "cached", "decode": "built"}


def _edit(graphs: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = graphs / "export.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def _wrong_precision(data: dict[str, Any]) -> None:
    data["text"]["compute_dtype"] = "float16"


def _wrong_shape(data: dict[str, Any]) -> None:
    data["decode"]["outputs"][0]["shape"] = [1, 64, 64, 3]


def _leaving(data: dict[str, Any]) -> None:
    data["text"]["files"][0]["path"] = "../text.onnx"


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda graphs: (graphs / "export.json").unlink(), ModelNotFound, "it has no export.json"),
        (lambda graphs: (graphs / "export.json").write_text("{"), BundleError, "is not valid JSON"),
        (lambda graphs: (graphs / "export.json").write_bytes(b"\xff"), BundleError, "cannot be read"),
        (lambda graphs: (graphs / "text.onnx").unlink(), BundleError, "text.onnx is missing"),
        (lambda graphs: (graphs / "text.onnx").write_bytes(b"cut"), BundleError, "text.onnx has 3 bytes"),
        (
            lambda graphs: _replace(graphs / "tokenizer-2.json", "house", "mouse"),
            BundleError,
            "tokenizer-2.json has sha256",
        ),
        (lambda graphs: _edit(graphs, lambda data: data.update(schema_version=2)), BundleError, "schema version 2"),
        (lambda graphs: _edit(graphs, lambda data: data.update(denoise={})), BundleError, r"graphs for \[\] steps"),
        (lambda graphs: _edit(graphs, _leaving), BundleError, "leaves the folder"),
        (
            lambda graphs: _edit(graphs, _wrong_precision),
            BuildError,
            "text.onnx should compute in float16, but its weights are",
        ),
        (
            lambda graphs: _edit(graphs, _wrong_shape),
            BuildError,
            r"decode.onnx: the backend sees the outputs images uint8\[1, 32",
        ),
    ],
)
def test_a_bad_graphs_folder(
    make_graphs: MakeGraphs,
    cache: EngineCache,
    tmp_path: Path,
    damage: Callable[[Path], None],
    error: type[Exception],
    message: str,
) -> None:
    graphs = make_graphs()
    damage(graphs)
    with pytest.raises(error, match=message):
        build_bundle(graphs, tmp_path / "bundle", backend="onnxruntime", cache=cache)
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"backend": "cuda"}, ConfigError, "available: openvino, onnxruntime, tensorrt-rtx"),
        (
            {"backend": "tensorrt"},
            BackendUnavailable,
            r"needs tensorrt, .* 'nitro-rt\[tensorrt,export\]'; tensorrt-rtx builds for RTX",
        ),
        ({"backend": "openvino", "targets": ("sm89",)}, ConfigError, "--target sm89 means nothing to --backend openvino"),
        ({"backend": "tensorrt-rtx"}, ConfigError, "needs the GPUs to build for"),
        ({"backend": "tensorrt-rtx", "targets": ("sm90",)}, ConfigError, "available: sm75, sm80, sm86, sm89, sm120, sm121"),
    ],
)
def test_bad_options(
    make_graphs: MakeGraphs, cache: EngineCache, tmp_path: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        build_bundle(make_graphs(), tmp_path / "bundle", cache=cache, **options)

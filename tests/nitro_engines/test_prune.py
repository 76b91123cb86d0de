"""What the cache holds, and what goes from it and what stays."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nitro_engines.bundle import bundle_from_graphs
from nitro_engines.cache import EngineCache
from nitro_engines.inventory import inventory, unique_bytes, unnamed_files
from nitro_engines.keys import key_of
from nitro_engines.prune import prune
from nitro_rt.bundle import open_bundle
from nitro_rt.errors import BuildError
from nitro_rt.manifest import Engine, TensorSpec

MakeGraphs = Callable[..., Path]
CHILD = Path(__file__).parent / "build_child.py"
DAY = 86_400.0
NOW = 1_600_000_000.0
"""In 2020: what is used while a test runs is younger."""
SPEC = TensorSpec(name="x", dtype="float32", shape=(1,))


def store(cache: EngineCache, name: str, *contents: bytes, days_ago: float = 0) -> str:
    """An engine of these files; returns its key."""
    fields = {"stage": name, "target": {"targets": "sm89"}}
    key = key_of(fields)
    with cache.making(key, "a test engine") as work:
        files = []
        for number, content in enumerate(contents):
            (work / f"{number}.bin").write_bytes(content)
            files.append(cache.adopt(work / f"{number}.bin"))
        engine = Engine(
            backend="tensorrt-rtx",
            precision="fp16",
            compute_dtype="float16",
            files=tuple(files),
            inputs=(SPEC,),
            outputs=(SPEC,),
            key=key,
        )
        cache.store(engine, fields, work)
    use(cache.engines / "entries" / f"{key}.json", days_ago)
    return key


def use(path: Path, days_ago: float) -> None:
    os.utime(path, (NOW - days_ago * DAY, NOW - days_ago * DAY))


def keys(cache: EngineCache) -> set[str]:
    return {item.key for item in inventory(cache)}


def everything(root: Path) -> set[str]:
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.suffix != ".lock"}


def test_what_is_in_a_cache(make_graphs: MakeGraphs, cache: EngineCache, backend: Any, tmp_path: Path) -> None:
    graphs = make_graphs()
    bundle_from_graphs(graphs, tmp_path / "bundle", backend, cache)
    graphs.rename(cache.graphs / ("0" * 64))
    items = inventory(cache)
    assert [item.used_at for item in items] == sorted(item.used_at for item in items)
    found = {(item.kind, item.what) for item in items}
    assert {("engine", "text, fp32, copy cpu"), ("graphs", "hand-made at 32 px, steps 1, fp32"), ("builds", "")} <= found
    engines = [item for item in items if item.kind == "engine"]
    assert len(engines) == 3 and all(item.num_bytes > 1000 and item.made_at <= item.used_at for item in engines)
    assert len(unnamed_files(cache, items)) == 2  # the tokenizers, which the bundle has


def test_what_was_not_used_for_long_goes(cache: EngineCache) -> None:
    old, young = store(cache, "old", b"old", days_ago=31), store(cache, "young", b"young", days_ago=29)
    pruned = prune(cache, older_than_s=30 * DAY, now=NOW)
    assert [item.key for item in pruned.items] == [old] and keys(cache) == {young}
    assert [path.read_bytes() for path in (cache.engines / "files").iterdir()] == [b"young"]
    assert not cache.lock_file(old).exists() and cache.find(young) is not None


def test_what_is_used_is_touched(cache: EngineCache, make_graphs: MakeGraphs, backend: Any, tmp_path: Path) -> None:
    bundle_from_graphs(make_graphs(), tmp_path / "bundle", backend, cache)
    for item in inventory(cache):
        use(item.head, 100)
    bundle_from_graphs(tmp_path / "graphs", tmp_path / "bundle", backend, cache)
    assert prune(cache, older_than_s=99 * DAY, now=NOW).items == ()


def test_the_longest_unused_goes_until_the_rest_fits(cache: EngineCache) -> None:
    sizes = {"a": 3, "b": 1, "c": 2, "d": 4}
    made = {name: store(cache, name, name.encode() * 1_000_000 * size, days_ago=size) for name, size in sizes.items()}
    assert prune(cache, max_bytes=20_000_000, now=NOW).items == ()
    pruned = prune(cache, max_bytes=6_500_000, now=NOW)  # d and its 4 MB are the longest unused
    assert [item.key for item in pruned.items] == [made["d"]] and 6_000_000 <= pruned.kept_bytes <= 6_500_000
    pruned = prune(cache, max_bytes=0, now=NOW)
    assert [item.key for item in pruned.items] == [made["a"], made["c"], made["b"]] and pruned.kept_bytes == 0
    assert not list((cache.engines / "files").iterdir())


def test_a_shared_file_goes_with_the_last_that_names_it(cache: EngineCache) -> None:
    weights = b"weights" * 100_000
    store(cache, "denoise/1", b"graph of 1", weights, days_ago=3)
    second = store(cache, "denoise/2", b"graph of 2", weights, days_ago=2)
    assert unique_bytes(path for item in inventory(cache) for path in item.paths) < 2 * len(weights)
    pruned = prune(cache, older_than_s=2.5 * DAY, now=NOW)
    assert pruned.freed_bytes < len(weights) and cache.find(second) is not None
    assert prune(cache, max_bytes=0).freed_bytes > len(weights)


def test_bundles_keep_their_files(make_graphs: MakeGraphs, cache: EngineCache, backend: Any, tmp_path: Path) -> None:
    graphs, out = make_graphs(), tmp_path / "bundle"
    bundle_from_graphs(graphs, out, backend, cache)
    pruned = prune(cache, max_bytes=0)
    assert len(pruned.items) >= 4 and pruned.freed_bytes < 20_000  # records only: the bundle has the rest
    assert inventory(cache) == [] and not list((cache.engines / "files").iterdir())
    open_bundle(out).verify()
    result = bundle_from_graphs(graphs, out, backend, cache)
    assert set(result.stages.values()) == {"built"} and not result.published


def test_a_dry_run_tells_the_same_and_removes_nothing(
    make_graphs: MakeGraphs, cache: EngineCache, backend: Any, tmp_path: Path
) -> None:
    bundle_from_graphs(make_graphs(), tmp_path / "bundle", backend, cache)
    (tmp_path / "graphs").rename(cache.graphs / ("0" * 64))
    store(cache, "lone", b"lone" * 1000)
    (cache.root / "work" / "dead").mkdir()
    before = everything(cache.root)
    told = prune(cache, max_bytes=0, dry_run=True)
    assert everything(cache.root) == before
    done = prune(cache, max_bytes=0)
    assert (told.items, told.files, told.freed_bytes) == (done.items, done.files, done.freed_bytes)
    assert done.freed_bytes > 4000 and everything(cache.root) < before and not list((cache.root / "work").iterdir())


def test_what_the_user_put_there_stays(cache: EngineCache) -> None:
    models = cache.root / "models"
    ours = models / ("a" * 64)
    for folder in (ours, models / "sdxl-base", models / ("b" * 64)):
        folder.mkdir(parents=True)
        (folder / "weights.safetensors").write_bytes(b"weights")
    (ours / "assembly.json").write_text(json.dumps({"what": "a LoRA on a base"}))
    (models / "unet.safetensors").write_bytes(b"weights")
    assert [(item.kind, item.what) for item in inventory(cache)] == [("model", "a LoRA on a base")]
    prune(cache, max_bytes=0)
    assert sorted(path.name for path in models.iterdir()) == ["b" * 64, "sdxl-base", "unet.safetensors"]


@pytest.mark.parametrize("text", ["", "[]", '{"engine": {"files": [{"path": "../../secret", "sha256": "", "num_bytes": 0}]}}'])
def test_damaged_entries_are_listed_and_go(cache: EngineCache, text: str) -> None:
    store(cache, "whole", b"whole")
    secret = cache.root.parent / "secret"
    secret.write_text("kept")
    entry = cache.engines / "entries" / f"{'0' * 64}.json"
    entry.write_text(text)
    assert "damaged" in {item.what for item in inventory(cache)}
    prune(cache, max_bytes=0)
    assert not entry.exists() and secret.read_text() == "kept"


def test_a_folder_without_its_record_goes(cache: EngineCache) -> None:
    store(cache, "young", b"young")
    half = cache.graphs / ("c" * 64)
    half.mkdir()
    (half / "text.onnx").write_bytes(b"graph")
    assert [item.key for item in prune(cache, now=NOW).items] == [half.name] and not half.exists()


def test_what_a_build_makes_now_stays(cache: EngineCache) -> None:
    key = store(cache, "held", b"held", days_ago=100)
    with cache.making(key, "a test engine"):
        pruned = prune(cache, older_than_s=DAY, now=NOW)
    assert pruned.items == () and pruned.busy == (f"engine {key[:12]}: a build is making or reading it",)
    assert cache.find(key) is not None


def test_what_a_build_at_work_has_used_stays(cache: EngineCache) -> None:
    old, used = store(cache, "old", b"old", days_ago=100), store(cache, "used", b"used", days_ago=100)
    lone = cache.engines / "files" / f"{'d' * 64}.bin"
    with cache.in_use():
        assert cache.find(used) is not None
        lone.write_bytes(b"just made")
        pruned = prune(cache, max_bytes=0)
        assert [item.key for item in pruned.items] == [old] and keys(cache) == {used} and lone.exists()
        assert any(f"engine {used[:12]}: a build at work uses it" in line for line in pruned.busy)
        assert any("files that nothing names: a build is at work" in line for line in pruned.busy)
    assert len(prune(cache, max_bytes=0).items) == 1 and not lone.exists()


def test_a_build_that_was_killed_protects_nothing(cache: EngineCache) -> None:
    store(cache, "engine", b"engine")
    (cache.root / "locks" / "running").mkdir()
    left = cache.root / "locks" / "running" / "1-dead.lock"
    left.touch()
    assert len(prune(cache, max_bytes=0).items) == 1 and not left.exists()


def test_a_build_waits_for_a_pruning(cache: EngineCache) -> None:
    lines: list[str] = []
    entered = threading.Event()

    def build() -> None:
        with cache.in_use(lines.append):
            entered.set()

    with cache.pruning():
        thread = threading.Thread(target=build)
        thread.start()
        assert not entered.wait(0.3)
    assert entered.wait(30) and lines == ["the cache is being pruned; waiting for it"]
    thread.join()


def test_pruning_beside_builds_breaks_none(make_graphs: MakeGraphs, cache: EngineCache, tmp_path: Path) -> None:
    """Everything goes, again and again, but for what the two builders use."""
    folders = [make_graphs(f"graphs-{seed}", seed=seed) for seed in range(2)]
    command = [sys.executable, str(CHILD)]
    builders = [
        subprocess.Popen(
            [*command, str(graphs), str(tmp_path / graphs.name / "out"), str(cache.root), "copy", "--seconds", "0.1"]
        )
        for graphs in folders
    ]
    num_prunings = 0
    while any(builder.poll() is None for builder in builders):
        prune(cache, max_bytes=0)
        num_prunings += 1
        time.sleep(0.05)
    assert [builder.returncode for builder in builders] == [0, 0] and num_prunings > 3
    for graphs in folders:
        open_bundle(tmp_path / graphs.name / "out").verify()


def test_what_cannot_be_removed_is_said(cache: EngineCache, monkeypatch: pytest.MonkeyPatch) -> None:
    store(cache, "engine", b"engine")

    def refused(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(cache.root))

    monkeypatch.setattr("nitro_engines.prune.Path.unlink", refused)
    with pytest.raises(BuildError, match="pruning the cache failed at .*Permission denied"):
        prune(cache, max_bytes=0)

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
from filelock import FileLock

from nitro_engines.cache import EngineCache, default_cache_root
from nitro_engines.keys import key_of
from nitro_rt.errors import BuildError, BundleError
from nitro_rt.manifest import Engine, FileRef, TensorSpec

FIELDS = {"stage": "text", "steps": [1]}
KEY = key_of(FIELDS)
SPEC = TensorSpec(name="x", dtype="float32", shape=(1,))


def store(cache: EngineCache, content: bytes = b"engine") -> Engine:
    with cache.making(KEY, "a test engine") as work:
        path = work / "engine.bin"
        path.write_bytes(content)
        engine = Engine(
            backend="copy",
            precision="fp32",
            compute_dtype="float32",
            files=(cache.adopt(path),),
            inputs=(SPEC,),
            outputs=(SPEC,),
            key=KEY,
        )
        cache.store(engine, FIELDS, work)
    return engine


def test_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NITRO_RT_CACHE", str(tmp_path / "chosen"))
    assert default_cache_root() == tmp_path / "chosen"
    monkeypatch.delenv("NITRO_RT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    assert default_cache_root() == tmp_path / "home" / "nitro-rt"


def test_hit_and_miss(cache: EngineCache) -> None:
    assert cache.find(KEY) is None and not cache.has(KEY)
    engine = store(cache)
    assert cache.find(KEY) == engine and cache.has(KEY)
    assert cache.path(engine.files[0]).read_bytes() == b"engine"
    assert cache.find(key_of(FIELDS | {"steps": [2]})) is None


@pytest.mark.parametrize("content", [None, b"", b"engin", b"Engine", b"engine and more"])
def test_a_damaged_file_is_noticed_removed_and_replaced(cache: EngineCache, content: bytes | None) -> None:
    engine = store(cache)
    path = cache.path(engine.files[0])
    path.unlink() if content is None else path.write_bytes(content)
    lines: list[str] = []
    assert cache.find(KEY, lines.append) is None
    assert len(lines) == 1 and "damaged and is built again" in lines[0] and path.name in lines[0]
    assert not path.exists()
    assert cache.find(store(cache).key) == engine


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"schema_version": 99}', b"\xff\xfe".decode("latin-1"), '{"schema_version": 1, "fields": {}}']
)
def test_a_damaged_entry_is_noticed(cache: EngineCache, text: str) -> None:
    store(cache)
    entry = cache.engines / "entries" / f"{KEY}.json"
    entry.write_text(text, encoding="latin-1")
    lines: list[str] = []
    assert cache.find(KEY, lines.append) is None
    assert "damaged and is built again" in lines[0]


def test_an_entry_of_another_key_is_refused(cache: EngineCache) -> None:
    store(cache)
    entry = cache.engines / "entries" / f"{KEY}.json"
    edited = json.loads(entry.read_text())
    edited["fields"]["steps"] = [4]
    entry.write_text(json.dumps(edited))
    assert cache.find(KEY) is None


@pytest.mark.parametrize("path", ["../../secret", "/etc/passwd", "files/../../../secret", "files\\x"])
def test_an_entry_that_points_outside_is_refused_and_nothing_is_deleted(cache: EngineCache, path: str) -> None:
    store(cache)
    secret = cache.root.parent / "secret"
    secret.write_text("kept")
    entry = cache.engines / "entries" / f"{KEY}.json"
    edited = json.loads(entry.read_text())
    edited["engine"]["files"][0]["path"] = path
    entry.write_text(json.dumps(edited))
    assert cache.find(KEY) is None
    assert secret.read_text() == "kept"
    with pytest.raises(BundleError, match="leaves the folder"):
        cache.path(FileRef(path=path, sha256="", num_bytes=0))


def test_equal_files_are_stored_once(cache: EngineCache) -> None:
    assert store(cache).files == store(cache).files
    assert len(list((cache.engines / "files").iterdir())) == 1


def test_work_folders_vanish_also_after_an_interrupt(cache: EngineCache) -> None:
    with pytest.raises(KeyboardInterrupt), cache.making(KEY, "a test engine") as work:
        (work / "half").write_text("half")
        raise KeyboardInterrupt
    assert not list((cache.root / "work").iterdir())


def test_sweep_takes_the_dead_and_leaves_the_living(cache: EngineCache) -> None:
    with cache.making("living", "a test engine") as work:
        (cache.root / "work" / "dead").mkdir()
        lines: list[str] = []
        cache.sweep(lines.append)
        assert work.is_dir() and not (cache.root / "work" / "dead").exists()
    assert len(lines) == 1 and "dead" in lines[0]


def test_the_next_builder_of_a_key_starts_in_an_empty_folder(cache: EngineCache) -> None:
    left = cache.root / "work" / KEY
    left.mkdir(parents=True)
    (left / "half").write_text("half")
    with cache.making(KEY, "a test engine") as work:
        assert work == left and not list(work.iterdir())


def test_a_held_key_is_held(cache: EngineCache) -> None:
    with cache.making(KEY, "a test engine"):
        lock = FileLock(cache.root / "locks" / f"{KEY}.lock")
        with pytest.raises(TimeoutError):
            lock.acquire(timeout=0)


def test_a_full_disk_is_said(cache: EngineCache, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(BuildError, match="No space left on device; .* MiB are free there: free some space"):
        store(cache)
    assert cache.find(KEY) is None


def test_a_cache_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BuildError, match="preparing the cache failed"):
        store(EngineCache(tmp_path / "file" / "cache"))


def test_builds_are_remembered_and_damaged_records_left_out(cache: EngineCache) -> None:
    assert cache.known_builds() == {}
    with cache.making(KEY, "a record") as work:
        cache.remember_build(KEY, FIELDS, work)
    (cache.root / "builds" / f"{'0' * 64}.json").write_text("{")
    (cache.root / "builds" / f"{'1' * 64}.json").write_text('{"steps": [9]}')
    assert cache.known_builds() == {KEY: FIELDS}

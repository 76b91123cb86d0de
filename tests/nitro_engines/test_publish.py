from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nitro_engines.bundle import bundle_from_graphs
from nitro_engines.cache import EngineCache
from nitro_engines.publish import files_of, prepare, publish_bundle
from nitro_rt.bundle import open_bundle
from nitro_rt.errors import BuildError
from nitro_rt.manifest import BundleManifest

Publish = Callable[..., bool]


@pytest.fixture
def manifests(make_graphs: Callable[..., Path], cache: EngineCache, backend: Any, tmp_path: Path) -> list[BundleManifest]:
    """Two bundles whose files are in the cache."""
    graphs = [make_graphs("first", seed=0), make_graphs("second", seed=5)]
    return [bundle_from_graphs(g, tmp_path / "elsewhere" / g.name, backend, cache).manifest for g in graphs]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "engines" / "bundle"


@pytest.fixture
def publish(cache: EngineCache, out: Path) -> Publish:
    return lambda manifest: publish_bundle(out, manifest, cache.path)


def whole(out: Path, manifest: BundleManifest) -> bool:
    bundle = open_bundle(out)
    bundle.verify()
    return bundle.manifest == manifest and [path.name for path in out.parent.iterdir()] == [out.name]


def test_published_whole_with_hard_links(
    out: Path, manifests: list[BundleManifest], publish: Publish, cache: EngineCache
) -> None:
    assert publish(manifests[0])
    assert whole(out, manifests[0])
    for reference in files_of(manifests[0]):
        assert (out / reference.path).samefile(cache.path(reference))


def test_copied_across_file_systems(
    out: Path, manifests: list[BundleManifest], publish: Publish, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other_device(source: Path, target: Path) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "link", other_device)
    assert publish(manifests[0])
    assert whole(out, manifests[0])
    assert all(path.stat().st_nlink == 1 for path in (out / "files").iterdir())


def test_the_same_bundle_is_left_alone(out: Path, manifests: list[BundleManifest], publish: Publish) -> None:
    publish(manifests[0])
    before = out.stat().st_ino
    assert not publish(manifests[0])
    assert out.stat().st_ino == before


def test_an_older_bundle_is_replaced(out: Path, manifests: list[BundleManifest], publish: Publish) -> None:
    publish(manifests[0])
    assert publish(manifests[1])
    assert whole(out, manifests[1])


@pytest.mark.parametrize("damage", ["cut manifest", "no manifest", "cut file", "extra engine", "empty folder"])
def test_a_damaged_bundle_is_replaced(out: Path, manifests: list[BundleManifest], publish: Publish, damage: str) -> None:
    publish(manifests[0])
    file = out / files_of(manifests[0])[0].path
    match damage:
        case "cut manifest":
            (out / "bundle.json").write_text("{")
        case "no manifest":
            (out / "bundle.json").unlink()
        case "cut file":
            file.unlink()
            file.write_bytes(b"")
        case "extra engine":
            (out / "files" / f"{'0' * 64}.xml").write_text("")
        case "empty folder":
            shutil.rmtree(out)
            out.mkdir()
    assert publish(manifests[0])
    assert whole(out, manifests[0])


@pytest.mark.parametrize("name", ["holiday.jpg", "files/notes.txt", "files/deep/holiday.jpg", "sub/bundle.json", ".hidden"])
def test_a_folder_with_anything_else_is_refused_and_kept(
    out: Path, manifests: list[BundleManifest], publish: Publish, name: str
) -> None:
    publish(manifests[0])
    precious = out / name
    precious.parent.mkdir(parents=True, exist_ok=True)
    precious.write_text("mine")
    for attempt in (lambda: publish(manifests[1]), lambda: prepare(out)):
        with pytest.raises(BuildError, match="no part of a bundle"):
            attempt()
    assert precious.read_text() == "mine"
    assert open_bundle(out).manifest == manifests[0]


def test_a_file_in_the_way_is_refused(out: Path, manifests: list[BundleManifest], publish: Publish) -> None:
    out.parent.mkdir()
    out.write_text("mine")
    with pytest.raises(BuildError, match="is a file"):
        publish(manifests[0])
    assert out.read_text() == "mine"


def test_a_parent_that_is_a_file_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BuildError, match="preparing the output folder failed"):
        prepare(tmp_path / "file" / "bundle")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_unwritable_parent_is_said(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o555)
    with pytest.raises(BuildError, match="make it writable, or choose another folder"):
        prepare(tmp_path / "locked" / "bundle")


def test_a_refused_write_is_said(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As above for root too: the system's refusal, raised by hand."""

    def refused(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(out.parent))

    monkeypatch.setattr(os, "mkdir", refused)
    with pytest.raises(BuildError, match="Permission denied; make it writable, or choose another folder"):
        prepare(out)


@pytest.mark.parametrize("call", ["link", "rename", "fsync"])
@pytest.mark.parametrize("older", [False, True])
def test_a_full_disk_leaves_what_was_there(
    out: Path, manifests: list[BundleManifest], publish: Publish, monkeypatch: pytest.MonkeyPatch, call: str, older: bool
) -> None:
    if older:
        publish(manifests[0])

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, call, full)
        with pytest.raises(BuildError, match="No space left on device.*nothing was published"):
            publish(manifests[1])
    prepare(out)
    assert whole(out, manifests[0]) if older else not list(out.parent.iterdir())
    publish(manifests[1])
    assert whole(out, manifests[1])


@pytest.mark.parametrize(
    ("states", "kept"),
    [
        (("new",), None),
        (("out", "new"), 0),
        (("old", "new"), 0),
        (("old",), 0),
        (("out", "old"), 0),
        (("out", "old", "trash"), 0),
        (("out", "trash"), 0),
        (("trash",), None),
    ],
)
def test_every_place_where_a_publication_can_be_cut(
    out: Path, manifests: list[BundleManifest], publish: Publish, states: tuple[str, ...], kept: int | None
) -> None:
    publish(manifests[0])
    complete = out.rename(out.with_name("complete"))
    for state in states:
        shutil.copytree(complete, out if state == "out" else out.with_name(f".{out.name}.nitro-{state}"))
        if state in ("new", "trash"):  # perhaps half done
            (out.with_name(f".{out.name}.nitro-{state}") / "bundle.json").unlink()
    shutil.rmtree(complete)
    prepare(out)
    assert not list(out.parent.iterdir()) if kept is None else whole(out, manifests[kept])


def test_leftovers_of_other_bundles_in_the_folder_are_put_right(
    out: Path, manifests: list[BundleManifest], publish: Publish
) -> None:
    publish(manifests[0])
    out.rename(out.with_name(".other.nitro-old"))
    out.with_name(".third.nitro-new").mkdir()
    publish(manifests[1])
    prepare(out)
    assert sorted(path.name for path in out.parent.iterdir()) == ["bundle", "other"]
    assert open_bundle(out.with_name("other")).manifest == manifests[0]


def test_a_link_to_a_bundle_stays_a_link(
    out: Path, manifests: list[BundleManifest], publish: Publish, cache: EngineCache
) -> None:
    publish(manifests[0])
    link = out.parent.parent / "link"
    link.symlink_to(out)
    assert publish_bundle(link, manifests[1], cache.path)
    assert link.is_symlink() and whole(out, manifests[1])


def test_a_file_that_changed_meanwhile_is_not_published(out: Path, manifests: list[BundleManifest], tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text("other")
    with pytest.raises(BuildError, match="changed while the bundle was assembled"):
        publish_bundle(out, manifests[0], lambda reference: other)
    assert not list(out.parent.iterdir())

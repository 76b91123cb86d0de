"""Opening and verifying bundles, and every way in which one can be wrong."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nitro_rt.bundle import open_bundle
from nitro_rt.errors import BundleError, ModelNotFound, NitroError
from nitro_rt.manifest import BUNDLE_FILE

Edit = Callable[[Path, Callable[[dict[str, Any]], None]], None]


def test_a_whole_bundle_opens_and_verifies(bundle_folder: Path) -> None:
    bundle = open_bundle(bundle_folder)
    bundle.verify()
    assert bundle.backend == "reference"
    assert bundle.built_steps == (1, 2)
    assert bundle.latent_CHW == (4, 4, 4)
    assert [stage for stage, _ in bundle.engines()] == ["text", "denoise/1", "denoise/2", "decode"]
    assert len(bundle.files()) == len({file.path for file in bundle.files()}) == 4  # so are the tokenizers, and the denoisers


def test_the_digest_names_the_manifest(bundle_folder: Path, edit_manifest: Edit) -> None:
    before = open_bundle(bundle_folder).digest
    edit_manifest(bundle_folder, lambda data: data.update(name="other"))
    assert len(before) == 64 and open_bundle(bundle_folder).digest != before


def test_no_bundle_there(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="no bundle at .*nowhere; build one"):
        open_bundle(tmp_path / "nowhere")


def test_a_folder_without_manifest(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="is not a bundle: it has no bundle.json"):
        open_bundle(tmp_path)


def test_a_file_instead_of_a_folder(bundle_folder: Path) -> None:
    with pytest.raises(ModelNotFound, match="is not a bundle"):
        open_bundle(bundle_folder / BUNDLE_FILE)


def _set(*path: Any, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(data: Any) -> None:
        for key in path[:-1]:
            data = data[key]
        data[path[-1]] = to

    return change


def _text_output(**facts: Any) -> Callable[[dict[str, Any]], None]:
    """The prompt embeddings edited alike wherever they stand, so that the parts agree."""

    def change(data: dict[str, Any]) -> None:
        data["text"]["outputs"][0].update(facts)
        for engine in data["denoise"].values():
            engine["inputs"][1].update(facts)

    return change


MANIFEST_EDITS = {
    "schema version": (_set("schema_version", to=99), "schema version 99, this nitro-rt reads 1"),
    "unknown field": (_set("colour", to="red"), "unknown field 'colour'"),
    "lost field": (lambda data: data.pop("batch"), "lacks the field 'batch'"),
    "wrong type": (_set("batch", to="two"), "batch must be int, found 'two'"),
    "path upwards": (_set("decode", "files", 0, "path", to="../../secret"), "leaves the folder"),
    "absolute path": (_set("text", "files", 0, "path", to="/etc/passwd"), "leaves the folder"),
    "tokenizer path upwards": (_set("tokenizers", 1, "file", "path", to="files/../../x"), "leaves the folder"),
    "no denoiser": (lambda data: data["denoise"].clear(), "names no denoiser"),
    "steps without schedule": (lambda data: data["schedule"]["steps"].pop("2"), "schedules for \\[1\\]"),
    "one tokenizer": (lambda data: data["tokenizers"].pop(), "names 1 tokenizers, SDXL has 2"),
    "a size without engines": (
        _set("sizes_px", to=[32, 64]),
        "names the sizes \\[32, 64\\] and has engines for the first and \\[\\]",
    ),
    "no size": (_set("sizes_px", to=[]), "names the sizes \\[\\]"),
    "no files": (_set("decode", "files", to=[]), "names no file for decode"),
    "another row": (_set("denoise", "2", "first_row", to=2), "has denoise/2 begin at row 2 of its step tables, not 1"),
    "a row before the first": (_set("denoise", "1", "first_row", to=-1), "has denoise/1 begin at row -1 .*, not 0"),
    "mixed backends": (_set("text", "backend", to="openvino"), "mixes the backends"),
    "renamed input": (_set("decode", "inputs", 0, "name", to="z"), "has decode with inputs"),
    "lost output": (lambda data: data["text"]["outputs"].pop(), "has text with outputs"),
    "another batch": (_set("batch", to=3), "the rest needs"),
    "another size": (_set("sizes_px", to=[64]), "has decode's images as uint8"),
    "another dtype": (_set("denoise", "1", "inputs", 4, "dtype", to="float16"), "has denoise/1's noise as float16"),
    "another width": (_set("denoise", "2", "inputs", 1, "shape", to=[2, 12, 7]), "has denoise/2's prompt_embeds"),
    "unknown dtype": (_text_output(dtype="float99"), "has text's prompt_embeds as float99 .*, not of float32, "),
    "no NumPy dtype": (_text_output(dtype="not a type"), "has text's prompt_embeds as not a type "),
    "object dtype": (_text_output(dtype="object"), "has text's prompt_embeds as object "),
    "negative dimension": (_text_output(shape=[2, -12, 6]), "\\[2, -12, 6\\], .* of positive sizes"),
    "zero dimension": (_text_output(shape=[2, 12, 0]), "\\[2, 12, 0\\], .* of positive sizes"),
}


@pytest.mark.parametrize("name", MANIFEST_EDITS)
def test_an_edited_manifest_is_refused(name: str, bundle_folder: Path, edit_manifest: Edit) -> None:
    change, message = MANIFEST_EDITS[name]
    edit_manifest(bundle_folder, change)
    with pytest.raises(BundleError, match=message):
        open_bundle(bundle_folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"{}"])
def test_a_broken_manifest_is_refused(content: bytes, bundle_folder: Path) -> None:
    (bundle_folder / BUNDLE_FILE).write_bytes(content)
    with pytest.raises(BundleError, match=BUNDLE_FILE):
        open_bundle(bundle_folder)


def test_a_link_out_of_the_bundle_is_refused(bundle_folder: Path, tmp_path: Path) -> None:
    path = _engine_path(bundle_folder)
    shutil.move(path, tmp_path / "outside")
    path.symlink_to(tmp_path / "outside")
    with pytest.raises(BundleError, match="leaves the folder"):
        open_bundle(bundle_folder)


FILE_DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: path.unlink(), "is missing"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-1]), "cut or changed"),
    "emptied": (lambda path: path.write_bytes(b""), "cut or changed"),
    "one byte changed": (lambda path: path.write_bytes(b"X" + path.read_bytes()[1:]), "sha256 .* changed"),
    "a folder instead": (lambda path: (path.unlink(), path.mkdir()), "is missing"),
}


@pytest.mark.parametrize("name", FILE_DAMAGES)
def test_a_damaged_file_is_refused(name: str, bundle_folder: Path) -> None:
    damage, message = FILE_DAMAGES[name]
    damage(_engine_path(bundle_folder))
    bundle = open_bundle(bundle_folder)
    for check in (bundle.check_files, bundle.verify):
        with pytest.raises(BundleError, match=message):
            check()


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_an_unreadable_file_is_refused(bundle_folder: Path) -> None:
    _engine_path(bundle_folder).chmod(0)
    with pytest.raises(BundleError, match="cannot be read"):
        open_bundle(bundle_folder).check_files()


@pytest.mark.parametrize("extra", ["note.txt", "files/more.bin", "deep/er/.hidden"])
def test_extra_files_fail_verification_only(extra: str, bundle_folder: Path) -> None:
    path = bundle_folder / extra
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("?")
    bundle = open_bundle(bundle_folder)
    bundle.check_files()
    assert bundle.extra_files() == (extra,)
    with pytest.raises(BundleError, match="which its manifest does not name"):
        bundle.verify()


def test_a_linked_folder_is_extra(bundle_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (bundle_folder / "link").symlink_to(tmp_path / "elsewhere")
    assert open_bundle(bundle_folder).extra_files() == ("link",)


@pytest.mark.parametrize("field", ["timesteps", "shifted_timesteps", "alpha", "sigma", "next_alpha", "next_sigma"])
def test_edited_schedule_constants_fail_verification(field: str, bundle_folder: Path, edit_manifest: Edit) -> None:
    def change(data: dict[str, Any]) -> None:
        data["schedule"]["steps"]["2"][field][0] += 1 if field.endswith("timesteps") else 1e-4

    edit_manifest(bundle_folder, change)
    with pytest.raises(BundleError, match=f"schedule of 2 steps at shift 250 has {field}"):
        open_bundle(bundle_folder).verify()


@pytest.mark.parametrize(
    "change",
    [
        _set("engine_key", to="e" * 64),
        _set("engine_key_fields", "backend", to="other"),
        _set("engine_key_fields", "\ud800", to=1),
    ],
    ids=["key", "field", "no UTF-8"],
)
def test_an_edited_engine_key_fails_verification(change: Any, bundle_folder: Path, edit_manifest: Edit) -> None:
    edit_manifest(bundle_folder, change)
    with pytest.raises(BundleError, match="the engine key is [0-9a-f]{64}, its fields give [0-9a-f]{64}"):
        open_bundle(bundle_folder).verify()


def test_all_of_it_is_a_nitro_error(bundle_folder: Path) -> None:
    data = json.loads((bundle_folder / BUNDLE_FILE).read_text())
    data["schedule"]["steps"]["7"] = data["schedule"]["steps"].pop("2")
    data["denoise"]["7"] = data["denoise"].pop("2")
    (bundle_folder / BUNDLE_FILE).write_text(json.dumps(data))
    with pytest.raises(NitroError, match="steps must be from 1 to 4"):
        open_bundle(bundle_folder).verify()


def _engine_path(folder: Path) -> Path:
    bundle = open_bundle(folder)
    return bundle.path(bundle.manifest.decode.files[0])

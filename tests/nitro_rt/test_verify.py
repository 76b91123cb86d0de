"""The full check: it passes on whole bundles and fails on what draws nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nitro_rt.bundle import open_bundle
from nitro_rt.errors import BundleError, EngineMismatch
from nitro_rt.manifest import check_file
from nitro_rt.verify import verify_bundle


@pytest.mark.parametrize("backend", ["reference", "onnxruntime", "openvino"])
def test_a_whole_bundle_passes(backend: str, make_bundle: Any, tmp_path: Path) -> None:
    checks = list(verify_bundle(make_bundle(tmp_path / "bundle", backend=backend)))
    assert [check.name for check in checks] == ["manifest", "files", "schedule", "image, 1 step", "image, 2 steps"]
    assert all(check.status == "ok" for check in checks)


def test_a_uniform_image_fails(bundle_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nitro_rt.reference_session.ReferenceSession._decode", lambda self: self._buffers["images"].fill(0))
    with pytest.raises(BundleError, match="uniform image at 1 steps"):
        list(verify_bundle(bundle_folder))


def test_a_host_engine_that_does_not_load_fails(make_bundle: Any, tmp_path: Path, edit_manifest: Any) -> None:
    folder = make_bundle(tmp_path / "bundle", backend="reference")
    bundle = open_bundle(folder)
    other = bundle.manifest.text.files[0].__dict__
    edit_manifest(folder, lambda data: data["decode"].update(files=[dict(other)]))
    check_file(folder, bundle.manifest.text.files[0])
    path = bundle.path(bundle.manifest.decode.files[0])
    path.unlink()
    # The decoder's file now is the text engine: digests agree, the engine does not fit.
    with pytest.raises(Exception, match="decode|prompt_embeds|input_ids"):
        list(verify_bundle(folder))


def test_an_engine_of_rubbish_with_a_right_digest_fails(make_bundle: Any, tmp_path: Path, edit_manifest: Any) -> None:
    import hashlib

    folder = make_bundle(tmp_path / "bundle", backend="onnxruntime")
    old = open_bundle(folder).manifest.decode.files[0]
    (folder / old.path).write_bytes(b"rubbish")
    digest = hashlib.sha256(b"rubbish").hexdigest()
    edit_manifest(folder, lambda data: data["decode"]["files"][0].update(sha256=digest, num_bytes=7))
    with pytest.raises(EngineMismatch, match="cannot load decode"):
        list(verify_bundle(folder))

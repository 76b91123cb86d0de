"""The full check: it passes on whole bundles and fails on what draws nothing."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nitro_rt.bundle import open_bundle
from nitro_rt.errors import BundleError, EngineMismatch
from nitro_rt.manifest import BUNDLE_FILE, BundleManifest, FileRef, Reference, check_file, sealed, to_json
from nitro_rt.pipeline import Pipeline
from nitro_rt.quality import LIMITS, QualityResult, Spread
from nitro_rt.verify import verify_bundle

PROMPTS = {20_000: "a red apple", 20_001: "the blue dog on a house", 20_002: "two green pear"}


@pytest.fixture
def referenced(bundle_folder: Path) -> Path:
    """The bundle with its own pictures as references: PSNR is the largest there is. Batch 2, three prompts."""
    references = []
    with Pipeline.load(bundle_folder) as pipe:
        for steps in pipe.bundle.built_steps:
            for seed, prompt in PROMPTS.items():
                file = store(bundle_folder, np.asarray(pipe(prompt, seed=[seed], steps=steps).images[0]))
                references.append(Reference(prompt=prompt, seed=seed, steps=steps, file=file))
    rewrite(bundle_folder, lambda manifest: dataclasses.replace(manifest, references=tuple(references)))
    return bundle_folder


def store(folder: Path, picture_HW3: np.ndarray) -> FileRef:
    content = io.BytesIO()
    Image.fromarray(picture_HW3).save(content, format="PNG")
    digest = hashlib.sha256(content.getvalue()).hexdigest()
    path = folder / "files" / f"{digest}.png"
    path.write_bytes(content.getvalue())
    return FileRef(path=f"files/{digest}.png", sha256=digest, num_bytes=path.stat().st_size)


def rewrite(folder: Path, change: Callable[[BundleManifest], BundleManifest]) -> None:
    manifest = sealed(change(open_bundle(folder).manifest))
    (folder / BUNDLE_FILE).write_text(to_json(manifest), encoding="utf-8")


def spoilt(folder: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Another picture takes the place of the last reference, with right digests."""

    def replaced(manifest: BundleManifest) -> BundleManifest:
        *kept, last = manifest.references
        with Image.open(folder / last.file.path) as image:
            picture = np.asarray(image)
        if sum(reference.file == last.file for reference in manifest.references) == 1:
            (folder / last.file.path).unlink()
        return dataclasses.replace(manifest, references=(*kept, dataclasses.replace(last, file=store(folder, change(picture)))))

    rewrite(folder, replaced)


def quality_result(**changes: Any) -> QualityResult:
    spread = Spread(worst=100.0, mean=100.0, median=100.0)
    dtypes = {"text": "float32", "denoise/2": "float32", "decode": "float32"}
    result = QualityResult(
        num_steps=2,
        num_images=3,
        psnr_db=spread,
        ssim=Spread(worst=1.0, mean=1.0, median=1.0),
        limits=LIMITS["fp32"],
        passed=True,
        loss_allowed=False,
        judged_on="reference",
        compute_dtypes=dtypes,
    )
    return dataclasses.replace(result, **changes)


@pytest.mark.parametrize("backend", ["reference", "onnxruntime", "openvino"])
def test_a_whole_bundle_passes(backend: str, make_bundle: Any, tmp_path: Path) -> None:
    checks = list(verify_bundle(make_bundle(tmp_path / "bundle", backend=backend, steps=(2,))))
    assert [check.name for check in checks] == ["manifest", "files", "schedule", "image, 2 steps", "quality, 2 steps"]
    assert [check.status for check in checks] == [*["ok"] * 4, "skipped"]  # it carries no references


def recipe_of(*sqnr_db: float, kept: int = 0) -> dict[str, Any]:
    layers = [{"name": f"layer.{index}", "sqnr_db": value} for index, value in enumerate(sqnr_db)]
    return {"precision": "int8", "weight_bits": 8, "layers": layers, "kept": [{}] * kept}


def test_the_ten_worst_operators_of_a_quantised_bundle_are_named(referenced: Path) -> None:
    rewrite(referenced, lambda manifest: dataclasses.replace(manifest, quantisation=recipe_of(*range(40, 29, -1), kept=3)))
    check = next(check for check in verify_bundle(referenced) if check.name == "operators")
    assert [error["name"] for error in check.figures["worst"]] == [f"layer.{index}" for index in range(10, 0, -1)]
    assert check.detail.startswith("11 quantised, 3 kept; most error by calibration: layer.10 30.0 dB; layer.9 31.0 dB;")


def test_a_quantised_bundle_that_misses_its_limits_says_which_operators_add_most(referenced: Path) -> None:
    rewrite(referenced, lambda manifest: dataclasses.replace(manifest, quantisation=recipe_of(31.5, 35.25)))
    spoilt(referenced, lambda picture: 255 - picture)
    with pytest.raises(BundleError, match=r"operators: 2 quantised, .*: layer\.0 31\.5 dB; layer\.1 35\.2 dB; build it"):
        list(verify_bundle(referenced))


@pytest.mark.parametrize("recipe", [{"kept": []}, {"layers": [{"name": "a"}], "kept": []}, {"layers": 3}, {"layers": []}])
def test_a_recipe_without_its_layers_is_refused(referenced: Path, recipe: dict[str, Any]) -> None:
    rewrite(referenced, lambda manifest: dataclasses.replace(manifest, quantisation=recipe))
    with pytest.raises(BundleError, match="quantisation recipe .* does not list its layers"):
        list(verify_bundle(referenced))


def test_a_uniform_image_fails(bundle_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nitro_rt.reference_session.ReferenceSession._decode", lambda self: self._buffers["images"].fill(0))
    with pytest.raises(BundleError, match="uniform image at 1 step"):
        list(verify_bundle(bundle_folder))


def test_a_host_engine_that_does_not_load_fails(make_bundle: Any, tmp_path: Path, edit_manifest: Any) -> None:
    folder = make_bundle(tmp_path / "bundle", backend="reference")
    bundle = open_bundle(folder)
    other = bundle.manifest.text.files[0].__dict__
    edit_manifest(folder, lambda data: data["decode"].update(files=[dict(other)]))
    rewrite(folder, lambda manifest: manifest)  # under a new seal
    check_file(folder, bundle.manifest.text.files[0])
    path = bundle.path(bundle.manifest.decode.files[0])
    path.unlink()
    # The decoder's file now is the text engine: digests agree, the engine does not fit.
    with pytest.raises(Exception, match="decode|prompt_embeds|input_ids"):
        list(verify_bundle(folder))


def test_an_engine_of_rubbish_with_a_right_digest_fails(make_bundle: Any, tmp_path: Path, edit_manifest: Any) -> None:
    folder = make_bundle(tmp_path / "bundle", backend="onnxruntime")
    old = open_bundle(folder).manifest.decode.files[0]
    (folder / old.path).write_bytes(b"rubbish")
    digest = hashlib.sha256(b"rubbish").hexdigest()
    edit_manifest(folder, lambda data: data["decode"]["files"][0].update(sha256=digest, num_bytes=7))
    rewrite(folder, lambda manifest: manifest)  # under a new seal
    with pytest.raises(EngineMismatch, match="cannot load decode"):
        list(verify_bundle(folder))


def test_the_comparison_with_the_parent(referenced: Path) -> None:
    checks = {check.name: check for check in verify_bundle(referenced)}
    found = checks["quality, 2 steps"]
    assert found.status == "ok" and found.detail.startswith("PSNR 100.0 dB (limit ") and "of 3 images" in found.detail
    assert found.figures["psnr_db"]["worst"] == 100.0 and found.figures["limits"]["ssim"] == LIMITS["fp32"].ssim
    assert set(json.loads(json.dumps(found.figures))) == {"psnr_db", "ssim", "limits"}


def test_a_bundle_that_draws_otherwise_than_its_parent_fails(referenced: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nitro_rt.reference_session import ReferenceSession

    decode = ReferenceSession._decode

    def wrong(self: ReferenceSession) -> None:
        decode(self)
        self._buffers["images"] //= 2

    monkeypatch.setattr(ReferenceSession, "_decode", wrong)
    with pytest.raises(BundleError, match=r"misses its quality limits at 1 step: PSNR .* dB \(limit .*build it again"):
        list(verify_bundle(referenced))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda picture: picture[::-1], "misses its quality limits at 2 steps"),
        (lambda picture: np.full_like(picture, 9), r"reference 3 of 3 is uniform \(colour \[9, 9, 9\]\)"),
        (lambda picture: np.where(picture > 127, 255, 0).astype(np.uint8), "reference 3 of 3 is saturated"),
        (lambda picture: picture[:16], r"a reference of uint8 \[16, 32, 3\], the bundle draws uint8 \[32, 32, 3\]"),
    ],
)
def test_wrong_references_are_refused(referenced: Path, change: Any, message: str) -> None:
    spoilt(referenced, change)
    with pytest.raises(BundleError, match=message):
        list(verify_bundle(referenced))


def test_a_reference_that_is_no_picture(referenced: Path) -> None:
    def rubbish(manifest: BundleManifest) -> BundleManifest:
        path = referenced / "files" / f"{hashlib.sha256(b'rubbish').hexdigest()}.png"
        path.write_bytes(b"rubbish")
        file = FileRef(path=f"files/{path.name}", sha256=path.stem, num_bytes=7)
        first, *others = manifest.references
        (referenced / first.file.path).unlink()
        return dataclasses.replace(manifest, references=(dataclasses.replace(first, file=file), *others))

    rewrite(referenced, rubbish)
    with pytest.raises(BundleError, match="is no PNG that can be read"):
        list(verify_bundle(referenced))


def test_a_bundle_published_below_its_limits_must_stay_near_what_it_was(referenced: Path) -> None:
    spoilt(referenced, lambda picture: picture[::-1])
    low = Spread(worst=3.5, mean=3.5, median=3.5)
    result = quality_result(psnr_db=low, ssim=Spread(worst=-0.5, mean=0.0, median=0.0), passed=False, loss_allowed=True)
    rewrite(referenced, lambda manifest: dataclasses.replace(manifest, quality_gate=(result,)))
    (check,) = [check for check in verify_bundle(referenced) if check.name == "quality, 2 steps"]
    assert "(limit 0.5)" in check.detail and check.detail.endswith("published with --allow-quality-loss")
    better = dataclasses.replace(result, psnr_db=Spread(worst=60.0, mean=60.0, median=60.0))
    rewrite(referenced, lambda manifest: dataclasses.replace(manifest, quality_gate=(better,)))
    with pytest.raises(BundleError, match=r"\(limit 57\).*where it was built it had PSNR 60.0 dB"):
        list(verify_bundle(referenced))


def test_a_machine_that_computes_in_a_narrower_type_has_its_limits(referenced: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rewrite(referenced, lambda manifest: dataclasses.replace(manifest, quality_gate=(quality_result(),)))
    monkeypatch.setattr("nitro_rt.reference_session.ReferenceSession.compute_dtype", "bfloat16")
    checks = {check.name: check for check in verify_bundle(referenced)}
    assert checks["quality, 2 steps"].figures["limits"]["psnr_db"] == LIMITS["bf16"].psnr_db


@pytest.mark.parametrize(
    "edit",
    [
        lambda data: data["source"].update(licence="MIT"),
        lambda data: data["memory_plan"].update(io_bytes=2),
        lambda data: data["references"][0].update(prompt="a green apple"),
        lambda data: data.pop("manifest_sha256"),
    ],
)
def test_an_edit_of_any_field_is_noticed(referenced: Path, edit_manifest: Any, edit: Any) -> None:
    edit_manifest(referenced, edit)
    with pytest.raises(BundleError, match=r"bundle.json was edited: its digest is .*build again"):
        list(verify_bundle(referenced))

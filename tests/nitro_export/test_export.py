"""The whole export: the parity ladder against diffusers, the manifest's contract, bad requests, whole or absent."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from nitro_export import checkpoint_sha256, export_checkpoint, toolchain
from nitro_export.export import assembled
from nitro_rt.errors import ConfigError, ExportError, ModelNotFound
from nitro_rt.manifest import EXPORT_FILE, Graph, GraphsManifest, check_file, from_json
from oracle import oracle_images

Exported = Callable[..., tuple[Path, GraphsManifest]]
Draw = Callable[..., NDArray[np.uint8]]

PROMPTS = ["a red apple", "the blue cat and the dog, on a star!", ""]
ALL_STEPS = (1, 2, 3, 4)
SHIFTED = {
    250: {1: (249,), 2: (249, 124), 3: (249, 187, 124), 4: (249, 187, 124, 62)},
    500: {1: (499,), 2: (499, 249), 3: (499, 374, 249), 4: (499, 374, 249, 124)},
}
# Image against image, in dB; measured on these checkpoints: fp32 89 or equal bytes, fp16 63 with the decoder in float32.
# fp32: the same arithmetic summed in another order, so single levels at most. fp16: 11-bit weights and activations.
# A wrong shift, prompt or seed gives less than 35 (test_a_wrong_seed_shift_or_prompt_would_show).
PSNR_DB = {"fp32": 45.0, "fp16": 35.0}


def _psnr(found: NDArray[np.uint8], expected: NDArray[np.uint8]) -> float:
    assert found.shape == expected.shape and found.dtype == expected.dtype == np.uint8
    error = np.mean((found.astype(np.float64) - expected) ** 2)
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


@pytest.mark.parametrize("steps", ALL_STEPS)
@pytest.mark.parametrize(
    ("batch", "shift"),
    [
        (3, 500),  # the graphs of the tests below
        # Whole bundles at shift 250, and at batch 1, are compared with diffusers in tests/nitro_rt.
        pytest.param(1, 250, marks=pytest.mark.slow),
        pytest.param(1, 500, marks=pytest.mark.slow),
        pytest.param(3, 250, marks=pytest.mark.slow),
    ],
)
def test_images_equal_those_of_diffusers(
    tiny_kl: Path, exported: Exported, draw: Draw, batch: int, shift: int, steps: int
) -> None:
    folder, manifest = exported(tiny_kl, steps=ALL_STEPS, shift=shift, batch=batch)
    assert {count: schedule.shifted_timesteps for count, schedule in manifest.schedule.steps.items()} == SHIFTED[shift]
    for seed in (0, 7):
        expected = oracle_images(tiny_kl, PROMPTS[:batch], seed=seed, steps=steps, shift=shift)
        found = draw(folder, manifest, PROMPTS[:batch], seed=seed, steps=steps)
        assert expected.std() > 20  # a uniform picture would equal anything
        assert _psnr(found, expected) >= PSNR_DB["fp32"]


def test_a_wrong_seed_shift_or_prompt_would_show(tiny_kl: Path) -> None:
    """That the ladder can fail: each of these is far below its threshold."""
    right = oracle_images(tiny_kl, PROMPTS[:1], seed=0, steps=2, shift=500)
    np.testing.assert_array_equal(oracle_images(tiny_kl, PROMPTS[:1], seed=0, steps=2, shift=500), right)
    assert _psnr(oracle_images(tiny_kl, PROMPTS[:1], seed=1, steps=2, shift=500), right) < 25
    assert _psnr(oracle_images(tiny_kl, PROMPTS[:1], seed=0, steps=2, shift=250), right) < 35
    assert _psnr(oracle_images(tiny_kl, PROMPTS[1:2], seed=0, steps=2, shift=500), right) < 35


@pytest.mark.slow
def test_another_size_and_the_tiny_decoder(tiny_tiny: Path, exported: Exported, draw: Draw) -> None:
    # The very graphs of the next test's second case: an export takes longer than all that is asked of it.
    folder, manifest = exported(tiny_tiny, steps=(1, 4), precision="fp16", size_px=96)
    assert manifest.size_px == 96 and manifest.schedule.shift == 500
    expected = oracle_images(tiny_tiny, PROMPTS[:1], seed=3, steps=4, shift=500, size_px=96)
    assert expected.shape == (1, 96, 96, 3)
    assert _psnr(draw(folder, manifest, PROMPTS[:1], seed=3, steps=4), expected) >= PSNR_DB["fp16"]


@pytest.mark.parametrize(
    ("kind", "decoder", "size_px"), [("kl", "float32", 64), pytest.param("tiny", "float16", 96, marks=pytest.mark.slow)]
)
def test_float16_images_are_near(
    request: pytest.FixtureRequest, exported: Exported, draw: Draw, kind: str, decoder: str, size_px: int
) -> None:
    """The KL decoder's config says force_upcast, as SDXL's does: it stays float32, and the manifest says so."""
    checkpoint: Path = request.getfixturevalue(f"tiny_{kind}")
    folder, manifest = exported(checkpoint, steps=(1, 4), precision="fp16", size_px=size_px)
    assert (manifest.precision, manifest.text.compute_dtype, manifest.denoise[1].compute_dtype) == (
        "fp16",
        "float16",
        "float16",
    )
    assert manifest.decode.compute_dtype == decoder
    assert ("force_upcast" in manifest.decode.note) == (decoder == "float32")
    dtypes = {spec.name: spec.dtype for spec in (*manifest.denoise[4].inputs, *manifest.denoise[4].outputs)}
    assert dtypes.pop("prompt_embeds") == dtypes.pop("pooled_prompt_embeds") == "float16"
    assert dtypes == {"latents": "float32", "step_index": "int64", "noise": "float32", "next_latents": "float32"}
    assert {spec.dtype for spec in manifest.text.outputs} == {"float16"}
    for graph in (manifest.text, *manifest.denoise.values()):
        types = {tensor.data_type for tensor in _initializers(folder, graph) if len(tensor.dims) >= 2} - {
            onnx.TensorProto.INT64
        }
        assert types == {onnx.TensorProto.FLOAT16}  # a float32 weight would give a float32 engine without a word
    for steps in (1, 4):
        expected = oracle_images(checkpoint, PROMPTS[:1], seed=0, steps=steps, shift=500, size_px=size_px)
        assert _psnr(draw(folder, manifest, PROMPTS[:1], seed=0, steps=steps), expected) >= PSNR_DB["fp16"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"steps": ALL_STEPS, "shift": 500, "batch": 3}, r"weight files: 4 linked, 0 copied, 1 written; 6 tensors folded"),
        # The KL decoder stays float32, as it is stored.
        (
            {"steps": (1, 4), "precision": "fp16", "size_px": 64},
            r"weight files: 1 linked, 0 copied, 3 written; \d+ tensors converted from float32 to float16; 6 tensors folded",
        ),
    ],
)
def test_the_report_says_where_weights_come_from(tiny_kl: Path, exported: Exported, options: dict[str, Any], says: str) -> None:
    folder, _ = exported(tiny_kl, **options)
    [found] = [line for line in folder.with_name("report.txt").read_text().splitlines() if line.startswith("weight files")]
    assert re.fullmatch(says, found)


def _initializers(folder: Path, graph: Graph) -> list[onnx.TensorProto]:
    return list(onnx.load(folder / graph.files[0].path, load_external_data=False).graph.initializer)


def test_the_manifest_keeps_the_contract(tiny_kl: Path, exported: Exported) -> None:
    folder, manifest = exported(tiny_kl, steps=ALL_STEPS, shift=500, batch=3)
    text = (folder / EXPORT_FILE).read_text()
    assert from_json(GraphsManifest, text, where="export.json") == manifest

    def of(specs: Any) -> list[tuple[Any, ...]]:
        return [(spec.name, spec.dtype, *spec.shape) for spec in specs]

    latents = ("float32", 3, 4, 8, 8)
    embeds, pooled = ("prompt_embeds", "float32", 3, 77, 80), ("pooled_prompt_embeds", "float32", 3, 48)
    assert of(manifest.text.inputs) == [("input_ids", "int64", 3, 77), ("input_ids_2", "int64", 3, 77)]
    assert of(manifest.text.outputs) == [embeds, pooled]
    for graph in manifest.denoise.values():
        assert of(graph.inputs) == [("latents", *latents), embeds, pooled, ("step_index", "int64", 1), ("noise", *latents)]
        assert of(graph.outputs) == [("next_latents", *latents)]
    assert of(manifest.decode.inputs) == [("latents", *latents)]
    assert of(manifest.decode.outputs) == [("images", "uint8", 3, 64, 64, 3)]

    graphs = [manifest.text, *manifest.denoise.values(), manifest.decode]
    references = [file for graph in graphs for file in graph.files] + [spec.file for spec in manifest.tokenizers]
    for reference in references:
        check_file(folder, reference)
    assert {path.name for path in folder.iterdir()} == {EXPORT_FILE, *(reference.path for reference in references)}
    assert len({graph.files[1] for graph in manifest.denoise.values()}) == 1  # one weight file for all step counts
    assert all(0 <= graph.parity_max_abs < 1e-2 for graph in graphs[:-1]) and manifest.decode.parity_max_abs <= 1


def test_the_manifest_says_where_it_comes_from(tiny_kl: Path, exported: Exported) -> None:
    _, manifest = exported(tiny_kl, steps=ALL_STEPS, shift=500, batch=3)
    source = manifest.source
    assert (source.name, source.licence, source.origin) == ("tiny-sdxl-kl", "CC0-1.0", "tiny-kl")
    assert source.checkpoint_sha256 == checkpoint_sha256(tiny_kl)
    assert manifest.toolchain == toolchain()
    assert [spec.max_length for spec in manifest.tokenizers] == [77, 77]
    assert manifest.tokenizers[0].pad_id != manifest.tokenizers[1].pad_id


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"steps": ()}, "steps"),
        ({"steps": (0,)}, "from 1 to 4"),
        ({"steps": (1, 5)}, "from 1 to 4"),
        ({"steps": (2, 2)}, "once"),
        ({"batch": 0}, "batch"),
        ({"size_px": 72}, "nearest: 64"),
        ({"size_px": 0}, "nearest: 32"),
        ({"shift": 0}, "shift"),
        ({"shift": 1001}, "shift"),
        ({"precision": "int8"}, "available: fp32, fp16, bf16"),
    ],
)
def test_bad_requests_are_refused_before_any_work(tiny_kl: Path, tmp_path: Path, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        export_checkpoint(tiny_kl, tmp_path / "out", **{"steps": (1,), **options})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "says"), [(None, "no shift was given"), ({}, "no shift"), ({"shifted_timestep": "x"}, "whole")]
)
def test_without_a_shift_it_is_refused(copied: Path, tmp_path: Path, content: dict[str, Any] | None, says: str) -> None:
    (copied / "run.json").unlink()
    if content is not None:
        (copied / "run.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=says):
        export_checkpoint(copied, tmp_path / "out", steps=(1,))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("part", "precision"), [("unet", "fp16"), ("unet", "bf16"), ("vae", "fp16"), ("text_encoder_2", "fp32")]
)
def test_weights_that_are_not_finite_are_named_in_every_precision(
    copied: Path, tmp_path: Path, part: str, precision: str
) -> None:
    """And not taken for an overflow of the number type that was asked for."""
    (path,) = (copied / part).glob("*.safetensors")
    weights = load_file(path)
    name = next(name for name in weights if name.endswith("bias"))
    weights[name][0] = float("nan")
    save_file(weights, path)
    with pytest.raises(ExportError, match=f"{path.name} holds NaN or infinity in {name};"):
        export_checkpoint(copied, tmp_path / "out", steps=(1,), precision=precision)
    assert not (tmp_path / "out").exists()


def test_an_absent_checkpoint_and_a_taken_folder(tiny_kl: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound):
        export_checkpoint(tmp_path / "absent", tmp_path / "out", steps=(1,))
    (tmp_path / "out").mkdir()
    with pytest.raises(ExportError, match="there already"):
        export_checkpoint(tiny_kl, tmp_path / "out", steps=(1,))
    assert list((tmp_path / "out").iterdir()) == []


def _visible(folder: Path) -> list[str]:
    """Everything but the lock, which stays."""
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


def test_a_full_disk_leaves_nothing(tiny_kl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("onnx_ir.save", full)
    with pytest.raises(ExportError, match="No space left"):
        export_checkpoint(tiny_kl, tmp_path / "out", steps=(1,))
    assert _visible(tmp_path) == []


def test_an_interrupt_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), assembled(tmp_path / "out") as folder:
        (folder / "text.onnx").touch()
        raise KeyboardInterrupt
    assert _visible(tmp_path) == []


def test_a_killed_export_leaves_nothing_visible_and_the_next_one_clears_it(tmp_path: Path) -> None:
    script = (
        "import os, sys; from pathlib import Path; from nitro_export.export import assembled\n"
        "with assembled(Path(sys.argv[1])) as folder:\n"
        "    (folder / 'text.onnx').write_bytes(b'half'); os.kill(os.getpid(), 9)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "out")], env=environment, check=False, timeout=300)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert any(name.endswith(".partial") for name in _visible(tmp_path))
    with assembled(tmp_path / "out") as folder:
        (folder / "text.onnx").write_bytes(b"whole")
    assert _visible(tmp_path) == ["out"]
    assert (tmp_path / "out" / "text.onnx").read_bytes() == b"whole"


def test_an_unwritable_parent_is_named(tiny_kl: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ExportError, match="cannot write"):
        export_checkpoint(tiny_kl, tmp_path / "file" / "out", steps=(1,))


def test_importing_loads_no_torch() -> None:
    script = "import sys, nitro_export; print([name for name in ('torch', 'diffusers', 'onnx') if name in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True, timeout=300
    )
    assert done.stdout.strip() == "[]"

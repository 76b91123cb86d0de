"""Load, draw, close: on the reference backend, and the same images from ONNX Runtime and OpenVINO."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nitro_rt import ComputeTypeDiffers, Pipeline, PromptTruncated, Result
from nitro_rt.bundle import open_bundle
from nitro_rt.errors import BundleError, ConfigError, EngineMismatch, ModelNotFound, NitroError
from nitro_rt.noise import draw_noise
from nitro_rt.png import read_png_text

LONG = "a red apple " * 3 + "and blue pear"


@pytest.fixture(scope="module")
def pipe(make_bundle: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    with Pipeline.load(make_bundle(tmp_path_factory.mktemp("pipeline") / "bundle", steps=(1, 2, 4), batch=3)) as pipeline:
        yield pipeline


def pixels(result: Result) -> list[np.ndarray[Any, Any]]:
    return [np.asarray(image) for image in result.images]


def test_the_result_says_how_it_was_drawn(pipe: Pipeline) -> None:
    result = pipe("a red apple", seed=7)
    (image,) = result.images
    assert isinstance(image, Image.Image) and image.mode == "RGB" and image.size == (32, 32)
    assert (result.prompts, result.seed, result.steps, result.size_px) == (("a red apple",), 7, 1, 32)
    assert result.bundle_digest == pipe.bundle.digest
    assert result.warnings == ()
    assert set(result.timings_ms) == {"tokenize", "noise", "queue", "text", "denoise", "decode", "total"}
    assert result.num_images_in_call == 1
    assert sum(ms for name, ms in result.timings_ms.items() if name != "total") <= result.timings_ms["total"]


def test_one_step_is_the_formula(pipe: Pipeline) -> None:
    """The oracle is written out here: the reference engine's formula on the seed's noise."""
    latents = draw_noise(7, 1, 1, 1, (4, 4, 4))[0]
    ids = np.array([[2, 4, 6, 9, 1, *[1] * 7]])
    ids_2 = np.array([[2, 4, 6, 9, 1, *[0] * 7]])
    embeds = np.sin(0.1 * ids[..., None] + np.arange(6)).astype(np.float32)
    pooled = np.cos(0.1 * ids_2.sum() + np.arange(5)).astype(np.float32)
    schedule = pipe.bundle.manifest.schedule.steps[1]
    x0 = (latents - schedule.sigma[0] * (0.5 * latents + embeds.mean() + pooled.mean())) / schedule.alpha[0]
    expected = np.clip(np.rint(x0[0, :3].transpose(1, 2, 0) * 64 + 128), 0, 255)
    found = pixels(pipe("a red apple", seed=7))[0]
    np.testing.assert_allclose(found[::8, ::8], expected, atol=1)
    assert np.array_equal(found, found[::8, ::8].repeat(8, 0).repeat(8, 1))


def test_the_same_seed_draws_the_same_and_another_does_not(pipe: Pipeline) -> None:
    first = pixels(pipe("a red apple", seed=0, steps=4))[0]
    assert np.array_equal(first, pixels(pipe("a red apple", seed=0, steps=4))[0])
    assert not np.array_equal(first, pixels(pipe("a red apple", seed=1, steps=4))[0])
    assert not np.array_equal(first, pixels(pipe("a blue pear", seed=0, steps=4))[0])
    assert not np.array_equal(first, pixels(pipe("a red apple", seed=0, steps=2))[0])


def test_earlier_images_are_not_touched_by_later_calls(pipe: Pipeline) -> None:
    result = pipe("a red apple", seed=0)
    before = pixels(result)[0].copy()
    pipe("a blue pear", seed=1)
    assert np.array_equal(before, pixels(result)[0])


def test_without_a_seed_a_fresh_one_is_recorded(pipe: Pipeline) -> None:
    first, second = pipe("a dog"), pipe("a dog")
    assert isinstance(first.seed, int) and first.seed != second.seed
    assert np.array_equal(pixels(first)[0], pixels(pipe("a dog", seed=first.seed))[0])


def test_seed_zero_is_a_seed(pipe: Pipeline) -> None:
    assert pipe("a dog", seed=0).seed == 0


def test_huge_seeds_and_numpy_seeds(pipe: Pipeline) -> None:
    assert pipe("a dog", seed=2**64 - 1).seed == 2**64 - 1
    seed = pipe("a dog", seed=np.int64(5)).seed  # type: ignore[arg-type]
    assert seed == 5 and type(seed) is int


@pytest.mark.parametrize("steps", [1, 4])
def test_padding_changes_nothing(steps: int, pipe: Pipeline, make_bundle: Any, tmp_path: Path) -> None:
    with Pipeline.load(make_bundle(tmp_path / "bundle", steps=(steps,), batch=2)) as exact:
        expected = exact(["a dog", "a red house"], seed=5)
    padded = pipe(["a dog", "a red house"], seed=5, steps=steps)
    assert len(padded.images) == 2
    for left, right in zip(pixels(padded), pixels(expected), strict=True):
        assert np.array_equal(left, right)


def test_a_seed_per_prompt_draws_as_if_alone(pipe: Pipeline) -> None:
    together = pipe(["a dog", "a red house"], seed=[3, 0], steps=4)
    assert together.seed == (3, 0)
    alone = [pipe("a dog", seed=3, steps=4), pipe("a red house", seed=0, steps=4)]
    for left, right in zip(pixels(together), alone, strict=True):
        assert np.array_equal(left, pixels(right)[0])


def test_the_smallest_step_count_is_the_default_and_others_load_once(make_bundle: Any, tmp_path: Path) -> None:
    with Pipeline.load(make_bundle(tmp_path / "bundle", steps=(2, 4))) as pipeline:
        result = pipeline("a dog")
        assert result.steps == 2 and "load" not in result.timings_ms
        assert "load" in pipeline("a dog", steps=4).timings_ms
        assert "load" not in pipeline("a dog", steps=4).timings_ms


BAD_CALLS: dict[str, tuple[dict[str, Any], type[NitroError], str]] = {
    "no prompt": ({"prompt": []}, ConfigError, "list of prompts is empty"),
    "empty tuple": ({"prompt": ()}, ConfigError, "list of prompts is empty"),
    "None": ({"prompt": None}, ConfigError, "must be a string or a list of strings, got NoneType"),
    "bytes": ({"prompt": b"a dog"}, ConfigError, "got bytes"),
    "number": ({"prompt": 3}, ConfigError, "got int"),
    "a number among prompts": ({"prompt": ["a", 3]}, ConfigError, "every prompt must be a string, got 3"),
    "None among prompts": ({"prompt": ["a", None]}, ConfigError, "every prompt must be a string, got None"),
    "a lone surrogate": ({"prompt": "a \ud83d dog"}, ConfigError, r"no UTF-8 form \(character 2 is '\\ud83d'"),
    "a lone surrogate among prompts": ({"prompt": ["a", "\udcff"]}, ConfigError, "no UTF-8 form"),
    "too many prompts": ({"prompt": ["a"] * 4}, EngineMismatch, "4 prompts, but .* built for batch 3.*--batch 4"),
    "steps not built": ({"steps": 3}, EngineMismatch, "not built for 3 steps; built: 1, 2, 4"),
    "no steps": ({"steps": 0}, EngineMismatch, "built: 1, 2, 4"),
    "bool steps": ({"steps": True}, ConfigError, "steps must be a whole number, got True"),
    "float steps": ({"steps": 1.0}, ConfigError, "steps must be a whole number, got 1.0"),
    "size not built": ({"size": 48}, EngineMismatch, "nearest built size is 32"),
    "text size": ({"size": "32"}, ConfigError, "size must be a whole number"),
    "negative seed": ({"seed": -1}, ConfigError, "out of range"),
    "seed too large": ({"seed": 2**64}, ConfigError, "out of range"),
    "bool seed": ({"seed": True}, ConfigError, "whole number.*bool"),
    "float seed": ({"seed": 7.0}, ConfigError, "whole number.*float"),
    "text seed": ({"seed": "7"}, ConfigError, "whole number.*str"),
    "too few seeds": ({"prompt": ["a", "b"], "seed": [1]}, ConfigError, "1 seeds for 2 prompts"),
    "no seeds": ({"seed": []}, ConfigError, "0 seeds for 1 prompts"),
    "a bad seed among seeds": ({"prompt": ["a", "b"], "seed": [1, None]}, ConfigError, "whole number.*NoneType"),
    "negative prompt": ({"negative_prompt": "blurry"}, ConfigError, "negative_prompt.*guidance is 0 by design"),
    "empty negative prompt": ({"negative_prompt": ""}, ConfigError, "negative_prompt"),
    "guidance": ({"guidance_scale": 7.5}, ConfigError, "guidance_scale.*guidance is 0 by design"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls_are_refused(name: str, pipe: Pipeline) -> None:
    arguments, kind, message = BAD_CALLS[name]
    with pytest.raises(kind, match=message):
        pipe(**{"prompt": "a dog", **arguments})
    pipe("a dog")  # and the pipeline still works


def test_unknown_arguments_are_refused(pipe: Pipeline) -> None:
    with pytest.raises(TypeError, match="num_inference_steps"):
        pipe("a dog", num_inference_steps=1)  # type: ignore[call-arg]


def test_a_long_prompt_warns_and_names_what_was_cut(pipe: Pipeline) -> None:
    with pytest.warns(PromptTruncated, match="cut off and not drawn: 'blue pear'") as caught:
        result = pipe(["a dog", LONG], seed=0)
    assert len(caught) == 1 and caught[0].filename == __file__
    assert result.warnings == (str(caught[0].message),)


def test_a_closed_pipeline_says_so(bundle_folder: Path) -> None:
    pipeline = Pipeline.load(bundle_folder)
    pipeline.close()
    pipeline.close()
    with pytest.raises(NitroError, match="is closed; load it again"):
        pipeline("a dog")


def test_threads_take_turns(pipe: Pipeline) -> None:
    expected = [pixels(pipe("a dog", seed=seed, steps=2))[0] for seed in range(8)]
    found: dict[int, Any] = {}
    threads = [
        threading.Thread(target=lambda seed=seed: found.update({seed: pixels(pipe("a dog", seed=seed, steps=2))[0]}))
        for seed in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(found[seed], expected[seed]) for seed in range(8))


def test_a_saved_image_carries_its_recipe(pipe: Pipeline, tmp_path: Path) -> None:
    result = pipe(["a dog", "une pêche 🍑"], seed=4, steps=2)
    path = result.save(tmp_path / "dog.png", 1)
    assert read_png_text(path) == {
        "prompt": "une pêche 🍑",
        "seed": "4",
        "steps": "2",
        "bundle": pipe.bundle.digest,
        "image": "2 of 2",
    }
    assert np.array_equal(np.asarray(Image.open(path)), pixels(result)[1])
    assert "image" not in pipe(["a", "b"], seed=[4, 5]).png_text(1)
    assert pipe(["a", "b"], seed=[4, 5]).png_text(1)["seed"] == "5"


def test_loading_checks_every_file(bundle_folder: Path) -> None:
    bundle = open_bundle(bundle_folder)
    path = bundle.path(bundle.manifest.denoise[2].files[0])
    path.write_bytes(path.read_bytes().replace(b"0", b"1"))
    with pytest.raises(BundleError, match="changed, build again"):
        Pipeline.load(bundle_folder)


def test_loading_nothing(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="no bundle at"):
        Pipeline.load(tmp_path / "nowhere")


def test_an_unknown_backend_is_named(bundle_folder: Path, edit_manifest: Callable[..., None]) -> None:
    def change(data: dict[str, Any]) -> None:
        for engine in (data["text"], data["decode"], *data["denoise"].values()):
            engine["backend"] = "abacus"

    edit_manifest(bundle_folder, change)
    with pytest.raises(BundleError, match="backend 'abacus'; this nitro-rt runs openvino, onnxruntime"):
        Pipeline.load(bundle_folder)


def test_another_compute_type_is_said(make_bundle: Any, tmp_path: Path) -> None:
    folder = make_bundle(tmp_path / "bundle", compute_dtype="bfloat16", steps=(1, 2))
    with pytest.warns(ComputeTypeDiffers, match="built to compute in bfloat16; reference on this machine computes in float32"):
        pipeline = Pipeline.load(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first = pipeline("a dog")
    assert len(first.warnings) == 3  # text, decode, denoise/1
    with pytest.warns(ComputeTypeDiffers, match="denoise/2"):
        second = pipeline("a dog", steps=2)
    assert len(second.warnings) == 4
    pipeline.close()


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast:RuntimeWarning")  # NaN to uint8, on the drawing thread
def test_numbers_that_overflow_are_no_image(bundle_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Pipeline.load(bundle_folder) as pipeline:
        monkeypatch.setattr("nitro_rt.pipeline.draw_noise", lambda *_: np.full((1, 1, 4, 4, 4), np.nan, dtype=np.float32))
        with pytest.raises(EngineMismatch, match="not finite"):
            pipeline("a dog")


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_host_backends_draw_what_the_reference_draws(backend: str, pipe: Pipeline, make_bundle: Any, tmp_path: Path) -> None:
    options = {"INFERENCE_PRECISION_HINT": "f32"} if backend == "openvino" else {}
    folder = make_bundle(tmp_path / "bundle", backend=backend, steps=(1, 2, 4), batch=3, options=options)
    with Pipeline.load(folder) as pipeline:
        for steps in (1, 2, 4):
            for prompts in (["a dog"], ["a dog", "a red house", "one blue pear"]):
                found = pixels(pipeline(prompts, seed=0, steps=steps))
                expected = pixels(pipe(prompts, seed=0, steps=steps))
                assert len(found) == len(expected) == len(prompts)
                for left, right in zip(found, expected, strict=True):
                    np.testing.assert_allclose(left.astype(int), right.astype(int), atol=1)


def test_several_sizes_in_one_bundle(make_bundle: Any, tmp_path: Path) -> None:
    both = make_bundle(tmp_path / "both", size_px=32, more_sizes_px=(64,))
    alone = make_bundle(tmp_path / "alone", size_px=64)
    with Pipeline.load(both) as pipe, Pipeline.load(alone) as single:
        assert pipe("a dog", seed=7).images[0].size == (32, 32)
        for steps in (1, 2):
            large, expected = pipe("a dog", seed=7, steps=steps, size=64), single("a dog", seed=7, steps=steps)
            assert large.size_px == 64 and large.images[0].tobytes() == expected.images[0].tobytes()
        with pytest.raises(EngineMismatch, match="not built for 96 pixels; built: 32, 64; the nearest built size is 64"):
            pipe("a dog", size=96)

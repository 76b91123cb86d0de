"""Load, draw, close: on the reference backend, and the same images from ONNX Runtime and OpenVINO."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
import threading
import tracemalloc
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import wait as wait_for_futures
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nitro_rt import ComputeTypeDiffers, Pipeline, PromptTruncated, Result
from nitro_rt.bundle import Bundle, open_bundle
from nitro_rt.errors import BundleError, ConfigError, DeadlineExceeded, EngineMismatch, ModelNotFound, NitroError, QueueFull
from nitro_rt.executor import DeviceOptions, Drawing
from nitro_rt.noise import draw_noise
from nitro_rt.png import read_png_text
from watched_executor import PATIENCE_S, WatchedExecutor, wait_until

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
    "steps not built": ({"steps": 3}, EngineMismatch, "built for 3 steps; built: 1, 2, 4; .*or build with --steps 3"),
    "no steps": ({"steps": 0}, EngineMismatch, "built: 1, 2, 4; use one of these; there are 1 to 4"),
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
    "text deadline": ({"deadline_s": "1"}, ConfigError, "deadline_s must be a finite number of seconds, .* got '1'"),
    "bool deadline": ({"deadline_s": True}, ConfigError, "deadline_s must be a finite"),
    "no finite deadline": ({"deadline_s": float("nan")}, ConfigError, "deadline_s must be a finite"),
    "negative prompt": ({"negative_prompt": "blurry"}, ConfigError, "negative_prompt.*guidance is 0 by design"),
    "empty negative prompt": ({"negative_prompt": ""}, ConfigError, "negative_prompt"),
    "guidance": ({"guidance_scale": 7.5}, ConfigError, "guidance_scale.*guidance is 0 by design"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls_are_refused(name: str, pipe: Pipeline) -> None:
    arguments, kind, message = BAD_CALLS[name]
    for call in (pipe, pipe.submit, lambda **given: asyncio.run(pipe.submit_async(**given))):
        with pytest.raises(kind, match=message):
            call(**{"prompt": "a dog", **arguments})
    pipe("a dog")  # and the pipeline still works


def test_unknown_arguments_are_refused(pipe: Pipeline) -> None:
    with pytest.raises(TypeError, match="num_inference_steps"):
        pipe("a dog", num_inference_steps=1)  # type: ignore[call-arg]


async def async_call(pipe: Pipeline, prompt: Any, **arguments: Any) -> Result:
    return await pipe.submit_async(prompt, **arguments)


CALLS: dict[str, Callable[..., Result]] = {
    "call": lambda pipe, *args, **kwargs: pipe(*args, **kwargs),
    "submit": lambda pipe, *args, **kwargs: pipe.submit(*args, **kwargs).result(PATIENCE_S),
    "submit_async": lambda pipe, *args, **kwargs: asyncio.run(async_call(pipe, *args, **kwargs)),
}


@pytest.mark.parametrize("how", CALLS)
def test_a_long_prompt_warns_and_names_what_was_cut(how: str, pipe: Pipeline) -> None:
    with pytest.warns(PromptTruncated, match="cut off and not drawn: 'blue pear'") as caught:
        result = CALLS[how](pipe, ["a dog", LONG], seed=0)
    assert len(caught) == 1 and caught[0].filename == __file__
    assert result.warnings == (str(caught[0].message),)


def test_a_closed_pipeline_says_so(bundle_folder: Path) -> None:
    pipeline = Pipeline.load(bundle_folder)
    pipeline.close()
    pipeline.close()
    with pytest.raises(NitroError, match="is closed; load it again"):
        pipeline("a dog")


# --- many callers -------------------------------------------------------------------------------------------------------


@pytest.fixture
def watched(bundle_folder: Path) -> WatchedExecutor:
    return WatchedExecutor(open_bundle(bundle_folder))


@pytest.fixture
def gated(watched: WatchedExecutor) -> Iterator[Pipeline]:
    """Its first request is being drawn until `watched.gate` opens, and its queue takes one more."""
    with Pipeline.of(watched.bundle, open_executor=watched.open, max_queue=1) as pipeline:
        watched.gate.clear()
        pipeline.submit("a house", seed=9)
        watched.wait_for_call()
        yield pipeline
        watched.gate.set()


def test_fifty_threads_get_what_they_get_alone(make_bundle: Any, tmp_path: Path) -> None:
    folder = make_bundle(tmp_path / "bundle", steps=(1, 2), batch=3, more_sizes_px=(64,))
    calls: list[dict[str, Any]] = [
        {"prompt": prompt, "seed": seed, "steps": steps, "size": size}
        for seed, prompt in enumerate(("a dog", ["a red apple", "a house"], ["one", "two", "three"]))
        for steps in (1, 2)
        for size in (32, 64)
    ]
    with Pipeline.load(folder) as pipe:
        expected = [pipe(**call).array_BHWC.copy() for call in calls]

        def draw(number: int) -> None:
            for turn in range(4):
                index = (number * 5 + turn * 7) % len(calls)
                call = calls[index]
                result = (CALLS["submit_async"] if number % 5 == 0 else pipe)(*[pipe] * (number % 5 == 0), **call)  # type: ignore[operator]
                assert np.array_equal(result.array_BHWC, expected[index])

        with ThreadPoolExecutor(50) as threads:
            list(threads.map(draw, range(50)))


def test_the_array_is_the_images(pipe: Pipeline) -> None:
    result = pipe(["a dog", "a red house"], seed=3)
    assert result.array_BHWC.shape == (2, 32, 32, 3) and result.array_BHWC.dtype == np.uint8
    assert result.images is result.images
    for array_HWC, image in zip(result.array_BHWC, result.images, strict=True):
        assert np.array_equal(array_HWC, np.asarray(image))


def test_a_full_queue_refuses_submit_and_makes_calls_wait(gated: Pipeline, watched: WatchedExecutor) -> None:
    waiting = gated.submit("a dog", seed=0)
    with pytest.raises(QueueFull, match="1 requests wait already"):
        gated.submit("a dog", seed=0)
    with pytest.raises(QueueFull):
        asyncio.run(async_call(gated, "a dog", seed=0, wait=False))
    with ThreadPoolExecutor(3) as threads:
        callers = [
            threads.submit(gated, "a dog", seed=0),
            threads.submit(CALLS["submit_async"], gated, "a dog", seed=0),
            threads.submit(lambda: gated.submit("a dog", seed=0, wait=True).result()),
        ]
        assert wait_for_futures(callers, timeout=0.05).done == set()
        watched.gate.set()
        for caller in (waiting, *callers):
            assert np.array_equal(caller.result(PATIENCE_S).array_BHWC, waiting.result().array_BHWC)


@pytest.mark.parametrize("how", CALLS)
def test_a_deadline_ends_the_wait_for_a_place(how: str, gated: Pipeline) -> None:
    gated.submit("a dog", seed=0)
    arguments = {"wait": True} if how == "submit" else {}
    with pytest.raises(DeadlineExceeded, match="waited longer than its deadline of 0.02 s"):
        CALLS[how](gated, "a dog", deadline_s=0.02, **arguments)
    with pytest.raises(QueueFull):
        gated.submit("a dog")  # the other one still has its place, and it is the only one


@pytest.mark.parametrize("how", CALLS)
def test_what_fails_before_it_is_in_line_gives_its_place_back(
    how: str, gated: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*args: object) -> None:
        raise MemoryError("no noise")

    with monkeypatch.context() as patch, pytest.raises(MemoryError, match="no noise"):
        patch.setattr("nitro_rt.pipeline.draw_noise", no_memory)
        CALLS[how](gated, "a dog")
    gated.submit("a dog")  # the one place is free again


def test_ctrl_c_takes_a_waiting_request_back(gated: Pipeline, watched: WatchedExecutor) -> None:
    me = threading.main_thread().ident
    assert me is not None
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job begins with it ignored
    try:
        threading.Timer(0.1, signal.pthread_kill, (me, signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            gated("a dog", steps=2)
    finally:
        signal.signal(signal.SIGINT, before)
    gated.submit("a dog", seed=0)  # there is a place again
    watched.gate.set()
    gated("a dog", seed=0)
    assert {steps for steps, _, _ in watched.calls} == {1}


def test_asyncio_draws_many_and_its_loop_goes_on(gated: Pipeline, watched: WatchedExecutor) -> None:
    async def main() -> list[Result]:
        tasks = [asyncio.create_task(gated.submit_async("a dog", seed=seed)) for seed in range(8)]
        await asyncio.sleep(0.05)
        assert not any(task.done() for task in tasks)
        watched.gate.set()
        return await asyncio.gather(*tasks)

    results = asyncio.run(main())
    for seed, result in enumerate(results):
        assert np.array_equal(result.array_BHWC, gated("a dog", seed=seed).array_BHWC)


def test_a_cancelled_task_takes_its_request_back(gated: Pipeline, watched: WatchedExecutor) -> None:
    async def main() -> None:
        inside = asyncio.create_task(gated.submit_async("a dog", steps=2))
        await asyncio.sleep(0.05)
        outside = asyncio.create_task(gated.submit_async("a dog", steps=2))
        await asyncio.sleep(0.05)
        for task in (outside, inside):
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        gated.submit("a dog", seed=0)

    asyncio.run(main())
    watched.gate.set()
    gated("a dog", seed=0)
    assert {steps for steps, _, _ in watched.calls} == {1}


def test_an_event_loop_that_ends_does_not_stop_the_pipeline(gated: Pipeline, watched: WatchedExecutor) -> None:
    async def give_up() -> None:
        async with asyncio.timeout(0.05):
            await gated.submit_async("a dog", steps=2)

    with pytest.raises(TimeoutError):
        asyncio.run(give_up())
    watched.gate.set()
    assert gated("a dog").images


# --- what stays ---------------------------------------------------------------------------------------------------------


def test_an_unclosed_pipeline_says_so_and_is_freed(watched: WatchedExecutor) -> None:
    pipeline = Pipeline.of(watched.bundle, open_executor=watched.open)
    future = pipeline.submit("a dog", seed=0)
    with pytest.warns(ResourceWarning, match="unclosed pipeline of .*bundle"):
        del pipeline
        gc.collect()
    assert future.result(PATIENCE_S).images  # what was asked for is drawn first
    wait_until(lambda: watched.events[-1][0] == "close")


def test_loading_and_closing_leaves_no_thread_and_no_memory(bundle_folder: Path) -> None:
    def load_and_draw() -> None:
        with Pipeline.load(bundle_folder) as pipeline:
            pipeline("a dog", seed=0)

    load_and_draw()
    gc.collect()
    threads, num_objects, resident_bytes = threading.active_count(), len(gc.get_objects()), resident()
    for _ in range(50):
        load_and_draw()
    gc.collect()
    assert threading.active_count() == threads
    assert len(gc.get_objects()) - num_objects < 50  # one object of each would be as many
    assert resident() - resident_bytes < 8 * 2**20


def resident() -> int:
    """Bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class NullExecutor:
    """Draws nothing, in no time."""

    notes, compute_dtypes = (), {"text": "float32"}

    def __init__(self, bundle: Bundle) -> None:
        size_px = bundle.manifest.sizes_px[0]
        self._images_BHWC = np.zeros((bundle.manifest.batch, size_px, size_px, 3), np.uint8)

    def prepare(self, num_steps: int, size_px: int) -> bool:
        return False

    def draw(self, *call: Any) -> Drawing:
        return Drawing(images_BHWC=self._images_BHWC, timings_ms={}, finite=True)

    def close(self) -> None: ...


def test_an_image_leaves_nothing_behind(bundle_folder: Path) -> None:
    bundle = open_bundle(bundle_folder)
    with Pipeline.of(bundle, open_executor=lambda: NullExecutor(bundle)) as pipeline:

        def draw(num_images: int) -> None:
            for _ in range(num_images // 50):
                pipeline("a dog", seed=0)
                for future in [pipeline.submit("a dog", seed=0, steps=2) for _ in range(49)]:
                    future.result()

        draw(100)
        tracemalloc.start()
        try:
            draw(100)
            gc.collect()
            before, _ = tracemalloc.get_traced_memory()
            draw(1000)
            gc.collect()
            after, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert after - before < 1000 * 8  # a pointer each would be more


FORK = """
import os, sys, warnings
from nitro_rt import Pipeline, PipelineClosed
pipe = Pipeline.load({folder!r})
warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 on: forking where there are threads
if os.fork() == 0:
    try:
        pipe("a dog")
    except PipelineClosed as exc:
        print(exc, flush=True)
    pipe.close()
    print("the fork ends", flush=True)
    os._exit(0)
os.wait()
pipe("a dog")
pipe.close()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_fork_is_told_to_load_its_own(bundle_folder: Path) -> None:
    script = FORK.format(folder=str(bundle_folder))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "is a fork of it without its thread and its device; load it in each process" in done.stdout
    assert "the fork ends" in done.stdout


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


@pytest.mark.parametrize("max_queue", [0, -1, True, 2.0, "9"])
def test_a_queue_has_at_least_one_place(max_queue: Any, bundle_folder: Path) -> None:
    with pytest.raises(ConfigError, match="max_queue must be a whole number of requests from 1, got"):
        Pipeline.load(bundle_folder, max_queue=max_queue)


def test_options_of_a_gpu_are_refused_on_the_host(bundle_folder: Path) -> None:
    with pytest.raises(ConfigError, match="runs on reference, not on a GPU"):
        Pipeline.load(bundle_folder, device=1)
    with pytest.raises(ConfigError, match="device must be a GPU's number from 0, got -1"):
        Pipeline.load(bundle_folder, device=-1)
    bundle = open_bundle(bundle_folder)
    with pytest.raises(ConfigError, match="not both"):
        Pipeline.of(bundle, options=DeviceOptions(), open_executor=lambda: NullExecutor(bundle))


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


def test_only_the_size_that_is_asked_for_is_loaded(make_bundle: Any, tmp_path: Path) -> None:
    folder = make_bundle(tmp_path / "bundle", more_sizes_px=(64,))
    with Pipeline.load(folder, size=64) as pipeline:
        pipeline("a dog", size=64)
        assert set(pipeline.compute_dtypes) == {"text", "decode@64", "denoise/1@64"}
        assert pipeline("a dog").array_BHWC.shape[1] == 32 and "decode" in pipeline.compute_dtypes
    with pytest.raises(EngineMismatch, match="was not built for 96 pixels; built: 32, 64"):
        Pipeline.load(folder, size=96)


def test_another_compute_type_is_said(make_bundle: Any, tmp_path: Path) -> None:
    folder = make_bundle(tmp_path / "bundle", compute_dtype="bfloat16", steps=(1, 2, 4), joined=False)
    with pytest.warns(ComputeTypeDiffers, match="built to compute in bfloat16; reference on this machine computes in float32"):
        pipeline = Pipeline.load(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first = pipeline("a dog")
        assert len(first.warnings) == 3  # text, decode, denoise/1
        # Nobody waits in `submit` when the engine is loaded, so it stands in the result.
        assert len(pipeline.submit("a dog", steps=4).result(PATIENCE_S).warnings) == 4
    with pytest.warns(ComputeTypeDiffers, match="denoise/2"):
        second = pipeline("a dog", steps=2)
    assert len(second.warnings) == 5
    pipeline.close()


def test_a_warning_of_the_load_points_at_the_loader(make_bundle: Any, tmp_path: Path) -> None:
    folder = make_bundle(tmp_path / "bundle", compute_dtype="bfloat16", steps=(1, 2), joined=False)
    for load in (Pipeline.load, lambda folder: Pipeline.of(open_bundle(folder))):
        with pytest.warns(ComputeTypeDiffers) as caught:
            pipeline = load(folder)  # type: ignore[operator]
        with pytest.warns(ComputeTypeDiffers, match="denoise/2") as later:
            asyncio.run(async_call(pipeline, "a dog", steps=2))
        pipeline.close()
        assert {warning.filename for warning in (*caught, *later)} == {__file__}


def test_a_warning_that_is_an_error_leaves_no_pipeline(make_bundle: Any, tmp_path: Path) -> None:
    folder, threads = make_bundle(tmp_path / "bundle", compute_dtype="bfloat16"), threading.active_count()
    with warnings.catch_warnings():
        warnings.simplefilter("error", ComputeTypeDiffers)
        with pytest.raises(ComputeTypeDiffers):
            Pipeline.load(folder)
    assert threading.active_count() == threads


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

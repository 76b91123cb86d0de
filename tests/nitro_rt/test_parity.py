"""Whole bundles against diffusers: same checkpoint, prompts, seed and steps give the same image.

| precision | computes in | PSNR at least | why |
|---|---|---|---|
| fp32 | float32 | 45 dB | only the order of sums differs; what remains is a rounding to uint8 here and there |
| fp16 | float16, float32 | 35 dB | weights and activations of 11 bits |
| fp16 | bfloat16 | 28 dB | activations of 8 bits; OpenVINO's choice on CPUs with bfloat16 units |
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from checkpoints import make_tiny_sdxl
from device_worlds import simulated
from nitro_engines import BuildRequest, EngineCache, build
from nitro_rt import Pipeline
from nitro_rt.bundle import open_bundle
from nitro_rt.cli import main
from nitro_rt.device_executor import DeviceExecutor
from nitro_rt.schedule import grid
from oracle import oracle_images

STEPS = (1, 2, 3, 4)
PROMPTS = ["a red apple", "a blue cat on the house", "a photo of the green star"]
BACKENDS = ["onnxruntime", "openvino"]
LEAST_DB = {("fp32", "float32"): 45.0, ("fp16", "float32"): 35.0, ("fp16", "float16"): 35.0, ("fp16", "bfloat16"): 28.0}

BundleOf = Callable[..., Path]

pytestmark = pytest.mark.filterwarnings("default")  # torch's exporter and diffusers warn of their own future


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_sdxl(tmp_path_factory.mktemp("tiny") / "tiny-sdxl")


@pytest.fixture(scope="module")
def bundle_of(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> BundleOf:
    """A function that builds a bundle of all step counts; both backends are built from the same graphs."""
    root = tmp_path_factory.mktemp("bundles")
    cache = EngineCache(root / "cache")

    def make(backend: str, *, shift: int, batch: int, precision: str = "fp32") -> Path:
        out = root / f"{backend}-{precision}-{shift}-{batch}"
        if not out.exists():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                request = BuildRequest(
                    model=str(checkpoint),
                    steps=STEPS,
                    backend=backend,
                    shift=shift,
                    batch=batch,
                    precision=precision,
                    gate_prompts=1,
                    out=out,
                )
                build(request, cache=cache)
        return out

    return make


def psnr_db(found: NDArray[np.uint8], expected: NDArray[np.uint8]) -> float:
    """The worst image of a batch; infinite where all are equal."""
    errors_B = ((found.astype(np.float64) - expected) ** 2).mean(axis=(1, 2, 3))
    with np.errstate(divide="ignore"):
        return float(10 * np.log10(255**2 / errors_B.max()))


def _pixels(pipe: Pipeline, prompts: list[str], *, seed: int, steps: int) -> NDArray[np.uint8]:
    return np.stack([np.asarray(image) for image in pipe(prompts, seed=seed, steps=steps).images])


def _check(pipe: Pipeline, checkpoint: Path, prompts: list[str], *, seed: int, steps: int, shift: int) -> None:
    expected = oracle_images(checkpoint, prompts, seed=seed, steps=steps, shift=shift)
    assert expected.std() > 10, "the oracle draws nothing: the comparison would say nothing"
    found = _pixels(pipe, prompts, seed=seed, steps=steps)
    engine = pipe.bundle.manifest.denoise[steps]
    measured = psnr_db(found, expected)
    print(f"{engine.backend} {engine.precision} {steps=} {shift=} {seed=} {len(prompts)} images: {measured:.1f} dB")
    assert measured >= LEAST_DB[engine.precision, engine.compute_dtype]


def test_the_oracle_draws_the_same_twice(checkpoint: Path) -> None:
    """diffusers gives the generator only to schedulers whose `step` names it; else fresh noise has no seed."""
    first, second = (oracle_images(checkpoint, PROMPTS[:1], seed=0, steps=2, shift=250) for _ in range(2))
    assert np.array_equal(first, second)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("shift", "batch"),
    # Shift 500 and batch 1 are nitro-emoji's, in test_nitro_emoji.py.
    [(250, 3), *(pytest.param(*pair, marks=pytest.mark.slow) for pair in ((500, 1), (250, 1), (500, 3)))],
)
def test_fp32_images_equal_diffusers(backend: str, shift: int, batch: int, checkpoint: Path, bundle_of: BundleOf) -> None:
    with Pipeline.load(bundle_of(backend, shift=shift, batch=batch)) as pipe:
        for steps in STEPS:
            schedule = pipe.bundle.manifest.schedule.steps[steps]
            assert schedule.timesteps == grid(steps)
            assert schedule.shifted_timesteps == tuple(time * shift // 1000 for time in grid(steps))
            _check(pipe, checkpoint, PROMPTS[:batch], seed=0, steps=steps, shift=shift)
        # Fewer prompts than the batch, another seed, seeds past 32 bits.
        _check(pipe, checkpoint, PROMPTS[:1], seed=2**40 + 7, steps=4, shift=shift)


@pytest.mark.slow  # the export's own tests draw in fp16 on ONNX Runtime, the quantised build's on OpenVINO
@pytest.mark.parametrize("backend", BACKENDS)
def test_fp16_images_equal_diffusers(backend: str, checkpoint: Path, bundle_of: BundleOf) -> None:
    with Pipeline.load(bundle_of(backend, shift=500, batch=1, precision="fp16")) as pipe:
        for steps in STEPS:
            _check(pipe, checkpoint, PROMPTS[:1], seed=0, steps=steps, shift=500)


@pytest.mark.parametrize("seed_of_order", [0, 2], ids=["lazy", "newest first"])
def test_the_device_executor_draws_what_the_host_draws(seed_of_order: int, bundle_of: BundleOf, tmp_path: Path) -> None:
    """A whole network's engines on the simulated GPU: the last rung that needs none."""
    folder = bundle_of("onnxruntime", shift=250, batch=3)
    world = simulated("tensorrt", seed_of_order)
    bundle = open_bundle(world.bundle(folder, tmp_path / "bundle"))
    with (
        Pipeline.load(folder) as host,
        Pipeline.of(bundle, open_executor=lambda: DeviceExecutor(bundle, None, world.modules)) as device,
    ):
        for steps in STEPS:
            found, expected = (_pixels(pipe, PROMPTS, seed=3, steps=steps) for pipe in (device, host))
            assert np.array_equal(found, expected)
    world.check()


def test_a_seed_per_prompt_equals_diffusers_one_by_one(checkpoint: Path, bundle_of: BundleOf) -> None:
    with Pipeline.load(bundle_of("onnxruntime", shift=250, batch=3)) as pipe:
        result = pipe(PROMPTS[:2], seed=[5, 0], steps=2)
    for image, prompt, seed in zip(result.images, PROMPTS, [5, 0], strict=False):
        expected = oracle_images(checkpoint, [prompt], seed=seed, steps=2, shift=250)
        assert psnr_db(np.asarray(image)[None], expected) >= 45


def test_what_differs_shows(checkpoint: Path, bundle_of: BundleOf) -> None:
    """The measure can fail: another prompt, seed, step count or shift stays far below 45 dB."""
    right = oracle_images(checkpoint, PROMPTS[:1], seed=0, steps=2, shift=250)
    with Pipeline.load(bundle_of("onnxruntime", shift=250, batch=3)) as pipe:
        assert psnr_db(_pixels(pipe, PROMPTS[1:2], seed=0, steps=2), right) < 40
        assert psnr_db(_pixels(pipe, PROMPTS[:1], seed=1, steps=2), right) < 30
        assert psnr_db(_pixels(pipe, PROMPTS[:1], seed=0, steps=1), right) < 40
    other_shift = oracle_images(checkpoint, PROMPTS[:1], seed=0, steps=2, shift=500)
    assert psnr_db(other_shift, right) < 40


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_built_bundle_verifies(backend: str, bundle_of: BundleOf, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(bundle_of(backend, shift=250, batch=3))]) == 0
    # Manifest, files and schedule; an image and its comparison with the parent's for each step count.
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["ok"] * (3 + 2 * len(STEPS))

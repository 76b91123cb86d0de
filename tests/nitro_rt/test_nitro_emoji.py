"""The shipped model: what it is, and that its bundles draw what diffusers draws."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

import nitro_rt
from nitro_engines import BuildRequest, EngineCache, build
from nitro_rt import Pipeline
from oracle import oracle_images

MODEL = Path(nitro_rt.__file__).parent / "models" / "nitro-emoji"
PROMPTS = ["a red apple", "a purple umbrella", "a panda, flat style"]
STEPS = (1, 2, 3, 4)
LEAST_DB = {("fp32", "float32"): 45.0, ("fp16", "float32"): 35.0, ("fp16", "float16"): 35.0, ("fp16", "bfloat16"): 28.0}
"""By precision and what the backend computes in; the reasons stand in test_parity.py."""

pytestmark = pytest.mark.filterwarnings("default")  # torch's exporter and diffusers warn of their own future


def test_it_is_small_half_precision_and_says_what_it_is() -> None:
    files = [path for path in MODEL.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 40e6
    assert not [path for path in files if path.suffix in (".bin", ".pt", ".pkl", ".ckpt")]
    facts = json.loads((MODEL / "run.json").read_text())
    assert facts["name"] == "nitro-emoji" and facts["licence"] == "Apache-2.0" and facts["shifted_timestep"] == 500
    for path in MODEL.rglob("*.safetensors"):
        with safe_open(str(path), framework="np") as file:
            dtypes = {file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
        assert dtypes <= {"F16", "I64"}, path


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> EngineCache:
    return EngineCache(tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize(
    ("backend", "precision"),
    [
        ("openvino", "fp32"),
        # The quick run compares the tiny checkpoint's bundle on ONNX Runtime.
        pytest.param("onnxruntime", "fp32", marks=pytest.mark.slow),
        pytest.param("onnxruntime", "fp16", marks=pytest.mark.slow),
        pytest.param("openvino", "fp16", marks=pytest.mark.slow),
    ],
)
def test_its_images_equal_diffusers(backend: str, precision: str, cache: EngineCache, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        request = BuildRequest(steps=STEPS, backend=backend, precision=precision, gate_prompts=1, out=tmp_path / "bundle")
        build(request, cache=cache)
    with Pipeline.load(tmp_path / "bundle") as pipe:
        for steps in STEPS:
            for seed, prompt in enumerate(PROMPTS):
                found = np.asarray(pipe(prompt, seed=seed, steps=steps).images[0]).astype(np.float64)
                expected = oracle_images(MODEL, [prompt], seed=seed, steps=steps, shift=500)[0]
                measured = 10 * np.log10(255**2 / max(1e-9, ((found - expected) ** 2).mean()))
                dtype = pipe.bundle.manifest.denoise[steps].compute_dtype
                print(f"{backend} {precision} computes in {dtype}, {steps} steps, {prompt!r}: {measured:.1f} dB")
                assert measured >= LEAST_DB[precision, dtype]
                assert expected.std() > 20, "a picture, not a grey square"

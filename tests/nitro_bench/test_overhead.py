"""The cost beside the engines is measured over engines that do nothing, and stays flat."""

from __future__ import annotations

from pathlib import Path

import pytest

from hand_made import hand_made_bundle
from nitro_bench.null_device import null_modules
from nitro_bench.overhead import measure
from nitro_rt.bundle import open_bundle
from nitro_rt.errors import ConfigError
from nitro_rt.pipeline import Pipeline


@pytest.fixture(params=["tensorrt", "tensorrt-rtx"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    target = {"device": "cuda", "targets": "sm89", "compute_capabilities": "8.9"}
    return hand_made_bundle(tmp_path / "bundle", backend=request.param, target=target)


def test_it_measures_every_part(folder: Path) -> None:
    found = measure(open_bundle(folder), None, num_images=500)
    assert (found.steps, found.size_px, found.batch, found.num_images, found.diffusers_us) == (1, 32, 2, 500, None)
    # Loose: the machine may be busy. The figures of a quiet one are in benchmarks/reports.
    assert 0 < found.executor_us < 2_000 and 0 < found.pipeline_us < 20_000
    assert found.growth_bytes < 20_000, "images stay allocated"


def test_a_pipeline_runs_on_the_null_device(folder: Path) -> None:
    from nitro_rt.device_executor import DeviceExecutor

    bundle = open_bundle(folder)
    with Pipeline.of(bundle, open_executor=lambda: DeviceExecutor(bundle, None, null_modules(bundle))) as pipe:
        result = pipe("a dog", seed=1, steps=2)
    assert result.array_BHWC.shape == (1, 32, 32, 3) and result.timings_ms["device"] == 0


def test_a_host_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="runs on reference; give a bundle of tensorrt or tensorrt-rtx engines"):
        measure(open_bundle(hand_made_bundle(tmp_path / "bundle")), None, num_images=10)

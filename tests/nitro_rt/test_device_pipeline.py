"""A whole pipeline over the device executor on the simulator: threads, batches, a lost device, reopening."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from device_worlds import World, simulated
from nitro_rt import Pipeline
from nitro_rt.bundle import open_bundle
from nitro_rt.device_executor import DeviceExecutor
from nitro_rt.errors import DeviceLost, EngineMismatch, NitroError
from nitro_rt.executor import DeviceOptions

PROMPTS = ("a red dog", "a blue apple", "the large pear")


@pytest.fixture(scope="module")
def onnx_bundle(tmp_path_factory: pytest.TempPathFactory, make_bundle: Any) -> Path:
    folder: Path = make_bundle(tmp_path_factory.mktemp("device") / "onnx", backend="onnxruntime", steps=(1, 2), batch=2)
    return folder


@pytest.fixture
def world() -> World:
    return simulated("tensorrt-rtx", seed=6)


@pytest.fixture
def folder(world: World, onnx_bundle: Path, tmp_path: Path) -> Path:
    return world.bundle(onnx_bundle, tmp_path / "bundle")


def loaded(world: World, folder: Path, **options: Any) -> Pipeline:
    bundle = open_bundle(folder)
    return Pipeline.of(bundle, open_executor=lambda: DeviceExecutor(bundle, DeviceOptions(**options), world.modules))


def test_a_thread_storm_draws_what_the_host_draws(world: World, folder: Path, onnx_bundle: Path) -> None:
    calls = [(PROMPTS[number % 3], number % 5, 1 + number % 2) for number in range(60)]
    with Pipeline.load(onnx_bundle) as host:
        expected = {call: host(call[0], seed=call[1], steps=call[2]).array_BHWC for call in set(calls)}
    with loaded(world, folder) as pipe, ThreadPoolExecutor(20) as threads:
        drawn = list(threads.map(lambda call: pipe(call[0], seed=call[1], steps=call[2]), calls))
    for call, result in zip(calls, drawn, strict=True):
        assert np.array_equal(result.array_BHWC, expected[call])
        assert "device" in result.timings_ms and "queue" in result.timings_ms
    assert any(result.num_images_in_call == 2 for result in drawn)
    world.check()
    assert not world.open_things()


def test_a_device_lost_in_the_middle_of_an_image_and_reopened(world: World, folder: Path) -> None:
    with loaded(world, folder) as pipe:
        before = pipe(PROMPTS[0], seed=1).array_BHWC
        world.simulation.fail("operation", at=4)
        with ThreadPoolExecutor(len(PROMPTS)) as threads:  # whether they wait, are drawn, or come too late
            calls = [threads.submit(pipe, prompt, seed=1) for prompt in PROMPTS]
            for call in calls:
                with pytest.raises(DeviceLost, match="CUDA_ERROR_LAUNCH_FAILED"):
                    call.result(timeout=30)
        with pytest.raises(NitroError, match="reopen"):
            pipe(PROMPTS[0], seed=1)
        world.simulation.recover()
        pipe.reopen()
        assert np.array_equal(pipe(PROMPTS[0], seed=1).array_BHWC, before)
    assert not world.open_things()


def test_reasons_reach_the_caller_from_the_owner_thread(world: World, folder: Path) -> None:
    with pytest.raises(NitroError, match="there is no GPU 3"):
        loaded(world, folder, device=3)
    world.simulation.fail("deserialize")
    with pytest.raises(EngineMismatch, match="cannot load text"):
        loaded(world, folder)
    assert not world.open_things()


def test_a_prompt_batch_larger_than_the_engine(world: World, folder: Path) -> None:
    with loaded(world, folder) as pipe, pytest.raises(EngineMismatch, match="3 prompts, but .* batch 2"):
        pipe(list(PROMPTS))


def test_weights_are_exchanged_between_images(world: World, onnx_bundle: Path, tmp_path: Path) -> None:
    """What was asked for before is drawn with the old weights, what comes after with the new ones, and back is back."""
    folder = world.bundle(onnx_bundle, tmp_path / "refittable", refittable=True)
    with loaded(world, folder) as pipe:
        before = pipe(PROMPTS[0], seed=1).array_BHWC
        earlier = [pipe.submit(PROMPTS[0], seed=1) for _ in range(3)]
        pipe.refit({"denoise": {"half": np.asarray(0.75, np.float32)}})
        assert all(np.array_equal(future.result().array_BHWC, before) for future in earlier)
        assert not np.array_equal(pipe(PROMPTS[0], seed=1).array_BHWC, before)
        with pytest.raises(EngineMismatch, match="does not take absent"):
            pipe.refit({"denoise": {"absent": np.asarray(0, np.float32)}})
        pipe.refit({"denoise": {"half": np.asarray(0.5, np.float32)}})
        assert np.array_equal(pipe(PROMPTS[0], seed=1).array_BHWC, before)
    with (
        Pipeline.load(onnx_bundle) as host,
        pytest.raises(EngineMismatch, match="engines take no new weights; fuse LoRAs"),
    ):
        host.refit({})
    world.check()

"""The device executor on the simulator, and on a GPU where there is one: the host's images, one wait each, nothing left."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from device_worlds import World, real, simulated
from nitro_rt.bundle import Bundle, open_bundle
from nitro_rt.device_executor import DeviceExecutor
from nitro_rt.errors import BackendUnavailable, CaptureError, ConfigError, DeviceLost, EngineMismatch, ShapeError
from nitro_rt.executor import DeviceOptions, Drawing, open_executor
from nitro_rt.manifest import TensorSpec
from nitro_rt.noise import draw_noise

BATCH, LENGTH, SIZE = 2, 12, 32
STEPS = (1, 2, 3, 4)
GPU = pytest.mark.gpu


@pytest.fixture(
    params=["sim tensorrt-rtx", "sim tensorrt", pytest.param("tensorrt-rtx", marks=GPU), pytest.param("tensorrt", marks=GPU)]
)
def world(request: pytest.FixtureRequest) -> World:
    kind, _, backend = str(request.param).rpartition(" ")
    if kind:
        return simulated(backend)
    try:
        return next(real(backend))
    except BackendUnavailable as exc:
        pytest.skip(str(exc))


@pytest.fixture(scope="module")
def onnx_bundle(tmp_path_factory: pytest.TempPathFactory, make_bundle: Any) -> Path:
    folder: Path = make_bundle(
        tmp_path_factory.mktemp("device") / "onnx", backend="onnxruntime", steps=STEPS, batch=BATCH, more_sizes_px=(48,)
    )
    return folder


@pytest.fixture(scope="module")
def expected(onnx_bundle: Path) -> Callable[..., Drawing]:
    """A function that draws on the host: (steps, seed, size)."""
    executor = open_executor(open_bundle(onnx_bundle))
    drawn: dict[tuple[int, int, int], Drawing] = {}

    def draw(steps: int, seed: int, size: int = SIZE) -> Drawing:
        if (steps, seed, size) not in drawn:
            executor.prepare(steps, size)
            drawn[steps, seed, size] = executor.draw(steps, size, *inputs(executor._bundle, steps, seed, size))  # type: ignore[attr-defined]
        return drawn[steps, seed, size]

    return draw


def inputs(bundle: Bundle, steps: int, seed: int, size: int = SIZE) -> tuple[Any, Any, Any]:
    """Token ids and noise that differ from seed to seed."""
    ids_BT = np.full((BATCH, LENGTH), seed % 20, np.int64)
    return ids_BT, ids_BT + 1, draw_noise(seed, steps, BATCH, BATCH, bundle.latent_CHW_at(size))


def opened(world: World, folder: Path, **options: Any) -> DeviceExecutor:
    return DeviceExecutor(open_bundle(folder), DeviceOptions(**options), world.modules)


@pytest.mark.parametrize("cuda_graphs", ["capture", "off"])
def test_it_draws_what_the_host_draws(world: World, cuda_graphs: str, onnx_bundle: Path, expected: Any, tmp_path: Path) -> None:
    executor = opened(world, world.bundle(onnx_bundle, tmp_path / "b"), cuda_graphs=cuda_graphs)
    for steps in STEPS:
        assert executor.prepare(steps, SIZE) and not executor.prepare(steps, SIZE)
        for seed in (0, 7):
            drawing = executor.draw(steps, SIZE, *inputs(executor._bundle, steps, seed))
            world.assert_same(drawing.images_BHWC, expected(steps, seed).images_BHWC)
            assert drawing.finite
            assert set(drawing.timings_ms) == ({"device"} if cuda_graphs == "capture" else {"text", "denoise", "decode"})
            assert all(ms > 0 for ms in drawing.timings_ms.values())
    assert executor.captures == ({"first use": len(STEPS)} if cuda_graphs == "capture" else {})
    assert not executor.notes
    world.check()
    executor.close()


def test_several_sizes_share_the_text_encoder(world: World, onnx_bundle: Path, expected: Any, tmp_path: Path) -> None:
    executor = opened(world, world.bundle(onnx_bundle, tmp_path / "b"))
    for size in (SIZE, 48):
        executor.prepare(2, size)
    for size in (48, SIZE, 48):
        drawing = executor.draw(2, size, *inputs(executor._bundle, 2, 3, size))
        world.assert_same(drawing.images_BHWC, expected(2, 3, size).images_BHWC)
    assert sorted(executor.compute_dtypes) == ["decode", "decode@48", "denoise/2", "denoise/2@48", "text"]
    world.check()
    executor.close()


def test_what_a_call_gives_is_the_callers(world: World, onnx_bundle: Path, tmp_path: Path) -> None:
    executor = opened(world, world.bundle(onnx_bundle, tmp_path / "b"))
    executor.prepare(1, SIZE)
    first = executor.draw(1, SIZE, *inputs(executor._bundle, 1, 0)).images_BHWC
    kept = first.copy()
    executor.draw(1, SIZE, *inputs(executor._bundle, 1, 1))
    assert np.array_equal(first, kept)
    executor.close()
    assert np.array_equal(first, kept)


@pytest.mark.parametrize("backend", ["tensorrt-rtx", "tensorrt"])
def test_one_wait_per_image(backend: str, onnx_bundle: Path, tmp_path: Path) -> None:
    world = simulated(backend)
    executor = opened(world, world.bundle(onnx_bundle, tmp_path / "b"))
    executor.prepare(4, SIZE)
    counts = world.simulation.counts
    before = counts.copy()
    for seed in range(5):
        executor.draw(4, SIZE, *inputs(executor._bundle, 4, seed))
    done = counts - before
    assert (done["sync"], done["replay"], done["allocation"], done["capture"]) == (5, 5, 0, 0)
    executor.close()


@pytest.mark.parametrize("seeds", [range(200), pytest.param(range(200, 1000), marks=pytest.mark.slow)], ids=["200", "800 more"])
def test_any_order_that_cuda_permits_gives_the_same_images(
    seeds: range, onnx_bundle: Path, expected: Any, tmp_path: Path
) -> None:
    """Two hundred adversaries, each with a step count in turn: two images, so that the second finds the first's remains."""
    folders = {b: simulated(b).bundle(onnx_bundle, tmp_path / b) for b in ("tensorrt", "tensorrt-rtx")}
    for seed in seeds:
        backend, steps = ("tensorrt", "tensorrt-rtx")[seed // len(STEPS) % 2], STEPS[seed % len(STEPS)]
        world = simulated(backend, seed)
        executor = opened(world, folders[backend], verify_capture=False, runtime_cache=False)
        executor.prepare(steps, SIZE)
        for image in (0, 7):
            drawing = executor.draw(steps, SIZE, *inputs(executor._bundle, steps, image))
            assert np.array_equal(drawing.images_BHWC, expected(steps, image).images_BHWC), f"seed {seed}"
        world.check()
        executor.close()
        if seed % 20 == 0:  # collecting the garbage of a whole test process takes longer than drawing
            assert not world.open_things(), f"seed {seed}"


def test_fifty_loads_and_closes_leave_nothing(world: World, onnx_bundle: Path, tmp_path: Path) -> None:
    folder = world.bundle(onnx_bundle, tmp_path / "b")

    def load_and_draw() -> None:
        executor = opened(world, folder)
        executor.prepare(1, SIZE)
        executor.draw(1, SIZE, *inputs(executor._bundle, 1, 0))
        executor.close()
        executor.close()

    load_and_draw()
    before = world.open_things()
    for _ in range(50 if world.simulation is None else 10):
        load_and_draw()
    assert world.open_things() == before


def test_scratch_memory_is_the_largest_not_the_sum(onnx_bundle: Path, tmp_path: Path) -> None:
    world = simulated()
    executor = opened(world, world.bundle(onnx_bundle, tmp_path / "b", scratch_bytes=1 << 20))
    executor.prepare(1, SIZE)
    executor.prepare(2, SIZE)
    assert executor.scratch_bytes == 1 << 20
    executor.close()


def test_a_graph_is_captured_again_when_the_scratch_memory_moves(onnx_bundle: Path, expected: Any, tmp_path: Path) -> None:
    """The second size needs more scratch, so the first size's graph holds a stale address."""
    world = simulated()
    executor = opened(world, world.bundle(onnx_bundle, tmp_path / "b"))
    executor.prepare(1, SIZE)
    assert executor._memory is not None
    for engine in executor._engines.values():
        engine.scratch_bytes *= 16
    executor.prepare(2, SIZE)
    drawing = executor.draw(1, SIZE, *inputs(executor._bundle, 1, 7))
    world.assert_same(drawing.images_BHWC, expected(1, 7).images_BHWC)
    assert executor.captures == {"first use": 2, "scratch changed": 1}
    world.check()
    executor.close()


def test_a_graph_that_draws_something_else_is_refused(
    onnx_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = simulated()
    folder = world.bundle(onnx_bundle, tmp_path / "b")
    monkeypatch.setattr(DeviceExecutor, "_state", _forgetting_the_upload(DeviceExecutor._state))
    executor = opened(world, folder)
    with pytest.raises(
        CaptureError, match="the CUDA graph of 1 steps at 32 pixels gives other next_latents .* cuda_graphs='off'"
    ):
        executor.prepare(1, SIZE)
    executor.close()
    assert not world.open_things()


def _forgetting_the_upload(state: Any) -> Any:
    def changed(self: DeviceExecutor, program: Any) -> Any:
        program._upload.arrays["noise_0"][...] = 3  # between the eager run and the replay
        return state(self, program)

    return changed


@pytest.mark.parametrize("asked", ["auto", "capture"])
def test_an_engine_that_cannot_be_captured(
    asked: str, onnx_bundle: Path, expected: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = simulated()
    folder = world.bundle(onnx_bundle, tmp_path / "b")
    monkeypatch.setattr("nitro_rt.tensorrt_engine.TensorRtEngine.is_capturable", lambda self, handle: self.stage != "decode")
    executor = opened(world, folder, cuda_graphs=asked)
    if asked == "capture":
        with pytest.raises(CaptureError, match="decode cannot be captured .* cuda_graphs='off'"):
            executor.prepare(1, SIZE)
    else:
        executor.prepare(1, SIZE)
        drawing = executor.draw(1, SIZE, *inputs(executor._bundle, 1, 7))
        world.assert_same(drawing.images_BHWC, expected(1, 7).images_BHWC)
        assert executor.notes == (
            "no CUDA graph for 1 steps at 32 pixels: decode cannot be captured on this GPU; its engines are launched one by "
            "one",
        )
    executor.close()


def test_tensorrt_rtx_s_own_graphs(onnx_bundle: Path, expected: Any, tmp_path: Path) -> None:
    world = simulated("tensorrt-rtx")
    executor = opened(world, world.bundle(onnx_bundle, tmp_path / "b"), cuda_graphs="runtime")
    executor.prepare(2, SIZE)
    world.assert_same(executor.draw(2, SIZE, *inputs(executor._bundle, 2, 7)).images_BHWC, expected(2, 7).images_BHWC)
    assert not executor.captures
    executor.close()
    other = simulated("tensorrt")
    with pytest.raises(ConfigError, match="TensorRT-RTX's own strategy; with TensorRT say 'capture' or 'off'"):
        opened(other, other.bundle(onnx_bundle, tmp_path / "t"), cuda_graphs="runtime")
    assert not other.open_things()


def test_compiled_kernels_are_kept_beside_the_bundle(onnx_bundle: Path, tmp_path: Path) -> None:
    world = simulated("tensorrt-rtx")
    folder = world.bundle(onnx_bundle, tmp_path / "b")
    for _ in range(2):
        executor = opened(world, folder)
        executor.prepare(1, SIZE)
        executor.close()
        compiled, hits = world.simulation.counts["compilation"], world.simulation.counts["cache hit"]
    assert (tmp_path / "b.runtime-cache").is_file() and not list(tmp_path.glob("*.new"))
    assert hits >= 3 and compiled == 3
    open_bundle(folder).verify()
    (tmp_path / "b.runtime-cache").write_bytes(b"of another GPU")
    executor = opened(world, folder)
    executor.prepare(1, SIZE)
    executor.close()
    assert (tmp_path / "b.runtime-cache").read_bytes() != b"of another GPU"


def test_a_cache_that_cannot_be_kept_is_said(onnx_bundle: Path, tmp_path: Path) -> None:
    world = simulated("tensorrt-rtx")
    folder = world.bundle(onnx_bundle, tmp_path / "b")
    (tmp_path / "b.runtime-cache").mkdir()
    executor = opened(world, folder)
    executor.prepare(1, SIZE)
    executor.close()
    assert "the compiled kernels are not kept" in executor.notes[-1] and not list(tmp_path.glob("*.new"))


def test_refitting_is_reversible(onnx_bundle: Path, expected: Any, tmp_path: Path) -> None:
    """A, B and A again: the same image as the first, also in a denoiser that is loaded between."""
    world = simulated("tensorrt")
    executor = opened(world, world.bundle(onnx_bundle, tmp_path / "b", refittable=True))
    executor.prepare(1, SIZE)
    bundle = executor._bundle

    def images(steps: int) -> Any:
        executor.prepare(steps, SIZE)
        return executor.draw(steps, SIZE, *inputs(bundle, steps, 7)).images_BHWC

    base = np.float32(0.5)
    other = {"denoise": {"half": np.asarray(0.75, np.float32)}, "decode": {"gain": np.asarray(32, np.float32)}}
    executor.refit(other)
    assert not np.array_equal(images(1), expected(1, 7).images_BHWC)
    assert not np.array_equal(images(2), expected(2, 7).images_BHWC)
    executor.refit({"denoise": {"half": np.asarray(base)}, "decode": {"gain": np.asarray(64, np.float32)}})
    for steps in (1, 2, 3):
        world.assert_same(images(steps), expected(steps, 7).images_BHWC)
    assert executor.captures["weights changed"] >= 2
    world.check()
    executor.close()


def test_refitting_is_all_or_nothing(onnx_bundle: Path, expected: Any, tmp_path: Path) -> None:
    world = simulated("tensorrt")
    executor = opened(world, world.bundle(onnx_bundle, tmp_path / "b", refittable=True))
    executor.prepare(1, SIZE)
    good = {"half": np.asarray(0.75, np.float32)}
    with pytest.raises(EngineMismatch, match="decode does not take absent float32 .*absent"):
        executor.refit({"denoise": good, "decode": {"absent": np.asarray(1, np.float32)}})
    with pytest.raises(ConfigError, match="there is no stage 'unet' to refit; available: text, denoise, decode"):
        executor.refit({"unet": good})
    drawing = executor.draw(1, SIZE, *inputs(executor._bundle, 1, 7))
    world.assert_same(drawing.images_BHWC, expected(1, 7).images_BHWC)
    executor.close()
    fixed = opened(world, world.bundle(onnx_bundle, tmp_path / "fixed"))
    fixed.prepare(1, SIZE)
    with pytest.raises(EngineMismatch, match="denoise/1 takes no new weights: .*; build with --refit"):
        fixed.refit({"denoise": good})
    fixed.close()


@pytest.mark.parametrize("at", [1, 3, 20])
def test_a_lost_device(at: int, onnx_bundle: Path, tmp_path: Path) -> None:
    world = simulated()
    executor = opened(world, world.bundle(onnx_bundle, tmp_path / "b"))
    executor.prepare(4, SIZE)
    world.simulation.fail("operation", at=at)
    with pytest.raises(DeviceLost, match="the GPU failed while drawing with .*CUDA_ERROR_LAUNCH_FAILED"):
        for seed in range(4):
            executor.draw(4, SIZE, *inputs(executor._bundle, 4, seed))
    executor.close()
    world.simulation.recover()
    again = opened(world, executor._bundle.folder)
    again.prepare(1, SIZE)
    again.close()


FAILURES = {
    "memory of an engine": ("allocate", 1, "cannot load text from .*OUT_OF_MEMORY.*; close other programs or pipelines"),
    "memory of a buffer": ("allocate", 4, "GPU memory ran out while loading .* for 1 steps at 32 pixels"),
    "a launch": ("execute", 1, "text did not start"),
    "a launch in the capture": ("execute", 8, "denoise/1 did not start"),
    "a plan": ("deserialize", 2, "TensorRT-RTX 1.* cannot load denoise/1 from .*plan: .*; build it again here"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_failures_while_loading_leave_nothing(name: str, onnx_bundle: Path, tmp_path: Path) -> None:
    what, at, message = FAILURES[name]
    world = simulated()
    folder = world.bundle(onnx_bundle, tmp_path / "b")
    executor = opened(world, folder)
    world.simulation.fail(what, at=at)
    with pytest.raises(EngineMismatch, match=message) as caught:
        executor.prepare(1, SIZE)
    assert "\n" not in str(caught.value)
    executor.prepare(1, SIZE)  # once what was in the way is gone
    executor.close()
    del caught
    assert not world.open_things()


def test_an_engine_of_another_bundle_is_refused(onnx_bundle: Path, tmp_path: Path) -> None:
    import dataclasses

    world = simulated()
    bundle = open_bundle(world.bundle(onnx_bundle, tmp_path / "b"))
    wrong = dataclasses.replace(bundle.manifest.text.inputs[0], dtype="float32")
    assert isinstance(wrong, TensorSpec)
    text = dataclasses.replace(bundle.manifest.text, inputs=(wrong, bundle.manifest.text.inputs[1]))
    edited = dataclasses.replace(bundle, manifest=dataclasses.replace(bundle.manifest, text=text))
    executor = DeviceExecutor(edited, DeviceOptions(), world.modules)
    with pytest.raises(ShapeError, match="the engine of text has input_ids int64 .* its manifest says input_ids float32"):
        executor.prepare(1, SIZE)
    executor.close()


def test_options_are_checked() -> None:
    with pytest.raises(ConfigError, match="device must be a GPU's number from 0, got -1"):
        DeviceOptions(device=-1)
    with pytest.raises(ConfigError, match="cuda_graphs 'on' is unknown; available: auto, capture, runtime, off"):
        DeviceOptions(cuda_graphs="on")


def test_options_of_a_gpu_are_refused_on_the_host(onnx_bundle: Path) -> None:
    with pytest.raises(ConfigError, match="runs on onnxruntime, not on a GPU; leave .*device=1.* out"):
        open_executor(open_bundle(onnx_bundle), DeviceOptions(device=1))


def test_a_device_that_does_not_exist(onnx_bundle: Path, tmp_path: Path) -> None:
    world = simulated(num_devices=2)
    folder = world.bundle(onnx_bundle, tmp_path / "b")
    with pytest.raises(BackendUnavailable, match="there is no GPU 5; choose one that is here: 0 is Simulated"):
        opened(world, folder, device=5)
    executor = opened(world, folder, device=1)
    executor.prepare(1, SIZE)
    executor.close()


def test_other_threads_may_allocate_while_a_graph_is_captured(world: World, onnx_bundle: Path, tmp_path: Path) -> None:
    """Two pipelines of one process load at once: capture is thread-local."""
    folder = world.bundle(onnx_bundle, tmp_path / "b")
    errors: list[BaseException] = []

    def load() -> None:
        try:
            executor = opened(world, folder, runtime_cache=False)
            for steps in STEPS:
                executor.prepare(steps, SIZE)
                executor.draw(steps, SIZE, *inputs(executor._bundle, steps, 0))
            executor.close()
        except BaseException as exc:
            errors.append(exc)

    threads = [threading.Thread(target=load) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    world.check()

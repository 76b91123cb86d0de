"""Plans, engines, refitting and the runtime cache of the simulator, and the failures that a test can ask for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tensorrt_rtx as real
from cuda.bindings.driver import CUresult
from cuda.core._utils.cuda_utils import CUDAError

from cudasim import Simulation, simulate, write_plan
from cudasim.plans import HEADER_BYTES
from cudasim.sequence import NUM_VALUES, Sequence, engine_graph, logger, plan

GOOD = plan("Mul", 2, "x", "y")
DIAGNOSIS = real.EngineInvalidityDiagnostics


def ready(**options: Any) -> tuple[Simulation, Any, list[str]]:
    """A simulation with a current device, its runtime, and what that logs."""
    simulation = simulate(**options)
    simulation.cuda.Device(0).set_current()
    log, messages = logger(simulation)
    return simulation, simulation.trt.Runtime(log), messages


def test_an_engine_tells_its_tensors() -> None:
    _, runtime, _ = ready()
    engine = runtime.deserialize_cuda_engine(GOOD)
    assert [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)] == ["x", "y"]
    assert engine.get_tensor_mode("x") == real.TensorIOMode.INPUT and engine.get_tensor_mode("y") == real.TensorIOMode.OUTPUT
    assert engine.get_tensor_dtype("y") == real.float32 and tuple(engine.get_tensor_shape("y")) == (NUM_VALUES,)


def test_a_runtime_needs_a_logger_of_its_bindings() -> None:
    with pytest.raises(TypeError, match="ILogger"):
        simulate().trt.Runtime(print)


@pytest.mark.parametrize(
    "options, content, expected",
    [
        ({}, GOOD, None),
        ({"compute_capability": (8, 6)}, GOOD, DIAGNOSIS.UNSUPPORTED_CC),
        ({"driver_version": 12080}, GOOD, DIAGNOSIS.OLD_CUDA_DRIVER),
        ({"memory_bytes": 512}, GOOD, DIAGNOSIS.INSUFFICIENT_GPU_MEMORY),
        ({}, plan("Mul", 2, "x", "y", version="1.6.0.1"), DIAGNOSIS.VERSION_MISMATCH),
        ({}, b"an engine of something else", DIAGNOSIS.MALFORMED_ENGINE),
        ({}, GOOD[:200], DIAGNOSIS.MALFORMED_ENGINE),
    ],
    ids=lambda value: getattr(value, "name", None) or "",
)
def test_a_plan_for_another_machine_is_refused_with_its_reason(
    options: dict[str, Any], content: bytes, expected: real.EngineInvalidityDiagnostics | None
) -> None:
    _, runtime, messages = ready(**options)
    validity, bits = runtime.get_engine_validity(content[: runtime.engine_header_size])
    engine = runtime.deserialize_cuda_engine(content)
    if expected is None:
        assert (validity, bits) == (real.EngineValidity.VALID, 0) and engine is not None
    else:
        assert (validity, bits) == (real.EngineValidity.INVALID, int(expected)) and engine is None
        assert expected.name in messages[-1]


def test_a_plan_with_changed_weights_is_refused_although_its_header_is_good() -> None:
    _, runtime, messages = ready()
    changed = GOOD[:-4] + bytes(4)
    assert runtime.get_engine_validity(changed[:HEADER_BYTES])[0] == real.EngineValidity.VALID
    assert runtime.deserialize_cuda_engine(changed) is None
    assert "cut or changed" in messages[-1]


def test_a_plan_of_the_other_tensorrt_is_refused() -> None:
    _, runtime, _ = ready(backend="tensorrt")
    assert runtime.deserialize_cuda_engine(GOOD) is None
    assert runtime.deserialize_cuda_engine(plan("Mul", 2, "x", "y", backend="tensorrt")) is not None


def test_a_plan_can_be_streamed() -> None:
    simulation, runtime, _ = ready()
    pieces = [GOOD[:1000], GOOD[1000:], b""]

    class Reader(simulation.trt.IStreamReaderV2):  # type: ignore[misc, name-defined]
        def read(self, num_bytes: int, stream: int) -> bytes:
            return pieces.pop(0)

    assert runtime.deserialize_cuda_engine(Reader()) is not None


# --- executions ---------------------------------------------------------------------------------------------------------


def test_an_execution_without_addresses_scratch_or_stream_says_so() -> None:
    sequence = Sequence(simulate())
    context = sequence.double.engine.create_execution_context(real.ExecutionContextAllocationStrategy.USER_MANAGED)
    assert not context.execute_async_v3(int(sequence.main.handle)) and "no address" in sequence.messages[-1]
    assert context.set_tensor_address("x", sequence.x.handle) and context.set_tensor_address("y", sequence.y.handle)
    assert not context.execute_async_v3(int(sequence.main.handle)) and "1024 bytes of device memory" in sequence.messages[-1]
    assert not context.execute_async_v3(0x1234) and "no such stream" in sequence.messages[-1]
    assert not context.set_tensor_address("w", sequence.x.handle)


def test_a_context_of_the_static_strategy_has_its_own_scratch() -> None:
    simulation, runtime, _ = ready()
    engine = runtime.deserialize_cuda_engine(GOOD)
    before = simulation.memory.used_bytes
    context = engine.create_execution_context()
    assert simulation.memory.used_bytes == before + engine.device_memory_size_v2
    del context
    assert simulation.memory.used_bytes == before


def test_device_time_passes_between_events() -> None:
    simulation = simulate()
    sequence = Sequence(simulation)
    timed = simulation.cuda.EventOptions(timing_enabled=True)
    start, end, untimed = (simulation.cuda.Device(0).create_event(options) for options in (timed, timed, None))
    sequence.main.record(start)
    sequence.upload()
    sequence.execute(sequence.double, sequence.main)
    sequence.main.record(end)
    with pytest.raises(RuntimeError, match="have not completed"):
        end - start
    sequence.main.sync()
    assert end - start > 1.0
    sequence.main.record(untimed)
    with pytest.raises(RuntimeError, match="timing enabled"):
        untimed - start


# --- refitting and the runtime cache --------------------------------------------------------------------------------------


def refittable(sequence: Sequence, **options: Any) -> tuple[Any, Any]:
    """The sequence's first engine again, refittable; and its refitter."""
    engine = sequence.double.engine._runtime.deserialize_cuda_engine(plan("Mul", 2, "x", "y", **options))
    sequence.double = engine.create_execution_context(real.ExecutionContextAllocationStrategy.USER_MANAGED)
    sequence.bind()
    return engine, sequence.simulation.trt.Refitter(engine, sequence.logger)


def test_refitted_weights_are_used_by_what_comes_later_in_the_stream() -> None:
    sequence = Sequence(simulate())
    _, refitter = refittable(sequence, refittable=True)
    assert refitter.get_all_weights() == ["w"]
    assert (sequence.draw(3) == 7).all()
    sequence.capture()
    for factor in (5, 2):
        assert refitter.set_named_weights("w", real.Weights(np.full(NUM_VALUES, factor, np.float32)))
        assert refitter.refit_cuda_engine_async(int(sequence.main.handle))
        assert (sequence.replay(3) == 3 * factor + 1).all()
    sequence.simulation.check()


def test_refitting_beside_an_execution_is_a_race() -> None:
    sequence = Sequence(simulate())
    _, refitter = refittable(sequence, refittable=True)
    sequence.draw(3)
    sequence.enqueue()
    values = np.ones(NUM_VALUES, np.float32)
    refitter.set_named_weights("w", values)
    assert refitter.refit_cuda_engine_async(int(sequence.side.handle))
    sequence.main.sync()
    sequence.execute(sequence.double, sequence.main)
    assert {hazard.kind for hazard in sequence.simulation.hazards} == {"race"}


def test_refitting_at_once_needs_an_engine_at_rest() -> None:
    sequence = Sequence(simulate())
    _, refitter = refittable(sequence, refittable=True)
    values = np.full(NUM_VALUES, 5, np.float32)
    refitter.set_named_weights("w", values)
    sequence.draw(3)
    assert refitter.refit_cuda_engine() and (sequence.draw(3) == 16).all()
    assert not sequence.simulation.hazards
    sequence.enqueue()
    refitter.refit_cuda_engine()
    assert {hazard.kind for hazard in sequence.simulation.hazards} == {"race"}


def test_weights_that_were_freed_before_the_exchange_are_noticed() -> None:
    sequence = Sequence(simulate())
    _, refitter = refittable(sequence, refittable=True)
    refitter.set_named_weights("w", np.full(NUM_VALUES, 5, np.float32))
    assert refitter.refit_cuda_engine()
    assert {hazard.kind for hazard in sequence.simulation.hazards} == {"freed"}
    kept = np.full(NUM_VALUES, 5, np.float32)
    refitter.set_named_weights("w", kept)
    assert refitter.refit_cuda_engine() and (sequence.draw(3) == 16).all()


def test_wrong_weights_are_refused() -> None:
    sequence = Sequence(simulate())
    _, refitter = refittable(sequence, refittable=True)
    assert not refitter.set_named_weights("v", np.ones(NUM_VALUES, np.float32)) and "'v'" in sequence.messages[-1]
    assert not refitter.set_named_weights("w", np.ones(NUM_VALUES, np.float16)) and "float16" in sequence.messages[-1]
    assert not refitter.set_named_weights("w", np.ones(3, np.float32))
    with pytest.raises(RuntimeError, match="not refittable"):
        sequence.simulation.trt.Refitter(sequence.increment.engine, sequence.logger)


def test_the_runtime_cache_saves_compilations_on_the_same_machine() -> None:
    def load(blob: bytes, **options: Any) -> tuple[Simulation, bytes, bool]:
        simulation, runtime, _ = ready(**options)
        config = runtime.deserialize_cuda_engine(GOOD).create_runtime_config()
        cache = config.create_runtime_cache()
        taken = bool(blob) and cache.deserialize(blob)
        config.set_runtime_cache(cache)
        runtime.deserialize_cuda_engine(GOOD).create_execution_context(config)
        return simulation, bytes(memoryview(cache.serialize())), taken

    first, blob, _ = load(b"")
    assert first.counts["compilation"] == 1
    second, again, taken = load(blob)
    assert taken and second.counts["compilation"] == 0 and again == blob
    for damaged, options in ((blob[:-1], {}), (blob, {"device_name": "Another GPU"})):
        third, _, taken = load(damaged, **options)
        assert not taken and third.counts["compilation"] == 1


# --- failures that are asked for ------------------------------------------------------------------------------------------


def test_out_of_memory_at_the_nth_allocation() -> None:
    total = simulate()
    Sequence(total)
    for nth in range(1, total.counts["allocation"] + 1):
        simulation = simulate()
        simulation.fail("allocate", at=nth)
        with pytest.raises((CUDAError, AttributeError, TypeError)):  # TensorRT says it with None
            Sequence(simulation)


def test_memory_is_limited() -> None:
    simulation = simulate(memory_bytes=1000)
    device = simulation.cuda.Device(0)
    device.set_current()
    stream = device.create_stream()
    pool = simulation.cuda.DeviceMemoryResource(device)
    held = pool.allocate(800, stream=stream)
    assert simulation.driver.cuMemGetInfo() == (CUresult.CUDA_SUCCESS, 200, 1000)
    with pytest.raises(CUDAError, match="^CUDA_ERROR_OUT_OF_MEMORY: "):
        pool.allocate(201, stream=stream)
    held.close(stream)
    stream.sync()
    assert pool.allocate(1000, stream=stream).size == 1000


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("code", [CUresult.CUDA_ERROR_LAUNCH_FAILED, CUresult.CUDA_ERROR_ILLEGAL_ADDRESS])
def test_a_lost_device_stays_lost_until_it_is_reset(seed: int, code: CUresult) -> None:
    simulation = simulate(seed)
    sequence = Sequence(simulation)
    sequence.draw(3)
    sequence.capture()
    simulation.fail("operation", at=3, code=code)
    with pytest.raises(CUDAError, match=code.name):
        sequence.replay(4)
    for call in (sequence.main.sync, lambda: sequence.allocate(64), lambda: sequence.main.record()):
        with pytest.raises(CUDAError, match=code.name):
            call()
    assert not sequence.double.execute_async_v3(int(sequence.main.handle))
    assert simulation.driver.cuMemGetInfo()[0] == code
    assert simulation.schedule.num_pending == 0, "what was queued will never run"
    sequence.wait = sequence.main.sync = lambda: None  # type: ignore[method-assign]
    sequence.close()
    assert simulation.leaks() == [] and simulation.memory.used_bytes == 0
    simulation.recover()
    assert (Sequence(simulation).draw(3) == 7).all()


def test_execution_and_deserialisation_fail_once_when_asked_to() -> None:
    sequence = Sequence(simulate())
    sequence.simulation.fail("execute", at=2)
    with pytest.raises(RuntimeError, match="asked to"):
        sequence.draw(3)
    assert (sequence.draw(3) == 7).all()
    _, runtime, messages = ready()
    runtime._simulation.fail("deserialize")
    assert runtime.deserialize_cuda_engine(GOOD) is None and messages
    assert runtime.deserialize_cuda_engine(GOOD) is not None


def test_a_device_that_does_not_exist_is_refused() -> None:
    simulation = simulate(num_devices=2)
    assert [device.device_id for device in simulation.cuda.Device.get_all_devices()] == [0, 1]
    assert simulation.cuda.Device(1) is simulation.cuda.Device(1)
    with pytest.raises(ValueError, match="within"):
        simulation.cuda.Device(2)
    with pytest.raises(CUDAError, match="INVALID_CONTEXT"):
        simulation.cuda.Device(0).create_stream()


def test_external_weights_come_into_the_plan(tmp_path: Path) -> None:
    model = onnx.load_from_string(engine_graph("Mul", 2, "x", "y"))
    path = tmp_path / "graph.onnx"
    onnx.save_model(model, path, save_as_external_data=True, location="weights.data", size_threshold=0)
    content = write_plan(path, scratch_bytes=1024)
    (tmp_path / "weights.data").unlink()
    sequence = Sequence(simulate())
    engine = sequence.double.engine._runtime.deserialize_cuda_engine(content)
    sequence.double = engine.create_execution_context(real.ExecutionContextAllocationStrategy.USER_MANAGED)
    sequence.bind()
    assert (sequence.draw(3) == 7).all()

"""Bundles of simulated plans (tests/cudasim): whole bundles by every check, holding what the graphs compute."""

from __future__ import annotations

from pathlib import Path

from cudasim import device_bundle, simulate
from nitro_rt.bundle import open_bundle


def test_a_bundle_of_graphs_becomes_a_bundle_of_plans(make_bundle, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    graphs = make_bundle(tmp_path / "graphs", backend="onnxruntime", more_sizes_px=(64,))
    bundle = open_bundle(device_bundle(graphs, tmp_path / "plans", targets="sm86 sm89"))
    bundle.verify()
    assert bundle.backend == "tensorrt-rtx" and bundle.manifest.engine_key != open_bundle(graphs).manifest.engine_key
    assert bundle.manifest.target == {"device": "cuda", "targets": "sm86 sm89", "compute_capabilities": "8.6 8.9"}
    simulation = simulate(compute_capability=(8, 6))
    simulation.cuda.Device(0).set_current()
    runtime = simulation.trt.Runtime(simulation.trt.Logger())
    stages = []
    for stage, engine in bundle.engines():
        loaded = runtime.deserialize_cuda_engine(bundle.path(engine.files[0]).read_bytes())
        names = [loaded.get_tensor_name(index) for index in range(loaded.num_io_tensors)]
        assert names == [spec.name for spec in (*engine.inputs, *engine.outputs)]
        assert not loaded.refittable
        stages.append(stage)
    assert "decode@64" in stages and len(stages) == 7

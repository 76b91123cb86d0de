"""Where the device executor's tests run: on the simulator, and unchanged on a GPU with the real modules (`-m gpu`)."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from nitro_rt import manifest as m
from nitro_rt.device_modules import DeviceModules


@dataclasses.dataclass
class World:
    """Modules to run on, and what can be asked of the machine behind them."""

    backend: str
    modules: DeviceModules
    simulation: Any = None
    """None on a GPU."""

    def bundle(self, onnx_bundle: Path, out: Path, **plan: Any) -> Path:
        """The bundle of ONNX engines as one of plans for this world; `plan` is for the simulator."""
        if self.simulation is not None:
            from cudasim import device_bundle

            return device_bundle(onnx_bundle, out, backend=self.backend, **plan)
        return _compiled(onnx_bundle, out, self.backend)

    def assert_same(self, images_BHWC: Any, expected_BHWC: Any) -> None:
        """Equal on the simulator, whose engines are the host's; a GPU's sine may round a value to the next level."""
        difference = np.abs(images_BHWC.astype(int) - expected_BHWC.astype(int)).max()
        assert difference <= (0 if self.simulation is not None else 1)

    def num_syncs(self) -> int:
        return int(self.simulation.counts["sync"])

    def check(self) -> None:
        """Raises: AssertionError for a hazard. A GPU tells of none."""
        if self.simulation is not None:
            self.simulation.check()

    def open_things(self) -> list[str]:
        """What is open that was not closed; on a GPU, the memory that is in use, in MiB."""
        gc.collect()
        if self.simulation is not None:
            return [str(leak) for leak in self.simulation.leaks()]
        _, free, total = self.modules.driver.cuMemGetInfo()
        return [f"{(int(total) - int(free)) >> 20} MiB in use"]


def simulated(backend: str = "tensorrt-rtx", seed: int = 0, **machine: Any) -> World:
    from cudasim import simulate

    simulation = simulate(seed, backend=backend, **machine)
    modules = DeviceModules(cuda=simulation.cuda, driver=simulation.driver, trt=simulation.trt)
    return World(backend=backend, modules=modules, simulation=simulation)


def real(backend: str) -> Iterator[World]:
    """The GPU of this machine. Raises: BackendUnavailable if the backend is not installed."""
    from nitro_rt.device_modules import load_modules

    yield World(backend=backend, modules=load_modules(backend))


def _compiled(onnx_bundle: Path, out: Path, backend: str) -> Path:
    """The engines compiled for this machine's first GPU by the real builder."""
    import hashlib
    import shutil

    from nitro_engines.backends import load_backend
    from nitro_rt.device import find_driver

    manifest = m.from_json(m.BundleManifest, (onnx_bundle / m.BUNDLE_FILE).read_text(), where=str(onnx_bundle))
    shutil.copytree(onnx_bundle, out)
    target = find_driver().gpus[0].target
    builder = load_backend(backend, (target,) if backend == "tensorrt-rtx" else ())

    def compiled(engine: m.Engine, name: str) -> m.Engine:
        work = out / name
        work.mkdir()
        onnx_path = work / "engine.onnx"
        shutil.copyfile(onnx_bundle / engine.files[0].path, onnx_path)
        graph = m.Graph(files=engine.files, inputs=engine.inputs, outputs=engine.outputs, parity_max_abs=None)
        references = []
        for path in builder.compile(onnx_path, graph, work):
            content = path.read_bytes()
            digest = hashlib.sha256(content).hexdigest()
            (out / "files" / f"{digest}{path.suffix}").write_bytes(content)
            references.append(m.FileRef(path=f"files/{digest}{path.suffix}", sha256=digest, num_bytes=len(content)))
        shutil.rmtree(work)
        return dataclasses.replace(engine, backend=backend, files=tuple(references), options=builder.options("float32"))

    def sized(engines: Any, name: str) -> dict[str, Any]:
        denoise = {count: compiled(engine, f"{name}-{count}") for count, engine in engines.denoise.items()}
        return {"denoise": denoise, "decode": compiled(engines.decode, f"{name}-decode")}

    made = dataclasses.replace(
        manifest,
        text=compiled(manifest.text, "text"),
        **sized(manifest, "first"),
        more_sizes={edge: m.SizeEngines(**sized(engines, str(edge))) for edge, engines in manifest.more_sizes.items()},
        target=builder.target(),
        toolchain=manifest.toolchain | builder.toolchain(),
    )
    (out / m.BUNDLE_FILE).write_text(m.to_json(m.sealed(made)), encoding="utf-8")
    return out

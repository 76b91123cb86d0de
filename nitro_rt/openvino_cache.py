"""What OpenVINO compiled, kept beside the bundle so that the next load begins there.

A kept model is OpenVINO's own export: the graph after its transformations, from which loading makes the kernels and packs
the weights anew. Measured on nitro-emoji, a load takes about a third of the processor time of reading and compiling.

Where an engine has one file of weights, the export refers to it by offset and holds none itself: 2.6 MB in place of 74. With
several files the offsets would be of no file in particular, so small engines are then kept whole and large ones not at all.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import openvino

from nitro_rt import openvino_model
from nitro_rt.manifest import Engine
from nitro_rt.openvino_model import DEVICE, one_line

WEIGHTLESS = ("2026.4.",)
"""Versions whose offsets into the weight file were tested, image against image. They are OpenVINO's internal matter: earlier
versions numbered an ONNX graph's constants in their place, and would draw from the wrong weights."""

LARGEST_BYTES = 1 << 26
"""Of what is kept: no engine's weights take disk a second time beyond this."""

LARGEST_ENGINE_BYTES = 1 << 30
"""Larger engines are not kept: packing their weights is most of their load, and the memory that exporting them takes was
not measured."""

ABANDONED_S = 3600.0
"""A half-written file of this age is of a process that was killed."""

DIGEST_LENGTH = 64


class ModelCache:
    """The compiled models of one bundle, a file for each stage.

    Threads and processes may share the folder: a file is replaced whole. One that is damaged, or of another engine, OpenVINO,
    CPU or nitro-rt, is noted and replaced. It is trusted as the bundle is: its digest guards against accidents, not attackers.
    """

    def __init__(self, folder: Path, notes: list[str]) -> None:
        """`notes` gets what a user should know of what could not be used or kept."""
        self._folder, self._notes = folder, notes

    def get(
        self,
        core: openvino.Core,
        stage: str,
        engine: Engine,
        paths: tuple[Path, ...],
        compile_with: Callable[[dict[str, str]], openvino.CompiledModel],
    ) -> openvino.CompiledModel:
        """The model that was kept, or the one that `compile_with` makes with the given properties, which is then kept.

        Raises: what `compile_with` raises.
        """
        properties = _properties_to_keep(engine, paths)
        if properties is None:
            return compile_with(dict(engine.options))
        properties |= engine.options
        file = self._folder / f"{stage.replace('/', '-')}.blob"
        key = _key(core, engine, sorted(properties))
        blob = self._read(stage, file, key)
        if blob is not None:
            try:
                # The tensor owns a copy: the model's small constants stay in it, and OpenVINO keeps no array alive.
                return core.import_model(openvino.Tensor(np.frombuffer(blob, np.uint8)), DEVICE, properties)
            except RuntimeError as exc:
                self._note(f"OpenVINO does not take what it compiled for {stage} ({one_line(exc)}); compiled again")
        compiled = compile_with(properties)
        self._write(stage, file, key, compiled)
        return compiled

    def _read(self, stage: str, file: Path, key: bytes) -> memoryview | None:
        try:
            content = memoryview(file.read_bytes())
        except OSError:
            return None  # the first load of this bundle; what is wrong with the folder, writing will tell
        digest, kept_key, blob = _parts(content)
        if digest != _digest(kept_key, blob):
            self._note(f"what OpenVINO compiled for {stage} is cut or damaged ({file}); compiled again")
        elif kept_key != key:
            self._note(f"what is kept for {stage} is of another engine, OpenVINO, CPU or nitro-rt ({file}); compiled again")
        else:
            return blob
        return None

    def _write(self, stage: str, file: Path, key: bytes, compiled: openvino.CompiledModel) -> None:
        stream = io.BytesIO()
        prepared = file.with_name(f"{file.name}.{os.getpid()}-{threading.get_ident()}.new")
        try:
            compiled.export_model(stream)
            blob = stream.getbuffer()
            if blob.nbytes > LARGEST_BYTES:
                return  # weights that a transformation rewrote are held by the export, whatever was asked for
            self._folder.mkdir(exist_ok=True)
            _remove_abandoned(self._folder)
            with prepared.open("wb") as out:
                out.write(_digest(key, blob) + key)
                out.write(blob)
            os.replace(prepared, file)
        except (OSError, RuntimeError) as exc:
            with suppress(OSError):
                prepared.unlink(missing_ok=True)
            why = exc.strerror if isinstance(exc, OSError) else one_line(exc)
            self._note(
                f"what OpenVINO compiled cannot be kept in {self._folder} ({why}), so the next load compiles it again; "
                "runtime_cache=False keeps nothing and says nothing"
            )

    def _note(self, note: str) -> None:
        if note not in self._notes:  # one cause for every stage
            self._notes.append(note)


def model_cache_folder(bundle: Path) -> Path:
    """`engines/x.openvino` of the bundle `engines/x`: beside it, since a bundle never changes."""
    folder = bundle.resolve()
    return folder.with_name(f"{folder.name}.openvino")


def _properties_to_keep(engine: Engine, paths: tuple[Path, ...]) -> dict[str, str] | None:
    """Properties with which an engine is compiled to be kept, and loaded again; None where it is not kept."""
    num_bytes = sum(reference.num_bytes for reference in engine.files)
    if num_bytes > LARGEST_ENGINE_BYTES:
        return None
    if paths[0].suffix == ".onnx" and len(paths) == 2 and openvino.__version__.startswith(WEIGHTLESS):
        return {"CACHE_MODE": "OPTIMIZE_SIZE", "WEIGHTS_PATH": str(paths[1])}
    return {} if num_bytes <= LARGEST_BYTES else None


def _key(core: openvino.Core, engine: Engine, property_names: list[str]) -> bytes:
    """Digest over everything that decides a compiled model, in hex."""
    facts = {
        "files": [reference.sha256 for reference in engine.files],
        "options": engine.options,
        "properties": property_names,
        "openvino": openvino.__version__,
        "reader": hashlib.sha256(Path(openvino_model.__file__).read_bytes()).hexdigest(),
        "cpu": [core.get_property(DEVICE, name) for name in ("FULL_DEVICE_NAME", "DEVICE_ARCHITECTURE")],
        "capabilities": sorted(core.get_property(DEVICE, "OPTIMIZATION_CAPABILITIES")),
        "features": _cpu_features(),
        "num_cpus": _num_cpus(),  # how large matrices are split depends on it
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest().encode()


def _cpu_features(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The first CPU's feature flags where the system lists them, else the processor's name."""
    with suppress(OSError), cpuinfo.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if line.startswith(("flags", "Features")):
                return line.strip()
    return platform.processor()


def _num_cpus() -> list[int]:
    """Of the machine, and those that this process may use."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    return [os.cpu_count() or 0, usable]


def _parts(content: memoryview) -> tuple[bytes, bytes, memoryview]:
    """Digest, key, model."""
    return bytes(content[:DIGEST_LENGTH]), bytes(content[DIGEST_LENGTH : 2 * DIGEST_LENGTH]), content[2 * DIGEST_LENGTH :]


def _digest(key: bytes, blob: memoryview) -> bytes:
    digest = hashlib.sha256(key)
    digest.update(blob)
    return digest.hexdigest().encode()


def _remove_abandoned(folder: Path) -> None:
    for prepared in folder.glob("*.new"):
        with suppress(OSError):
            if time.time() - prepared.stat().st_mtime > ABANDONED_S:
                prepared.unlink()

"""What a peer makes of the checkpoint once, as its user would, before any start that is timed: an ONNX or OpenVINO folder.

A conversion runs in a process of its own, so neither its imports nor its memory count as the peer's, and is kept beside the
environments under a key of the checkpoint's files, the way of converting and the environment's pins. It is published by one
rename; what a killed one left is removed by the next. Standard library only.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nitro_bench.peers.transformers4 import in_transformers_4_form

FACTS_FILE = "conversion.json"
MEMORY_SHARE = 0.85
"""Of the machine's memory; a conversion that wants more fails, and not what else runs here."""


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """A converted checkpoint."""

    folder: Path
    facts: dict[str, Any]
    """What the converting process told: `seconds`, `peak_rss_bytes`, `versions`, ..."""

    @property
    def note(self) -> str:
        versions = ", ".join(f"{name} {version}" for name, version in self.facts["versions"].items())
        peak_gib = self.facts["peak_rss_bytes"] / 2**30
        return f"converted once, in no figure here: {self.facts['seconds']:.0f} s, {peak_gib:.1f} GiB at peak ({versions})"


def converted(models: Path, python: Path, script: Path, model: Path, settings: Mapping[str, Any], pins: Path) -> Conversion:
    """The conversion of `model`, made now if it is not there.

    Args:
        models: the folder that keeps conversions.
        python: the interpreter that converts.
        script: is run with one JSON object, `settings` and `checkpoint`, `out`, `limit_bytes`; prints a line of JSON last.
        model: the checkpoint's diffusers folder.
        pins: the requirement file of the interpreter's environment, part of the key, as is its companion NAME-no-deps.txt.
    Raises: RuntimeError if the conversion fails, with its last line.
    """
    folder = models / _key(model, script, settings, pins)
    facts = folder / FACTS_FILE
    if not facts.is_file():
        models.mkdir(parents=True, exist_ok=True)
        with _alone_in(models):
            if not facts.is_file():
                _convert(folder, python, script, model, settings)
    return Conversion(folder=folder, facts=json.loads(facts.read_text(encoding="utf-8")))


def _convert(folder: Path, python: Path, script: Path, model: Path, settings: Mapping[str, Any]) -> None:
    for left in folder.parent.glob(".making-*"):  # by a conversion that was killed: nobody else works here now
        shutil.rmtree(left)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".making-") as scratch:
        out = Path(scratch) / "out"
        out.mkdir()
        checkpoint = in_transformers_4_form(model, Path(scratch) / "checkpoint")
        limit_bytes = int(MEMORY_SHARE * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
        told = _run(python, script, {**settings, "checkpoint": str(checkpoint), "out": str(out), "limit_bytes": limit_bytes})
        (out / FACTS_FILE).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
        os.replace(out, folder)


@contextmanager
def _alone_in(models: Path) -> Iterator[None]:
    """One conversion at a time: it may take most of the machine's memory."""
    descriptor = os.open(models, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _key(model: Path, script: Path, settings: Mapping[str, Any], pins: Path) -> str:
    # By name, size and time: to read gigabytes for a digest would take longer than some conversions.
    files = sorted(path for path in model.rglob("*") if path.is_file())
    states = [[str(path.relative_to(model)), path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    no_deps = pins.with_name(f"{pins.stem}-no-deps.txt")
    texts = [path.read_text(encoding="utf-8") for path in (script, pins, no_deps) if path.is_file()]
    whole = json.dumps([str(model), states, sorted(settings.items()), texts])
    return f"{model.name}-{hashlib.sha256(whole.encode()).hexdigest()[:16]}"


def _run(python: Path, script: Path, request: Mapping[str, Any]) -> dict[str, Any]:
    start_s = time.perf_counter()
    done = subprocess.run(
        [str(python), "-I", str(script), json.dumps(request)], capture_output=True, text=True, check=False, env=dict(os.environ)
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise RuntimeError(f"{script.name} ended with {done.returncode}: {lines[-1] if lines else 'it printed nothing'}")
    told: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return {"seconds": round(time.perf_counter() - start_s, 1), **told}

"""What shaped the graphs: the versions of the libraries, and of this package's own code."""

from __future__ import annotations

import hashlib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import nitro_rt.schedule
from nitro_rt.errors import BackendUnavailable

OPSET = 20
"""ONNX operator set of the graphs: the dynamo exporter's own, so nothing is converted afterwards."""

PACKAGES = ("diffusers", "onnx", "onnx-ir", "onnxruntime", "onnxscript", "safetensors", "tokenizers", "torch", "transformers")


def toolchain() -> dict[str, str]:
    """Package -> version, plus `opset` and `nitro-export` (a digest of this package's code and of the schedule's).

    Reads metadata only: none of the packages is imported.
    Raises: BackendUnavailable naming what is not installed.
    """
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError as exc:
            raise BackendUnavailable(f"export needs {package}, which is not installed: pip install 'nitro-rt[export]'") from exc
    return {**found, "opset": str(OPSET), "nitro-export": _code_sha256()[:12]}


def _code_sha256() -> str:
    # A version number would not notice an edited checkout, and stale graphs would then be taken from a cache.
    digest = hashlib.sha256()
    for path in [*sorted(Path(__file__).parent.rglob("*.py")), Path(nitro_rt.schedule.__file__)]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()

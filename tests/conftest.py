"""What every test run shares: the header with the versions, and the markers that skip with their reason."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from importlib import metadata

import pytest

_SHOWN = ("torch", "diffusers", "openvino", "onnxruntime", "tensorrt-cu13", "tensorrt-rtx-cu13", "cuda-core", "cuda-bindings")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow too")


def pytest_report_header() -> list[str]:
    versions = ", ".join(f"{name} {_version(name)}" for name in _SHOWN)
    return [versions, f"GPU: {_gpu() or 'none'}"]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    skips = {}
    if _gpu() is None:
        skips["gpu"] = "no NVIDIA GPU answers nvidia-smi on this machine"
    if not any(importlib.util.find_spec(name) for name in ("tensorrt", "tensorrt_rtx")):
        skips["trt"] = "neither tensorrt nor tensorrt_rtx is installed"
    if not config.getoption("--slow"):
        skips["slow"] = "takes long; run with --slow (make test-full)"
    for item in items:
        for marker, reason in skips.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


def _version(distribution: str) -> str:
    # From the metadata: importing torch or a TensorRT only for the header would cost seconds.
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "-"


def _gpu() -> str | None:
    """Name and driver of the first GPU, or None where there is no working driver."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    query = [command, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    return answer.stdout.strip().partition("\n")[0] or None if answer.returncode == 0 else None

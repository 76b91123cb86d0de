"""TensorRT bundles on a machine that cannot run them: readable, verifiable, and refused in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nitro_rt import device
from nitro_rt.bundle import open_bundle
from nitro_rt.device import Driver, Gpu, built_targets, find_driver
from nitro_rt.errors import BackendUnavailable, EngineMismatch
from nitro_rt.pipeline import Pipeline
from nitro_rt.verify import verify_bundle

NO_DRIVER = Driver(found=False, cuda_version="", gpus=(), reason="no NVIDIA driver (libcuda.so.1 is not here)")
CARD = Driver(found=True, cuda_version="13.0", gpus=(Gpu(name="RTX 4090", target="sm89"),), reason="")


@pytest.fixture(params=["tensorrt-rtx", "tensorrt"])
def folder(request: pytest.FixtureRequest, make_bundle: Any, tmp_path: Path) -> Path:
    target = {"device": "cuda", "targets": "sm86 sm89", "compute_capabilities": "8.6 8.9"}
    path: Path = make_bundle(tmp_path / "bundle", backend=request.param, target=target)
    return path


def _refusal(folder: Path, monkeypatch: pytest.MonkeyPatch, driver: Driver, kind: type[Exception]) -> str:
    monkeypatch.setattr(device, "find_driver", lambda: driver)
    with pytest.raises(kind) as caught:
        Pipeline.load(folder)
    message = str(caught.value)
    assert "\n" not in message and "engines for sm86, sm89" in message
    return message


def test_it_opens_and_verifies_without_a_gpu(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "find_driver", lambda: NO_DRIVER)
    bundle = open_bundle(folder)
    assert built_targets(bundle) == ("sm86", "sm89")
    checks = {check.name: check for check in verify_bundle(folder)}
    assert [checks[name].status for name in ("manifest", "files", "schedule", "image")] == ["ok", "ok", "ok", "skipped"]
    assert "no NVIDIA driver" in checks["image"].detail


def test_without_a_driver(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    message = _refusal(folder, monkeypatch, NO_DRIVER, BackendUnavailable)
    assert "no NVIDIA driver" in message and "nitro-rt build --backend openvino" in message


def test_with_another_gpu(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = Driver(found=True, cuda_version="13.0", gpus=(Gpu(name="RTX 5090", target="sm120"),), reason="")
    message = _refusal(folder, monkeypatch, other, EngineMismatch)
    assert "here is RTX 5090 (sm120)" in message and "--target sm120" in message


def test_with_the_gpu_but_no_runtime(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    message = _refusal(folder, monkeypatch, CARD, BackendUnavailable)
    assert f"pip install 'nitro-rt[{open_bundle(folder).backend}]'" in message


def test_with_gpu_and_runtime(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert "does not run them yet" in _refusal(folder, monkeypatch, CARD, BackendUnavailable)


def test_the_driver_is_found_or_its_absence_explained() -> None:
    driver = find_driver()
    assert bool(driver.gpus) != bool(driver.reason)
    assert all(gpu.target.startswith("sm") for gpu in driver.gpus)


@pytest.mark.gpu
def test_the_driver_of_a_gpu_machine_is_found() -> None:
    driver = find_driver()
    assert driver.found and driver.gpus and driver.cuda_version

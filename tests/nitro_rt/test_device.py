"""The driver, asked through its C interface: a fake one answers here, the machine's own where there is a GPU."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest

from nitro_engines.backends.rtx_targets import CAPABILITIES
from nitro_rt import device
from nitro_rt.bundle import open_bundle
from nitro_rt.device import RTX_TARGETS, built_targets, cuda_version, driver_version, find_driver

GIB = 1 << 30
CARDS = {b"0000:01:00.0": ("NVIDIA GeForce RTX 4090", 8, 9, 24), b"0000:41:00.0": ("NVIDIA H100", 9, 0, 80)}
"""By PCI address, in CUDA's order: name, compute capability, GiB."""


class FakeCuda:
    """libcuda.so.1 with two GPUs. It writes through the pointers that it is given, as the C functions do."""

    def __init__(self, *, status: int = 0, version: int = 13000, cards: dict[bytes, Any] = CARDS) -> None:
        self.status, self.version, self.cards = status, version, list(cards.items())

    def cuInit(self, flags: int) -> int:
        return self.status

    def cuDriverGetVersion(self, version: Any) -> int:
        version._obj.value = self.version
        return 0

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = len(self.cards)
        return 0

    def cuDeviceGet(self, handle: Any, ordinal: int) -> int:
        handle._obj.value = ordinal
        return 0

    def cuDeviceGetName(self, name: Any, length: int, handle: Any) -> int:
        name.value = self.cards[handle.value][1][0].encode()
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: int, handle: Any) -> int:
        value._obj.value = self.cards[handle.value][1][{75: 1, 76: 2}[attribute]]
        return 0

    def cuDeviceTotalMem_v2(self, num_bytes: Any, handle: Any) -> int:
        num_bytes._obj.value = self.cards[handle.value][1][3] * GIB
        return 0

    def cuDeviceGetPCIBusId(self, bus_id: Any, length: int, handle: Any) -> int:
        bus_id.value = self.cards[handle.value][0]
        return 0


class FakeManagement:
    """libnvidia-ml.so.1: half of each card is free. It knows cards by PCI address and closes what it opens."""

    def __init__(self, *, status: int = 0) -> None:
        self.status, self.num_open = status, 0

    def nvmlInit_v2(self) -> int:
        self.num_open += self.status == 0
        return self.status

    def nvmlShutdown(self) -> int:
        self.num_open -= 1
        return 0

    def nvmlDeviceGetHandleByPciBusId_v2(self, bus_id: bytes, handle: Any) -> int:
        handle._obj.value = 1 + list(CARDS).index(bus_id)
        return 0

    def nvmlDeviceGetMemoryInfo(self, handle: Any, memory: Any) -> int:
        memory._obj.free = list(CARDS.values())[handle.value - 1][3] * GIB // 2
        return 0


def _libraries(monkeypatch: pytest.MonkeyPatch, cuda: Any, management: Any = None) -> None:
    """What `ctypes.CDLL` finds."""
    found = {"libcuda.so.1": cuda, "libnvidia-ml.so.1": management}

    def load(name: str) -> Any:
        if found[name] is None:
            raise OSError(f"{name}: cannot open shared object file")
        return found[name]

    monkeypatch.setattr(ctypes, "CDLL", load)
    monkeypatch.setattr("sys.platform", "linux")


def test_the_gpus_are_told_with_their_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    management = FakeManagement()
    _libraries(monkeypatch, FakeCuda(), management)
    driver = find_driver()
    assert driver.found and not driver.reason and driver.cuda_version == "13.0"
    ada, hopper = driver.gpus
    assert (str(ada), ada.ordinal, ada.memory_bytes, ada.free_bytes) == (
        "NVIDIA GeForce RTX 4090 (sm89)",
        0,
        24 * GIB,
        12 * GIB,
    )
    assert (hopper.target, hopper.ordinal, hopper.memory_bytes, hopper.free_bytes) == ("sm90", 1, 80 * GIB, 40 * GIB)
    assert management.num_open == 0


@pytest.mark.parametrize("management", [None, FakeManagement(status=9)], ids=["missing", "not started"])
def test_without_the_management_library_free_memory_is_unknown(monkeypatch: pytest.MonkeyPatch, management: Any) -> None:
    _libraries(monkeypatch, FakeCuda(), management)
    gpu = find_driver().gpus[0]
    assert gpu.memory_bytes == 24 * GIB and gpu.free_bytes is None


def test_a_machine_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    _libraries(monkeypatch, None)
    driver = find_driver()
    assert not driver.found and driver.gpus == () and driver.cuda_version == ""
    assert driver.reason == "no NVIDIA driver (libcuda.so.1 is not here)"


@pytest.mark.parametrize(
    ("cuda", "reason"),
    [
        (FakeCuda(status=100), "the NVIDIA driver finds no GPU"),
        (FakeCuda(cards={}), "the NVIDIA driver finds no GPU"),
        (FakeCuda(status=803), "the NVIDIA driver does not start (cuInit gave 803)"),
    ],
    ids=["no device", "none visible", "driver and library differ"],
)
def test_a_driver_without_a_gpu(monkeypatch: pytest.MonkeyPatch, cuda: Any, reason: str) -> None:
    _libraries(monkeypatch, cuda)
    driver = find_driver()
    assert driver.found and driver.gpus == () and driver.reason == reason


@pytest.mark.parametrize(
    "text",
    [
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun Jul 27 07:09:12 UTC 2025\nGCC version:  gcc 12.2.0\n",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (builder@U22)  Sun Jul 27\n",
    ],
)
def test_the_driver_s_own_version(tmp_path: Path, text: str) -> None:
    (tmp_path / "version").write_text(text)
    assert driver_version(tmp_path / "version") == "580.65.06"


def test_the_driver_s_own_version_where_nothing_tells_it(tmp_path: Path) -> None:
    assert driver_version(tmp_path / "version") == ""
    (tmp_path / "version").write_text("another kind of text\n")
    assert driver_version(tmp_path / "version") == ""


@pytest.mark.parametrize(("number", "version"), [(13000, "13.0"), (12080, "12.8"), (0, "")])
def test_cuda_version(number: int, version: str) -> None:
    assert cuda_version(number) == version


def test_the_targets_of_a_bundle(make_bundle: Any, tmp_path: Path) -> None:
    target = {"device": "cuda", "targets": "sm86 sm89"}
    assert built_targets(open_bundle(make_bundle(tmp_path / "gpu", backend="tensorrt-rtx", target=target))) == ("sm86", "sm89")
    assert built_targets(open_bundle(make_bundle(tmp_path / "cpu"))) == ()


def test_what_tensorrt_rtx_runs_on_is_what_it_is_built_for() -> None:
    assert RTX_TARGETS == tuple(CAPABILITIES)


def test_this_machine_s_driver_is_found_or_its_absence_explained() -> None:
    driver = find_driver()
    assert bool(driver.gpus) != bool(driver.reason)
    assert all(gpu.target.startswith("sm") for gpu in driver.gpus)


@pytest.mark.gpu
def test_the_driver_of_a_gpu_machine_is_found() -> None:
    driver = find_driver()
    assert driver.found and driver.gpus and int(driver.cuda_version.split(".")[0]) >= 11
    assert [gpu.ordinal for gpu in driver.gpus] == list(range(len(driver.gpus)))
    for gpu in driver.gpus:
        assert gpu.memory_bytes and gpu.free_bytes is not None and 0 <= gpu.free_bytes <= gpu.memory_bytes
    assert device.driver_version() == driver.version

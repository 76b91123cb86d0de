"""`make test-gpu`: refused without a GPU; its report tells what pytest said."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from nitro_bench import gpu
from nitro_rt.device import Driver, Gpu

NO_DRIVER = Driver(found=False, cuda_version="", gpus=(), reason="no NVIDIA driver (libcuda.so.1 is not here)")
CARD = Driver(found=True, cuda_version="13.0", gpus=(Gpu(name="NVIDIA RTX 4090", target="sm89"),), reason="")
TESTS = """
import pytest
pytestmark = pytest.mark.gpu
def test_good(): pass
def test_bad(): assert 1 == 2, "one | two"
"""


def test_without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(gpu, "find_driver", lambda: NO_DRIVER)
    assert gpu.main(["--report", str(tmp_path / "reports")]) == 1
    assert "make test-gpu needs an NVIDIA GPU: no NVIDIA driver" in capsys.readouterr().err
    assert not (tmp_path / "reports").exists()


def test_it_reports_what_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "find_driver", lambda: CARD)
    monkeypatch.setattr(gpu, "examine", lambda: dataclasses.replace(EXAMINED, driver=CARD))
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "conftest.py").write_text(
        "def pytest_addoption(parser): parser.addoption('--slow', action='store_true')"
    )
    (tmp_path / "tests" / "test_some.py").write_text(TESTS)
    (tmp_path / "tests" / "pytest.ini").write_text("[pytest]\nmarkers = gpu: needs one\n")
    assert gpu.main(["--report", str(tmp_path / "reports"), "--tests", str(tmp_path / "tests")]) == 1
    (markdown,) = (tmp_path / "reports").glob("gpu-tests_nvidia-rtx-4090_*.md")
    facts = json.loads(markdown.with_suffix(".json").read_text())
    assert facts["counts"] == {"passed": 1, "failed": 1, "error": 0, "skipped": 0}
    assert [test["outcome"] for test in facts["tests"]] == ["passed", "failed"]
    assert "| failed |" in markdown.read_text() and "one / two" in markdown.read_text()


EXAMINED = gpu.examine()

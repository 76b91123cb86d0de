"""The toolchain names what shaped the graphs."""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError

import pytest
import torch

from nitro_export import toolchain
from nitro_export.toolchain import OPSET, PACKAGES
from nitro_rt.errors import BackendUnavailable


def test_names_versions_opset_and_own_code() -> None:
    found = toolchain()
    assert set(found) == {*PACKAGES, "opset", "nitro-export"}
    assert torch.__version__.startswith(found["torch"].partition("+")[0])
    assert found["opset"] == str(OPSET)
    assert toolchain() == found


def test_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(package: str) -> str:
        raise PackageNotFoundError(package)

    monkeypatch.setattr(sys.modules["nitro_export.toolchain"], "version", absent)
    with pytest.raises(BackendUnavailable, match=r"nitro-rt\[export\]"):
        toolchain()

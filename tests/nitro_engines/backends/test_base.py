from __future__ import annotations

import sys

import pytest

from nitro_engines.backends import available_backends, load_backend
from nitro_rt.errors import BackendUnavailable


@pytest.mark.parametrize(
    ("backend", "module", "library", "extra"),
    [
        ("openvino", "openvino_graph", "openvino", "cpu,export"),
        ("onnxruntime", "onnx_file", "onnxruntime", "cpu,export"),
        ("tensorrt-rtx", "rtx_plan", "tensorrt_rtx", "tensorrt-rtx,export"),
        ("tensorrt", "trt_plan", "tensorrt", "tensorrt,export"),
    ],
)
def test_a_missing_library_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, backend: str, module: str, library: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.delitem(sys.modules, f"nitro_engines.backends.{module}", raising=False)
    with pytest.raises(BackendUnavailable, match=rf"needs {library}.*pip install 'nitro-rt\[{extra}\]'"):
        load_backend(backend, ("sm89",) if backend == "tensorrt-rtx" else ())


def test_what_is_available() -> None:
    assert available_backends() == ("openvino", "onnxruntime", "tensorrt-rtx", "tensorrt")

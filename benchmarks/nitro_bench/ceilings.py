"""What this machine can do at best: a large product of matrices in each type, and a large copy. Measured, best of several.

The product runs in NumPy (float32) and in OpenVINO, which computes in the types that the processor has; the larger figure is
the ceiling, because a ceiling that an engine can pass is none. In INT8 it runs as a 1x1 convolution, too: on processors without
dot products of bytes that is OpenVINO's faster kernel, and engines use it. GPUs are not measured here: `cards` has their data
sheets.
"""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

EDGES = (1024, 2048)
"""Of the square matrices, 2 and 17 GFLOP for a product: the large one fills the fastest units, the small one finds a quiet
moment on a machine that does something else too."""
COPY_BYTES = 128 << 20
MIN_REPEATS, MAX_SECONDS = 3, 2.0
"""Of each: at least so often, then as often as fits."""
HINTS = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
"""Type -> OpenVINO's name for it."""


@dataclass(frozen=True, kw_only=True)
class Ceiling:
    """The best rate that was reached."""

    kind: str
    """`float32`, `bfloat16`, `int8`, ...: a product of matrices in this type; `copy`: memory."""
    per_s: float | None
    """Operations a second, two for each multiplication with its addition; for `copy` bytes read and written a second. None
    where `note` says why not."""
    by: str
    """The library whose figure it is."""
    note: str = ""


def measure_ceilings(dtypes: Iterable[str]) -> tuple[Ceiling, ...]:
    """The ceilings of these types, and of a copy."""
    return (*(_product(dtype) for dtype in dict.fromkeys(dtypes)), _copy())


def better_of(first: Iterable[Ceiling], second: Iterable[Ceiling]) -> tuple[Ceiling, ...]:
    """Of two measurements of the same kinds the larger rates: another load may have lain on one of them."""
    return tuple(max(pair, key=lambda found: found.per_s or 0.0) for pair in zip(first, second, strict=True))


def _product(dtype: str) -> Ceiling:
    found: list[tuple[float, str]] = []
    note = ""
    for edge in EDGES:
        if dtype == "float32":
            found.append((2 * edge**3 / _seconds(_numpy_product(edge)), "NumPy"))
        try:
            for as_convolution in (False, True) if dtype == "int8" else (False,):
                product = _openvino_product(dtype, edge, as_convolution=as_convolution)
                found.append((2 * edge**3 / _seconds(product), "OpenVINO"))
        except ImportError:
            note = "OpenVINO is not installed"
        except _OtherType as exc:
            note = str(exc)
    if not found:
        return Ceiling(kind=dtype, per_s=None, by="", note=note)
    per_s, by = max(found)
    return Ceiling(kind=dtype, per_s=per_s, by=by)


def _numpy_product(edge: int) -> Callable[[], Any]:
    left, right = np.ones((2, edge, edge), np.float32)
    out = np.empty_like(left)
    return lambda: np.matmul(left, right, out=out)


class _OtherType(Exception):
    """The processor computes in another type than asked."""


def _openvino_product(dtype: str, edge: int, *, as_convolution: bool = False) -> Callable[[], Any]:
    """A function that multiplies two matrices in `dtype`; `as_convolution`: the rows are the places of an image."""
    openvino: Any = importlib.import_module("openvino")
    ops: Any = importlib.import_module("openvino.opset13")
    left = ops.parameter([edge, edge], np.float32)
    weights = np.random.default_rng(0).standard_normal((edge, edge)).astype(np.float32) / edge**0.5
    if dtype == "int8":
        rounded = ops.constant(np.clip(np.rint(weights * 40 * edge**0.5), -127, 127).astype(np.int8))
        scale = ops.constant(np.full((1, edge), 1 / 40, np.float32))
        right = ops.multiply(ops.convert(rounded, "f32"), scale)
        data = ops.fake_quantize(left, *(np.float32(end) for end in (-4.0, 3.96875, -4.0, 3.96875)), 256)
    elif dtype in HINTS:
        data, right = left, ops.constant(weights)
    else:
        raise _OtherType(f"processors have no arithmetic in {dtype}")
    if as_convolution:
        places, channels_first = np.array([1, edge, 32, edge // 32]), np.array([1, 0])
        image = ops.reshape(ops.transpose(data, channels_first), places, False)
        kernel = ops.reshape(ops.transpose(right, channels_first), np.array([edge, edge, 1, 1]), False)
        product = ops.convolution(image, kernel, [1, 1], [0, 0], [0, 0], [1, 1])
    else:
        product = ops.matmul(data, right, False, False)
    model = openvino.Model([product], [left], "product")
    compiled = openvino.Core().compile_model(
        model, "CPU", {"INFERENCE_PRECISION_HINT": HINTS.get(dtype, "f32"), "PERFORMANCE_HINT": "LATENCY"}
    )
    executed = _executed_in(compiled)
    if dtype == "int8" and "8" not in executed or dtype in HINTS and executed != HINTS[dtype]:
        raise _OtherType(f"this processor multiplies {dtype} in {executed}")
    request = compiled.create_infer_request()
    request.set_input_tensor(openvino.Tensor(np.ones((edge, edge), np.float32)))
    return lambda: request.infer()


def _executed_in(compiled: Any) -> str:
    """The type in which OpenVINO's compiled product runs: f32, bf16, i8, ..."""
    for node in compiled.get_runtime_model().get_ordered_ops():
        facts = node.get_rt_info()
        layer = str(facts["layerType"].value if hasattr(facts["layerType"], "value") else facts["layerType"])
        if layer in ("MatMul", "FullyConnected", "Convolution"):
            precision = facts["runtimePrecision"]
            return str(precision.value if hasattr(precision, "value") else precision).lower()
    return "an unknown type"


def _copy() -> Ceiling:
    """All cores copy at once, each its part: one core does not fill the memory's lanes."""
    parts = max(1, len(os.sched_getaffinity(0)))
    sources = [np.ones(COPY_BYTES // parts, np.uint8) for _ in range(parts)]
    targets = [np.empty_like(source) for source in sources]
    with ThreadPoolExecutor(parts) as threads:
        seconds = _seconds(lambda: list(threads.map(np.copyto, targets, sources)))
    return Ceiling(kind="copy", per_s=2 * sum(source.nbytes for source in sources) / seconds, by="NumPy")


def _seconds(call: Callable[[], Any]) -> float:
    """Seconds of the fastest call, after one to warm up."""
    call()
    started, best, count = time.perf_counter(), float("inf"), 0
    while count < MIN_REPEATS or time.perf_counter() - started < MAX_SECONDS:
        begun = time.perf_counter()
        call()
        best, count = min(best, time.perf_counter() - begun), count + 1
    return best

"""What computes: ONNX graphs on ONNX Runtime, one session per content."""

from __future__ import annotations

import hashlib
from collections import OrderedDict

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import numpy_helper

from cudasim.plans import FLOATS

Arrays = dict[str, NDArray[np.generic]]

MAX_SESSIONS = 64
_SESSIONS: OrderedDict[str, onnxruntime.InferenceSession] = OrderedDict()


def session_of(graph: bytes) -> onnxruntime.InferenceSession:
    """The session of a graph, as `nitro_rt.onnxruntime_session` would open it, so that images compare bit for bit."""
    digest = hashlib.sha256(graph).hexdigest()
    if digest not in _SESSIONS:
        settings = onnxruntime.SessionOptions()
        settings.log_severity_level = 4  # what poison does to a graph is reported as a hazard
        settings.add_session_config_entry("session.intra_op.allow_spinning", "0")  # tiny graphs, and many other tests
        _SESSIONS[digest] = onnxruntime.InferenceSession(graph, settings, providers=["CPUExecutionProvider"])
        if len(_SESSIONS) > MAX_SESSIONS:
            _SESSIONS.popitem(last=False)
    _SESSIONS.move_to_end(digest)
    return _SESSIONS[digest]


def float_weights(graph: bytes) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    """Type and shape of every weight that can be refitted."""
    return {
        tensor.name: (np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)), tuple(tensor.dims))
        for tensor in onnx.load_from_string(graph).graph.initializer
        if tensor.data_type in FLOATS
    }


def with_weights(graph: bytes, weights: Arrays) -> bytes:
    """The graph with other values in its weights."""
    model = onnx.load_from_string(graph)
    for tensor in model.graph.initializer:
        if tensor.name in weights:
            tensor.CopyFrom(numpy_helper.from_array(weights[tensor.name].reshape(tuple(tensor.dims)), tensor.name))
    return model.SerializeToString(deterministic=True)

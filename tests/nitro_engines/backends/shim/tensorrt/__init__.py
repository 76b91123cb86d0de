"""TensorRT proper, as far as a machine without a GPU can play it: TensorRT-RTX's parser and compiler under the other name.

It compiles for sm89 where TensorRT would take the GPU of the machine, and its runtime, which would need one, answers the
engine inspector with what INSPECTION says.
"""

import os

import tensorrt_rtx
from tensorrt_rtx import *  # noqa: F403

__version__ = "11.4.0.106"


class Builder(tensorrt_rtx.Builder):
    def create_builder_config(self):
        config = super().create_builder_config()
        config.num_compute_capabilities = 1
        config.set_compute_capability(tensorrt_rtx.ComputeCapability.SM89, 0)
        return config


class Runtime:
    def __init__(self, logger):
        pass

    def deserialize_cuda_engine(self, plan):
        return _Engine()


class _Engine:
    def create_engine_inspector(self):
        return _Inspector()


class _Inspector:
    def get_engine_information(self, kind):
        assert kind == tensorrt_rtx.LayerInformationFormat.JSON
        return os.environ.get("INSPECTION", '{"Layers": []}')

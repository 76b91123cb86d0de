"""A stage on OpenVINO's CPU plugin, with inputs and outputs in shared NumPy memory."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import openvino

from nitro_rt.errors import EngineMismatch
from nitro_rt.manifest import Engine, TensorSpec
from nitro_rt.openvino_cache import ModelCache
from nitro_rt.openvino_model import DEVICE, one_line, read_model
from nitro_rt.session import Array, check_buffers, check_specs

DTYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16", "i64": "int64", "u8": "uint8"}


class OpenVinoSession:
    """One OpenVINO model, compiled when it is opened. Engine options are compile properties, passed on as they are."""

    def __init__(self, stage: str, engine: Engine, paths: tuple[Path, ...], cache: ModelCache | None = None) -> None:
        """With `cache`, what was compiled before is loaded, and what is compiled now is kept.

        Raises: EngineMismatch if this OpenVINO cannot load the model; ShapeError if it is another model.
        """
        self._stage, self._engine = stage, engine
        try:
            core = openvino.Core()
            compile_with = partial(_compile, core, engine, paths)
            compiled = cache.get(core, stage, engine, paths, compile_with) if cache else compile_with(engine.options)
            hint = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        except RuntimeError as exc:
            raise EngineMismatch(
                f"OpenVINO {openvino.__version__} cannot load {stage} from {paths[0]}: {one_line(exc)}; build it again here"
            ) from exc
        self.compute_dtype = DTYPES.get(hint, hint)
        check_specs(stage, _specs(compiled), (*engine.inputs, *engine.outputs))
        self._compiled: openvino.CompiledModel | None = compiled
        self._request: openvino.InferRequest | None = compiled.create_infer_request()
        self._buffers: Mapping[str, Array] = {}

    def bind(self, buffers: Mapping[str, Array]) -> None:
        assert self._request is not None, "bind after close"
        check_buffers(self._stage, buffers, self._engine)
        self._buffers = dict(buffers)  # the request reads and writes their memory, and does not keep it alive itself
        for spec in (*self._engine.inputs, *self._engine.outputs):
            self._request.set_tensor(spec.name, openvino.Tensor(buffers[spec.name], shared_memory=True))

    def execute(self) -> None:
        assert self._request is not None
        self._request.start_async()
        self._request.wait()

    def close(self) -> None:
        self._request, self._compiled, self._buffers = None, None, {}


def _compile(
    core: openvino.Core, engine: Engine, paths: tuple[Path, ...], properties: Mapping[str, str]
) -> openvino.CompiledModel:
    model = read_model(core, paths, widen=engine.options.get("INFERENCE_PRECISION_HINT") == "f32")
    return core.compile_model(model, DEVICE, dict(properties))


def _specs(compiled: openvino.CompiledModel) -> list[TensorSpec]:
    return [
        TensorSpec(
            name=port.get_any_name(),
            dtype=DTYPES.get(port.get_element_type().get_type_name(), port.get_element_type().get_type_name()),
            shape=tuple(port.get_shape()),
        )
        for port in (*compiled.inputs, *compiled.outputs)
    ]

"""The state of a run in one safetensors file, replaced by one rename: killed at any moment, the last one is whole."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from nitro_rt.errors import TrainingError

_SCHEMA_VERSION = "1"


@dataclass(frozen=True, kw_only=True)
class RunState:
    """The objects that a run changes; `save` and `load` move their tensors to and from a file."""

    modules: Mapping[str, nn.Module]
    optimizers: Mapping[str, Optimizer]

    def tensors(self) -> dict[str, Tensor]:
        found = {f"module/{name}/{key}": value for name, m in self.modules.items() for key, value in m.state_dict().items()}
        for name, optimizer in self.optimizers.items():
            for index, state in optimizer.state_dict()["state"].items():
                found |= {f"optimizer/{name}/{index}/{key}": value for key, value in state.items()}
        return {key: value.detach().contiguous().clone() for key, value in found.items()}


def save(path: Path, state: RunState, *, step: int, digest: str, upstream: str = "") -> None:
    """Write the state; `digest` says which options it belongs to, `upstream` what the earlier stages had become.

    Raises: TrainingError if it cannot be written (a full disk, say); the previous file is then untouched.
    """
    metadata = {"schema_version": _SCHEMA_VERSION, "step": str(step), "digest": digest, "upstream": upstream}
    write_tensors(path, state.tensors(), metadata)


def load(path: Path, state: RunState, *, digest: str) -> int:
    """Load a state that `save` wrote; returns the number of steps done.

    Raises: TrainingError if the file is damaged or was written with other options.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("schema_version") != _SCHEMA_VERSION or metadata.get("digest") != digest:
                raise TrainingError(
                    f"{path} was written with other options ({metadata.get('digest')}, now {digest}): "
                    "resume with the recipe it was started with, or start in another --out folder"
                )
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
    except SafetensorError as exc:
        raise TrainingError(f"{path} is damaged: {exc}; remove it to start this stage again") from exc
    _restore_modules(state.modules, tensors)
    _restore_optimizers(state.optimizers, tensors)
    return int(metadata["step"])


def _restore_modules(modules: Mapping[str, nn.Module], tensors: Mapping[str, Tensor]) -> None:
    for name, module in modules.items():
        prefix = f"module/{name}/"
        module.load_state_dict({key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)})


def _restore_optimizers(optimizers: Mapping[str, Optimizer], tensors: Mapping[str, Tensor]) -> None:
    for name, optimizer in optimizers.items():
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        found: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith(f"optimizer/{name}/"):
                index, field = key.removeprefix(f"optimizer/{name}/").split("/")
                found.setdefault(int(index), {})[field] = _laid_out_like(parameters[int(index)], value)
        optimizer.load_state_dict({"state": found, "param_groups": optimizer.state_dict()["param_groups"]})


def _laid_out_like(parameter: Tensor, value: Tensor) -> Tensor:
    """`value` in the parameter's memory layout: fused optimisers pair moments and weights by their place in memory, and
    the moments of channels-last weights are stored contiguous."""
    return torch.empty_like(parameter).copy_(value) if value.shape == parameter.shape else value


def read_metadata(path: Path) -> dict[str, str]:
    """What is written beside the tensors; empty where there is no file.

    Raises: TrainingError if the file is damaged.
    """
    if not path.is_file():
        return {}
    try:
        with safe_open(str(path), framework="pt") as file:
            return file.metadata() or {}
    except SafetensorError as exc:
        raise TrainingError(f"{path} is damaged: {exc}; remove it to make it again") from exc


def steps_done(path: Path) -> int:
    """The steps done by the stage whose state this is; 0 where there is none."""
    return int(read_metadata(path).get("step", 0))


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file by one rename.

    Raises: TrainingError if it cannot be written (a full disk, say); the previous file is then untouched.
    """
    temporary = path.with_suffix(".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({key: value.contiguous() for key, value in tensors.items()}, str(temporary), metadata=metadata)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as exc:
        temporary.unlink(missing_ok=True)
        raise TrainingError(f"cannot write {path}: {exc}; what was there before is kept") from exc


def digest_of(options: object) -> str:
    """A short digest of JSON-able options, to tell whether a state belongs to them."""
    import hashlib

    return hashlib.sha256(json.dumps(options, sort_keys=True, default=str).encode()).hexdigest()[:16]

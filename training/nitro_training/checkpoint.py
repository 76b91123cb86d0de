"""The state of a run in one safetensors file, replaced by one rename: killed at any moment, the last one is whole."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from nitro_rt.errors import TrainingError
from nitro_training.sharding import laid_out_like, whole

_SCHEMA_VERSION = "2"


@dataclass(frozen=True, kw_only=True)
class RunState:
    """The objects that a run changes; `save` and `load` move their tensors to and from a file."""

    modules: Mapping[str, nn.Module]
    optimizers: Mapping[str, Optimizer]
    holders: Mapping[str, TensorHolder] = field(default_factory=dict)
    """Whatever else has tensors of its own to keep."""

    def tensors(self, *, keep: bool = True) -> dict[str, Tensor]:
        """Copies on the host, whole where they are spread over processes: those must then all call this together.

        Args:
            keep: False gives nothing, on a process that only hands over its shards.
        """
        found = {f"module/{name}/{key}": value for name, m in self.modules.items() for key, value in m.state_dict().items()}
        for name, optimizer in self.optimizers.items():
            for index, state in optimizer.state_dict()["state"].items():
                found |= {f"optimizer/{name}/{index}/{key}": value for key, value in state.items()}
        for name, holder in self.holders.items():
            found |= {f"tensors/{name}/{key}": value for key, value in holder.tensors().items()}
        gathered = ((key, whole(value.detach())) for key, value in found.items())
        return {key: _host_copy(value) for key, value in gathered if keep}


def _host_copy(tensor: Tensor) -> Tensor:
    return tensor.to("cpu", copy=True, memory_format=torch.contiguous_format)


class TensorHolder(Protocol):
    """Something that gives its tensors and takes them back."""

    def tensors(self) -> dict[str, Tensor]: ...

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None: ...


def save(path: Path, tensors: Mapping[str, Tensor], *, step: int, options: dict[str, Any], upstream: str = "") -> None:
    """Write a state; `options` says what it was trained with, `upstream` what the earlier stages had become.

    Raises: TrainingError if it cannot be written (a full disk, say); the previous file is then untouched.
    """
    written = json.dumps(options, sort_keys=True, default=str)
    metadata = {"schema_version": _SCHEMA_VERSION, "step": str(step), "options": written, "upstream": upstream}
    write_tensors(path, tensors, metadata)


def load(path: Path, state: RunState, *, options: dict[str, Any], allow_changed: bool = False) -> int:
    """Load a state that `save` wrote; returns the number of steps done.

    Raises: TrainingError if the file is damaged, does not fit the model, or was written with other options (unless
        `allow_changed`).
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("schema_version") != _SCHEMA_VERSION:
                raise TrainingError(
                    f"{path} has state version {metadata.get('schema_version')}, this nitro-rt reads {_SCHEMA_VERSION}: "
                    "start in another --out folder"
                )
            if not allow_changed:
                _require_same_options(path, json.loads(metadata["options"]), options)
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
    except SafetensorError as exc:
        raise TrainingError(f"{path} is damaged: {exc}; remove it to start this stage again") from exc
    try:
        _restore_modules(state.modules, tensors)
        _restore_optimizers(state.optimizers, tensors)
        for name, holder in state.holders.items():
            prefix = f"tensors/{name}/"
            holder.load_tensors({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
    except (RuntimeError, IndexError, ValueError) as exc:
        reason = str(exc).splitlines()[-1].strip()
        raise TrainingError(f"{path} does not fit the model of this recipe ({reason}); start in another --out folder") from exc
    return int(metadata["step"])


def _require_same_options(path: Path, was: dict[str, Any], now: dict[str, Any]) -> None:
    now = json.loads(json.dumps(now, default=str))
    changed = _differences(was, now)
    if changed:
        raise TrainingError(
            f"{path.name} was trained with other options: {'; '.join(changed)}. Resume with the recipe it was started "
            "with, add --allow-changed to go on with the new options, or start in another --out folder"
        )


def _differences(was: Any, now: Any, where: str = "") -> list[str]:
    if isinstance(was, dict) and isinstance(now, dict):
        keys = sorted(was.keys() | now.keys())
        return [line for key in keys for line in _differences(was.get(key), now.get(key), f"{where}.{key}".lstrip("."))]
    return [] if was == now else [f"{where} was {json.dumps(was)}, now {json.dumps(now)}"]


def require_space(path: Path, state: RunState) -> None:
    """Check before the first step that a state fits on the disk beside the one it will replace.

    A holder that is a module (the pool) keeps two moments of each of its own parameters, at most.

    Raises: TrainingError naming the folder, the need and what is free.
    """
    weights = sum(t.numel() * t.element_size() for module in state.modules.values() for t in module.state_dict().values())
    trained = [p for optimizer in state.optimizers.values() for group in optimizer.param_groups for p in group["params"]]
    trained += [p for holder in state.holders.values() if isinstance(holder, nn.Module) for p in holder.parameters()]
    moments = sum(2 * p.numel() * p.element_size() for p in trained)
    need = (weights + moments) * (1 if path.is_file() else 2)
    free = shutil.disk_usage(path.parent).free
    if free < need:
        raise TrainingError(
            f"{path.parent} has {free / 2**30:.1f} GiB free, the states of {path.stem!r} need {need / 2**30:.1f} GiB; "
            "make room, or choose another --out"
        )


def _restore_modules(modules: Mapping[str, nn.Module], tensors: Mapping[str, Tensor]) -> None:
    for name, module in modules.items():
        prefix = f"module/{name}/"
        stored = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        sharded = {key: value for key, value in module.state_dict().items() if isinstance(value, DTensor) and key in stored}
        module.load_state_dict(stored | {key: laid_out_like(value, stored[key]) for key, value in sharded.items()})


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
    return laid_out_like(parameter, value) if value.shape == parameter.shape else value


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
    temporary = _temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({key: value.contiguous() for key, value in tensors.items()}, str(temporary), metadata=metadata)
        _flush(temporary)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as exc:
        temporary.unlink(missing_ok=True)
        raise TrainingError(f"cannot write {path}: {exc}; what was there before is kept") from exc


def remove_leftover(path: Path) -> None:
    """Remove what a killed process had written of `path`'s successor: it would take the room of the next one."""
    _temporary(path).unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    return path.with_suffix(".partial")


def _flush(path: Path) -> None:
    """To the disk itself, so that the rename cannot outrun the content if the machine loses power."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def digest_of(options: object) -> str:
    """A short digest of JSON-able options, to tell whether a state belongs to them."""
    import hashlib

    return hashlib.sha256(json.dumps(options, sort_keys=True, default=str).encode()).hexdigest()[:16]

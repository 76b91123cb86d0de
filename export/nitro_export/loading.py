"""A checkpoint's networks as torch modules, every weight accounted for.

A module is made empty (on torch's meta device) from its config, compared with the headers of its weight files, and then
given as many values as its user needs: none to trace it, all to run it. Their type is Any: diffusers and transformers are
typed in part only.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import diffusers
import torch
import transformers
from torch import Tensor, nn

from nitro_export.checkpoint import Checkpoint, weight_files
from nitro_export.stored import StoredTensor, stored_tensors
from nitro_export.subpixel import fold_doublings
from nitro_rt.errors import ExportError

SHOWN = 10
"""Names in a message about many tensors."""
TEXT_PREFIX = "text_model."
"""transformers 5 dropped it from CLIPTextModel's names; older files have it."""


def empty_part(checkpoint: Checkpoint, part: str) -> tuple[Any, dict[str, StoredTensor]]:
    """The module of `part` without values, and where the value of each of its parameters is stored.

    Raises: ExportError for a config that the library refuses, a damaged file, or weights of another architecture.
    """
    folder = checkpoint.folder / part
    try:
        with _quiet(), torch.device("meta"):
            module = _MAKERS[part](checkpoint, part)
    except Exception as exc:  # each library raises its own kinds for a config that makes no sense to it
        raise ExportError(f"{folder / 'config.json'} describes no network: {exc}; fetch the checkpoint again") from exc
    stored = _by_parameter(module, stored_tensors(weight_files(checkpoint, part)))
    _check_weights(checkpoint, part, module.state_dict(), stored)
    _restore_position_ids(module)
    return module.eval().requires_grad_(False), {name: stored[name] for name in module.state_dict()}


def empty_part_of_graph(checkpoint: Checkpoint, part: str) -> tuple[Any, dict[str, StoredTensor]]:
    """As `empty_part`, in the form that graphs have: the doublings of a VAE's decoder are folded. Raises: as `empty_part`."""
    module, stored = empty_part(checkpoint, part)
    return module, fold_doublings(module, stored) if part == "vae" else stored


def load_part(checkpoint: Checkpoint, part: str, dtype: torch.dtype | None = torch.float32) -> Any:
    """The module of `part` with its weights in `dtype`; None: as stored, over the files' own pages.

    Raises: as `empty_part`.
    """
    module, stored = empty_part(checkpoint, part)
    fill(module, stored, dtype)
    return module


def fill(module: nn.Module, stored: Mapping[str, StoredTensor], dtype: torch.dtype | None, prefix: str = "") -> None:
    """Give the parameters whose names begin with `prefix` their values."""
    values = {
        name: tensor.mapped() if dtype is None else tensor.read().to(dtype)
        for name, tensor in stored.items()
        if name.startswith(prefix)
    }
    module.load_state_dict(values, assign=True, strict=not prefix)
    module.requires_grad_(False)


def widen(module: nn.Module) -> None:
    """From now on `module` computes in float32: each layer's stored weights are widened while it runs, and only then.

    A UNet stored in float16 so needs 5 GB of the files' own pages instead of 10 GB of memory.
    """
    for layer in module.modules():
        kept = {name: value for name, value in layer.named_parameters(recurse=False) if value.dtype != torch.float32}
        if not kept:
            continue

        def narrow_again(layer: nn.Module, *_: Any, kept: dict[str, nn.Parameter] = kept) -> None:
            for name, value in kept.items():
                layer._parameters[name] = value

        def widened(layer: nn.Module, _: Any, kept: dict[str, nn.Parameter] = kept) -> None:
            for name, value in kept.items():
                layer._parameters[name] = nn.Parameter(value.float(), requires_grad=False)

        layer.register_forward_pre_hook(widened)
        layer.register_forward_hook(narrow_again)


def _text_model(kind: str) -> Callable[[Checkpoint, str], Any]:
    def make(checkpoint: Checkpoint, part: str) -> Any:
        config = transformers.CLIPTextConfig.from_pretrained(checkpoint.folder / part, local_files_only=True)
        # Eager attention: the causal mask is then a constant that is added, which every runtime reads.
        return getattr(transformers, kind)._from_config(config, attn_implementation="eager")

    return make


def _from_config(config: dict[str, Any], kind: str) -> Any:
    return getattr(diffusers, kind).from_config(config)


_MAKERS: dict[str, Callable[[Checkpoint, str], Any]] = {
    "text_encoder": _text_model("CLIPTextModel"),
    "text_encoder_2": _text_model("CLIPTextModelWithProjection"),
    "unet": lambda checkpoint, part: _from_config(checkpoint.unet, "UNet2DConditionModel"),
    "vae": lambda checkpoint, part: _from_config(checkpoint.vae, checkpoint.vae.get("_class_name", "AutoencoderKL")),
}


def _by_parameter(module: Any, stored: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Under the module's own names, where files of older libraries have others."""
    names = {name: name for name in stored if not name.endswith("position_ids")}  # a counter, once saved with the weights
    if isinstance(module, transformers.CLIPTextModel):
        names = {name.removeprefix(TEXT_PREFIX): key for name, key in names.items()}
    elif isinstance(module, diffusers.ModelMixin):
        module._fix_state_dict_keys_on_load(names)  # it only renames
    return {name: stored[key] for name, key in names.items()}


def _check_weights(checkpoint: Checkpoint, part: str, wanted: Mapping[str, Tensor], stored: Mapping[str, StoredTensor]) -> None:
    """Raises: ExportError with the first ten names that are missing, of another shape, or unknown to the config."""
    folder = checkpoint.folder / part
    together = "weights and config.json do not belong together"
    if missing := [name for name in wanted if name not in stored]:
        raise ExportError(f"{folder} lacks {len(missing)} of {len(wanted)} tensors: {_listed(missing)}; {together}")
    shapes = [
        f"{name} {list(stored[name].shape)} instead of {list(value.shape)}"
        for name, value in wanted.items()
        if stored[name].shape != tuple(value.shape)
    ]
    if shapes:
        raise ExportError(
            f"{folder}: {len(shapes)} tensors have other shapes than config.json says: {_listed(shapes)}; {together}"
        )
    if unknown := [name for name in stored if name not in wanted]:
        raise ExportError(f"{folder} has {len(unknown)} tensors that config.json does not know: {_listed(unknown)}; {together}")
    if kinds := sorted({tensor.dtype for tensor in stored.values()} - {"float32", "float16", "bfloat16", "float64"}):
        raise ExportError(f"{folder} holds weights as {', '.join(kinds)}; floating-point weights are needed")


def _listed(names: list[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def _restore_position_ids(module: nn.Module) -> None:
    """CLIP's counters are no parameters; made on the meta device they have no values."""
    for layer in module.modules():
        for name, buffer in layer.named_buffers(recurse=False):
            assert name == "position_ids" and buffer.is_meta, name
            layer._buffers[name] = torch.arange(buffer.shape[-1]).expand(buffer.shape)


@contextmanager
def _quiet() -> Iterator[None]:
    """What the libraries log about configs comes as an error from us."""
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)

"""From what --model says to a checkpoint folder on this machine. No network is used."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

import nitro_rt
from nitro_engines.cache import default_cache_root
from nitro_rt.errors import ModelNotFound

DEFAULT_MODEL = "nitro-emoji"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """A checkpoint on this machine."""

    name: str
    checkpoint: Path
    origin: str
    """What --model was, without paths of this machine."""
    licence: str | None = None
    """None: the checkpoint's run.json says it."""
    shift: int | None = None
    """None: the checkpoint's run.json says it."""


@dataclass(frozen=True, kw_only=True)
class _Preset:
    shift: int
    licence: str
    unet: str


_PRESETS = {
    "nitrosd-realism": _Preset(shift=250, licence="CC-BY-NC-SA-4.0", unet="nitrosd-realism_unet.safetensors"),
    "nitrosd-vibrant": _Preset(shift=500, licence="openrail++", unet="nitrosd-vibrant_unet.safetensors"),
}


def resolve_model(model: str) -> ModelSource:
    """The checkpoint that `model` means.

    Args:
        model: `nitro-emoji` (shipped), `nitrosd-realism` or `nitrosd-vibrant`, a checkpoint folder, or a hub id
            (`owner/name`) that the hub's own cache holds. A name wins over a folder of that name: write `./name`.
    Returns: the folder as it is; `nitro_export.read_checkpoint` checks what it holds.
    Raises: ModelNotFound saying where it was looked for and how it gets there.
    """
    if model == DEFAULT_MODEL:
        return _shipped(model)
    if model in _PRESETS:
        return _preset(model)
    path = Path(model).expanduser()
    if model and path.is_dir():  # an empty name would mean the working directory
        resolved = path.resolve()
        return ModelSource(name=_name_of(resolved), checkpoint=resolved, origin=resolved.name)
    if path.is_file():
        raise ModelNotFound(
            f"--model {model} is a file; a checkpoint is a folder in the diffusers layout. Convert it once: "
            "StableDiffusionXLPipeline.from_single_file(FILE).save_pretrained(FOLDER)"
        )
    if _HUB_ID.fullmatch(model):
        return _from_hub_cache(model)
    known = ", ".join((DEFAULT_MODEL, *_PRESETS))
    raise ModelNotFound(
        f"no model {model!r}: it is no folder here and no known name; known: {known}, a folder, a hub id OWNER/NAME"
    )


def _name_of(folder: Path) -> str:
    """A folder's name as a part of file names: `my model!` -> `my-model`."""
    return re.sub(r"[^\w.]+", "-", folder.name).strip("-.") or "model"


def _shipped(model: str) -> ModelSource:
    folder = Path(nitro_rt.__file__).parent / "models" / model
    if not folder.is_dir():
        raise ModelNotFound(
            f"the model {model!r} is not part of this installation ({folder} is missing); "
            "train it with `make emoji-model`, reinstall nitro-rt, or say --model FOLDER"
        )
    return ModelSource(name=model, checkpoint=folder, origin=model)


def _preset(model: str) -> ModelSource:
    preset = _PRESETS[model]
    folder = default_cache_root() / "models" / model
    if not folder.is_dir():
        raise ModelNotFound(
            f"--model {model}: its checkpoint is not on this machine, and nitro-rt downloads nothing. Put a diffusers SDXL "
            f"folder at {folder}: stabilityai/stable-diffusion-xl-base-1.0 with the VAE of madebyollin/sdxl-vae-fp16-fix, and "
            f"{preset.unet} of ChenDY/NitroFusion as unet/diffusion_pytorch_model.safetensors; or say --model FOLDER"
        )
    return ModelSource(name=model, checkpoint=folder, origin=model, licence=preset.licence, shift=preset.shift)


def _from_hub_cache(model: str) -> ModelSource:
    home = Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser()
    hub = Path(os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser()
    stored = hub / ("models--" + model.replace("/", "--"))
    reference = stored / "refs" / "main"
    revision = reference.read_text(encoding="utf-8").strip() if reference.is_file() else ""
    folder = stored / "snapshots" / revision
    if not revision or not folder.is_dir():
        raise ModelNotFound(
            f"--model {model}: neither a folder here nor in the hub cache {hub}, and nitro-rt downloads nothing; "
            f"fetch it with `hf download {model}`, or name a folder: --model FOLDER"
        )
    return ModelSource(name=model.rpartition("/")[2], checkpoint=folder, origin=model)

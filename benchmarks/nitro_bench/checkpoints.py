"""Where the checkpoint is that a bundle was built from: peers draw with the same."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from nitro_rt.bundle import Bundle
from nitro_rt.errors import ConfigError, ModelNotFound

SHIPPED = ("nitro-emoji",)
"""Models that come with the package."""


def checkpoint_of(bundle: Bundle, given: Path | None) -> Path:
    """The diffusers folder of the bundle's checkpoint.

    Args:
        given: what --checkpoint said; None finds a shipped model.
    Raises: ConfigError if it is neither given nor shipped; ModelNotFound if the folder is none. That it is the same checkpoint
        is checked by the pictures.
    """
    name = bundle.manifest.source.name
    if given is not None:
        folder = given
    elif name in SHIPPED:
        folder = Path(str(resources.files("nitro_rt"))) / "models" / name
    else:
        raise ConfigError(f"peers draw with the checkpoint that {bundle.folder.name} was built from; name it: --checkpoint DIR")
    if not (folder / "model_index.json").is_file():
        raise ModelNotFound(f"{folder} holds no model_index.json; name the checkpoint's diffusers folder: --checkpoint DIR")
    return folder


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())

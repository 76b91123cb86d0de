"""PNG files that say how they were drawn: prompt, seed, steps and bundle digest in text chunks."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from nitro_rt.errors import ConfigError

if TYPE_CHECKING:
    from PIL import Image


def save_png(path: str | os.PathLike[str], image: Image.Image, text: Mapping[str, str]) -> Path:
    """Write `image` with `text` in its text chunks; an existing file is replaced whole or not at all.

    Raises: ConfigError if the name does not end in .png or the place cannot be written.
    """
    from PIL.PngImagePlugin import PngInfo

    target = Path(path)
    if target.suffix.lower() != ".png":
        raise ConfigError(f"{target} does not end in .png; images are written as PNG")
    info = PngInfo()
    for key, value in text.items():
        info.add_text(key, value)  # tEXt; iTXt where Latin-1 cannot hold it
    hidden = target.with_name(f".{target.name}.{os.urandom(4).hex()}")
    try:
        image.save(hidden, format="PNG", pnginfo=info)
        os.replace(hidden, target)
    except OSError as exc:
        raise ConfigError(f"{target} cannot be written: {exc.strerror or exc}; choose another place with -o") from exc
    finally:
        hidden.unlink(missing_ok=True)
    return target


def read_png_text(path: str | os.PathLike[str]) -> dict[str, str]:
    """The text chunks of a PNG."""
    from PIL import Image

    with Image.open(path) as image:
        image.load()
        return {key: str(value) for key, value in getattr(image, "text", {}).items()}

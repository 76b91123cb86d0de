"""What a call gives: the images, and all that is needed to draw them again."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True, kw_only=True, eq=False)
class Result:
    """The images of one call, and all that is needed to draw them again."""

    array_BHWC: NDArray[np.uint8]
    """One RGB image per prompt, in order. It is the caller's, and no later call touches it; where several requests shared a
    call, each has a part of one array, so a part that is kept keeps the whole (`.copy()` it to avoid that)."""
    prompts: tuple[str, ...]
    seed: int | tuple[int, ...]
    """One seed for the whole call, or one per prompt; drawn afresh where none was given."""
    steps: int
    size_px: int
    bundle_digest: str
    timings_ms: dict[str, float]
    """tokenize, noise, queue (waiting for a place and for its turn), the executor's stages, and total, from the call to the
    images; load where a denoiser was loaded in this call. Stages and load are those of the whole shared call."""
    num_images_in_call: int
    """Images that the executor drew in this call, those of other requests counted: its time is shared by so many."""
    warnings: tuple[str, ...]
    """What was cut from prompts, and how this machine differs from the building one."""
    _images: list[Image.Image] = field(default_factory=list, init=False, repr=False)

    @property
    def images(self) -> list[Image.Image]:
        """One RGB image per prompt, in order, made from `array_BHWC` when first asked for: Pillow keeps four bytes per pixel,
        so it has to copy, and who encodes the array has no need of it."""
        if not self._images:
            from PIL import Image

            self._images[:] = [Image.fromarray(image_HWC) for image_HWC in self.array_BHWC]
        return self._images

    def save(self, path: str | os.PathLike[str], index: int = 0) -> Path:
        """Write image `index` as a PNG that carries prompt, seed, steps and bundle digest. Replaces `path` whole."""
        from nitro_rt.png import save_png

        return save_png(path, self.images[index], self.png_text(index))

    def png_text(self, index: int) -> dict[str, str]:
        """The text chunks of image `index`."""
        seed = self.seed if isinstance(self.seed, int) else self.seed[index]
        text = {"prompt": self.prompts[index], "seed": str(seed), "steps": str(self.steps), "bundle": self.bundle_digest}
        if isinstance(self.seed, int) and len(self.prompts) > 1:
            # One generator drew for all images, so the place in the batch is part of the recipe.
            text["image"] = f"{index + 1} of {len(self.prompts)}"
        return text

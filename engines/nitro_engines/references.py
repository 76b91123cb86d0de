"""The float32 parent's pictures of a checkpoint, which its bundles are compared with: drawn once, kept in the cache.

At full size a picture takes minutes on a CPU, so each is kept as soon as it is drawn: a build that is cut short goes on
where it stopped, and all precisions, backends and batch sizes of one checkpoint share them.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import nitro_rt.noise
from nitro_engines.cache import EngineCache
from nitro_engines.files import Report, foreign_errors, silent, source_sha256
from nitro_engines.keys import Fields, key_of
from nitro_engines.request import MAX_GATE_PROMPTS
from nitro_rt.errors import BundleError
from nitro_rt.manifest import FileRef, GraphsManifest, Reference, check_file
from nitro_rt.quality import require_sound
from nitro_rt.schedule import StepSchedule

if TYPE_CHECKING:
    from nitro_export.parent import Parent

FIRST_SEED = 20_000
"""Away from the seeds of calibration and of smoke tests: what a gate draws must be new to what it judges."""
PROMPTS = (
    "a red apple",
    "a blue car on a street",
    "a portrait photo of an old man",
    "a green tree on a hill",
    "a yellow star",
    "an orange cat with a hat",
    "a white house by the sea",
    "a purple heart",
    "a bowl of fruit on a table",
    "a black dog in the snow",
    "a city at night",
    "a pink flower",
    "a brown bear",
    "a bird in a blue sky",
    "a glass of water",
    "a stack of old books",
)
"""What a picture may show in either domain: things with colours for nitro-emoji, scenes for SDXL."""


def references_of(
    checkpoint: Callable[[], Path], graphs: GraphsManifest, num_prompts: int, cache: EngineCache, report: Report = silent
) -> tuple[Reference, ...]:
    """The parent's pictures of the first `num_prompts` prompts at every step count of `graphs`.

    Args:
        checkpoint: gives the folder that `graphs` were exported from; called if a picture must be drawn.
        num_prompts: at most `MAX_GATE_PROMPTS`.
    Raises: BundleError for pictures that would judge nothing (NaN, uniform, saturated); ExportError, BuildError if the
        checkpoint cannot be loaded or the cache not be written.
    """
    assert 1 <= num_prompts <= len(PROMPTS) == MAX_GATE_PROMPTS
    painter = _Painter(checkpoint, graphs, cache, report)
    return tuple(
        painter.reference(prompt, FIRST_SEED + index, num_steps)
        for num_steps in sorted(graphs.denoise)
        for index, prompt in enumerate(PROMPTS[:num_prompts])
    )


class _Painter:
    """Takes pictures from the cache, or loads the parent and draws them."""

    def __init__(self, checkpoint: Callable[[], Path], graphs: GraphsManifest, cache: EngineCache, report: Report) -> None:
        self._checkpoint, self._graphs, self._cache, self._report = checkpoint, graphs, cache, report
        self._parent: Parent | None = None
        self._shared = {
            "checkpoint_sha256": graphs.source.checkpoint_sha256,
            "size_px": graphs.size_px,
            "code": _code_sha256(),
        }

    def reference(self, prompt: str, seed: int, num_steps: int) -> Reference:
        schedule = self._graphs.schedule.steps[num_steps]
        fields = {**self._shared, "prompt": prompt, "seed": seed, "schedule": dataclasses.asdict(schedule)}
        key = key_of(fields)
        with self._cache.making(key, "a reference picture", self._report) as work:
            file = self._cached(key)
            if file is None:
                file = self._drawn(prompt, seed, schedule, work)
                self._cache.store_record("references", key, {"fields": fields, "file": dataclasses.asdict(file)}, work)
        return Reference(prompt=prompt, seed=seed, steps=num_steps, file=file)

    def _cached(self, key: str) -> FileRef | None:
        record = self._cache.find_record("references", key)
        if record is None:
            return None
        try:
            if key_of(record["fields"]) != key:
                raise BundleError("its record is of another key")
            file = FileRef(**record["file"])
            check_file(self._cache.engines, file)
        except (BundleError, OSError, KeyError, TypeError, AttributeError) as exc:
            self._report(f"the cached reference picture {key[:12]} is damaged and is drawn again: {exc}")
            return None
        return file

    def _drawn(self, prompt: str, seed: int, schedule: StepSchedule, work: Path) -> FileRef:
        from PIL import Image

        started, num_steps = time.perf_counter(), len(schedule.timesteps)
        with foreign_errors("drawing a reference picture", work):
            drawing = self._loaded().draw([prompt], [seed], schedule)
        assert drawing.images_BHWC is not None
        what = f"the float32 parent of {self._graphs.source.name}, {prompt!r} in {num_steps} steps"
        if not np.isfinite(drawing.x0_BChw.numpy()).all():  # uint8 would hide it
            raise BundleError(
                f"{what}: its latents hold NaN or infinity, so nothing can be judged by it; repair the checkpoint"
            )
        images_NHW3 = drawing.images_BHWC.numpy()
        require_sound(images_NHW3, what)
        path = work / "reference.png"
        Image.fromarray(images_NHW3[0]).save(path, format="PNG")
        steps = f"{num_steps} step{'s' * (num_steps > 1)}"
        self._report(f"reference: {prompt!r} in {steps}, drawn in float32 in {time.perf_counter() - started:.1f} s")
        return self._cache.adopt(path)

    def _loaded(self) -> Parent:
        if self._parent is None:
            from nitro_export import read_checkpoint
            from nitro_export.parent import Parent

            self._parent = Parent(read_checkpoint(self._checkpoint()), size_px=self._graphs.size_px)
        return self._parent


def _code_sha256() -> dict[str, Any]:
    """Of what draws: the parent, the parts it is made of, the noise, and the libraries that compute them."""
    from importlib.metadata import version

    import nitro_export

    folder = Path(nitro_export.__file__).parent
    modules = ("checkpoint", "loading", "parent", "stages", "stored")
    fields: Fields = {name: source_sha256(folder / f"{name}.py") for name in modules}
    fields |= {"noise": source_sha256(Path(nitro_rt.noise.__file__))}
    return fields | {name: version(name) for name in ("torch", "diffusers", "transformers")}

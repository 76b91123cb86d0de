"""The public entry: load a bundle, draw, close."""

from __future__ import annotations

import os
import threading
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

from nitro_rt.bundle import Bundle, open_bundle
from nitro_rt.errors import ConfigError, EngineMismatch, NitroError
from nitro_rt.executor import Executor, open_executor
from nitro_rt.noise import checked_seed, draw_noise
from nitro_rt.tokenizer import PromptTruncated, Tokenizer, truncation_message

if TYPE_CHECKING:
    from PIL import Image


class ComputeTypeDiffers(UserWarning):
    """The backend computes in another type on this machine than on the one that built the bundle."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """The images of one call, and all that is needed to draw them again."""

    images: list[Image.Image]
    """One RGB image per prompt, in order."""
    prompts: tuple[str, ...]
    seed: int | tuple[int, ...]
    """One seed for the whole call, or one per prompt; drawn afresh where none was given."""
    steps: int
    size_px: int
    bundle_digest: str
    timings_ms: dict[str, float]
    """tokenize, noise, text, denoise, decode, images and total; load where a denoiser was loaded in this call."""
    warnings: tuple[str, ...]
    """What was cut from prompts, and how this machine differs from the building one."""

    def save(self, path: str | os.PathLike[str], index: int = 0) -> Path:
        """Write image `index` as a PNG that carries prompt, seed, steps and bundle digest. Replaces `path` whole."""
        from nitro_rt.png import save_png

        return save_png(path, self.images[index], self.png_text(index))

    def png_text(self, index: int) -> dict[str, str]:
        """The text chunks of image `index`."""
        seed = self.seed if isinstance(self.seed, int) else self.seed[index]
        text = {"prompt": self.prompts[index], "seed": str(seed), "steps": str(self.steps), "bundle": self.bundle_digest}
        if isinstance(self.seed, int) and len(self.images) > 1:
            # One generator drew for all images, so the place in the batch is part of the recipe.
            text["image"] = f"{index + 1} of {len(self.images)}"
        return text


class Pipeline:
    """A loaded bundle. Calls from several threads run one after another."""

    def __init__(self, bundle: Bundle, executor: Executor, tokenizers: Sequence[Tokenizer]) -> None:
        """Use `Pipeline.load`."""
        self.bundle = bundle
        self._executor: Executor | None = executor
        self._tokenizers = tuple(tokenizers)
        self._lock = threading.Lock()

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Pipeline:
        """Open a bundle, check every file's digest, and load its engines.

        The denoiser of the smallest step count is loaded here, the others at their first use.

        Raises: ModelNotFound, BundleError, BackendUnavailable, EngineMismatch, ShapeError.
        """
        bundle = open_bundle(folder)
        bundle.check_files()
        return cls.of(bundle)

    @classmethod
    def of(cls, bundle: Bundle) -> Pipeline:
        """Load the engines of an opened bundle, whose files are taken as they are.

        Warns: ComputeTypeDiffers where this machine computes in another type than the building one.
        Raises: BundleError, BackendUnavailable, EngineMismatch, ShapeError.
        """
        executor = open_executor(bundle)
        try:
            executor.prepare(bundle.built_steps[0], bundle.manifest.sizes_px[0])
            tokenizers = [Tokenizer(bundle.path(spec.file), spec) for spec in bundle.manifest.tokenizers]
        except BaseException:
            executor.close()
            raise
        for note in executor.notes:
            warnings.warn(note, ComputeTypeDiffers, stacklevel=3)
        return cls(bundle, executor, tokenizers)

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        seed: int | Sequence[int] | None = None,
        steps: int | None = None,
        size: int | None = None,
        negative_prompt: object = None,
        guidance_scale: object = None,
    ) -> Result:
        """Draw one image per prompt.

        Args:
            prompt: one prompt or up to the bundle's batch of them.
            seed: 0 to 2**64 - 1; one for the whole call, as `torch.Generator().manual_seed(seed)` in diffusers, or one per
                prompt. None draws a fresh one, which stands in the result.
            steps: a step count of the bundle; None takes the smallest.
            size: edge in pixels; None takes the bundle's first.
            negative_prompt, guidance_scale: refused. The model is distilled to run without guidance.
        Warns: PromptTruncated where a prompt is longer than the text encoder reads.
        Raises: ConfigError for a wrong argument, EngineMismatch for what the bundle was not built for.
        """
        start = time.perf_counter()
        _refuse_guidance(negative_prompt, guidance_scale)
        prompts = self._checked_prompts(prompt)
        seeds = _checked_seeds(seed, len(prompts))
        num_steps = self._checked_steps(steps)
        size_px = self._checked_size(size)
        with self._lock:
            return self._draw(prompts, seeds, num_steps, size_px, start)

    @property
    def compute_dtypes(self) -> dict[str, str]:
        """Loaded stage (`text`, `denoise/1`, `decode`) -> what it computes in on this machine."""
        return {} if self._executor is None else self._executor.compute_dtypes

    def close(self) -> None:
        """Release engines and buffers; waits for a running call. A second call does nothing."""
        with self._lock:
            executor, self._executor = self._executor, None
        if executor is not None:
            executor.close()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def _draw(
        self, prompts: tuple[str, ...], seeds: int | tuple[int, ...], num_steps: int, size_px: int, start: float
    ) -> Result:
        executor, manifest = self._executor, self.bundle.manifest
        if executor is None:
            raise NitroError(f"the pipeline of {self.bundle.folder} is closed; load it again: Pipeline.load(...)")
        notes = self._warn_of_cuts(prompts)
        clock = _Clock()
        ids_BT, ids_2_BT = (tokenizer.encode_batch(prompts, manifest.batch) for tokenizer in self._tokenizers)
        clock.lap("tokenize")
        noise_NBCHW = draw_noise(seeds, num_steps, len(prompts), manifest.batch, self.bundle.latent_CHW_at(size_px))
        clock.lap("noise")
        notes += self._prepare(executor, num_steps, size_px, clock)
        drawing = executor.draw(num_steps, size_px, ids_BT, ids_2_BT, noise_NBCHW)
        if not drawing.finite:
            raise EngineMismatch(
                f"{self.bundle.folder} gave latents that are not finite (NaN or infinity) at {num_steps} steps: "
                f"its {manifest.decode.precision} engines overflow here; build with --precision fp32"
            )
        clock.skip()
        images = _pil_images(drawing.images_BHWC[: len(prompts)])
        clock.lap("images")
        timings_ms = clock.laps_ms | drawing.timings_ms | {"total": (time.perf_counter() - start) * 1e3}
        return Result(
            images=images,
            prompts=prompts,
            seed=seeds,
            steps=num_steps,
            size_px=size_px,
            bundle_digest=self.bundle.digest,
            timings_ms=timings_ms,
            warnings=tuple(dict.fromkeys((*executor.notes, *notes))),
        )

    def _prepare(self, executor: Executor, num_steps: int, size_px: int, clock: _Clock) -> list[str]:
        """Load the denoiser if this is its first use; returns what there is to say about it."""
        known = len(executor.notes)
        if executor.prepare(num_steps, size_px):
            clock.lap("load")
        new = list(executor.notes[known:])
        for note in new:
            warnings.warn(note, ComputeTypeDiffers, stacklevel=4)
        return new

    def _warn_of_cuts(self, prompts: tuple[str, ...]) -> list[str]:
        messages = [message for prompt in prompts if (message := truncation_message(prompt, self._tokenizers))]
        for message in messages:
            warnings.warn(message, PromptTruncated, stacklevel=4)
        return messages

    def _checked_prompts(self, prompt: object) -> tuple[str, ...]:
        if isinstance(prompt, str):
            prompts: tuple[object, ...] = (prompt,)
        elif isinstance(prompt, Sequence) and not isinstance(prompt, (bytes, bytearray)):
            prompts = tuple(prompt)
        else:
            raise ConfigError(f"prompt must be a string or a list of strings, got {type(prompt).__name__}")
        if not prompts:
            raise ConfigError("the list of prompts is empty; give at least one prompt")
        wrong = next((item for item in prompts if not isinstance(item, str)), None)
        if wrong is not None or None in prompts:
            raise ConfigError(f"every prompt must be a string, got {wrong!r} ({type(wrong).__name__})")
        texts = tuple(str(item) for item in prompts)
        for text in texts:
            try:
                text.encode()
            except UnicodeEncodeError as exc:
                raise ConfigError(
                    f"the prompt {text!r} has no UTF-8 form (character {exc.start} is {text[exc.start]!r}, half of a pair); "
                    "give it decoded as UTF-8"
                ) from exc
        batch = self.bundle.manifest.batch
        if len(prompts) > batch:
            raise EngineMismatch(
                f"{len(prompts)} prompts, but {self.bundle.folder} was built for batch {batch}; "
                f"give at most {batch}, or build with --batch {len(prompts)}"
            )
        return texts

    def _checked_steps(self, steps: object) -> int:
        built = self.bundle.built_steps
        if steps is None:
            return built[0]
        if isinstance(steps, bool) or not isinstance(steps, int):
            raise ConfigError(f"steps must be a whole number, got {steps!r} ({type(steps).__name__})")
        if steps not in built:
            raise EngineMismatch(
                f"{self.bundle.folder} was not built for {steps} steps; built: {', '.join(map(str, built))}; "
                f"use one of these, or build with --steps {steps}"
            )
        return steps

    def _checked_size(self, size: object) -> int:
        if size is None:
            return self.bundle.manifest.sizes_px[0]
        if isinstance(size, bool) or not isinstance(size, int):
            raise ConfigError(f"size must be a whole number of pixels, got {size!r} ({type(size).__name__})")
        self.bundle.engines_at(size)  # refuses what was not built
        return size


class _Clock:
    """Times the laps of one call."""

    def __init__(self) -> None:
        self.laps_ms: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps_ms[name], self._last = (now - self._last) * 1e3, now

    def skip(self) -> None:
        self._last = time.perf_counter()


def _refuse_guidance(negative_prompt: object, guidance_scale: object) -> None:
    why = "guidance is 0 by design: the model is distilled to draw without it"
    if negative_prompt is not None:
        _refuse(f"negative_prompt is not supported, {why}; say in the prompt what to draw")
    if guidance_scale is not None:
        _refuse(f"guidance_scale is not supported, {why}; leave it out")


def _refuse(message: str) -> NoReturn:
    raise ConfigError(message)


def _checked_seeds(seed: object, num_images: int) -> int | tuple[int, ...]:
    if seed is None:
        # 32 bits are all that torch's generator reads of a seed.
        return int.from_bytes(os.urandom(4), "little")
    if isinstance(seed, Sequence) and not isinstance(seed, (str, bytes)):
        if len(seed) != num_images:
            raise ConfigError(f"{len(seed)} seeds for {num_images} prompts; give one seed, or one per prompt")
        return tuple(checked_seed(item) for item in seed)
    return checked_seed(seed)


def _pil_images(images_BHWC: Any) -> list[Image.Image]:
    from PIL import Image

    return [Image.fromarray(image_HWC) for image_HWC in images_BHWC]

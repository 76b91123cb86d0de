"""What a call may ask of a bundle: every argument is checked here, before anything waits or is computed."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

from nitro_rt.bundle import Bundle
from nitro_rt.errors import ConfigError, EngineMismatch
from nitro_rt.noise import checked_seed
from nitro_rt.schedule import MAX_STEPS


def refuse_guidance(negative_prompt: object, guidance_scale: object) -> None:
    """Raises: ConfigError where either is given."""
    why = "guidance is 0 by design: the model is distilled to draw without it"
    if negative_prompt is not None:
        raise ConfigError(f"negative_prompt is not supported, {why}; say in the prompt what to draw")
    if guidance_scale is not None:
        raise ConfigError(f"guidance_scale is not supported, {why}; leave it out")


def checked_prompts(prompt: object, bundle: Bundle) -> tuple[str, ...]:
    """One prompt or several, as a tuple. Raises: ConfigError; EngineMismatch where they are more than a batch."""
    if isinstance(prompt, str):
        prompts: tuple[object, ...] = (prompt,)
    elif isinstance(prompt, Sequence) and not isinstance(prompt, (bytes, bytearray)):
        prompts = tuple(prompt)
    else:
        raise ConfigError(f"prompt must be a string or a list of strings, got {type(prompt).__name__}")
    if not prompts:
        raise ConfigError("the list of prompts is empty; give at least one prompt")
    batch = bundle.manifest.batch
    texts = tuple(_checked_text(item) for item in prompts)
    if len(texts) > batch:
        raise EngineMismatch(
            f"{len(texts)} prompts, but {bundle.folder} was built for batch {batch}; "
            f"give at most {batch}, or build with --batch {len(texts)}"
        )
    return texts


def _checked_text(prompt: object) -> str:
    if not isinstance(prompt, str):
        raise ConfigError(f"every prompt must be a string, got {prompt!r} ({type(prompt).__name__})")
    try:
        prompt.encode()
    except UnicodeEncodeError as exc:
        raise ConfigError(
            f"the prompt {prompt!r} has no UTF-8 form (character {exc.start} is {prompt[exc.start]!r}, half of a pair); "
            "give it decoded as UTF-8"
        ) from exc
    return str(prompt)


def checked_seeds(seed: object, num_images: int) -> int | tuple[int, ...]:
    """One seed, or one per image; a fresh one for None. Raises: ConfigError."""
    if seed is None:
        # 32 bits are all that torch's generator reads of a seed.
        return int.from_bytes(os.urandom(4), "little")
    if isinstance(seed, Sequence) and not isinstance(seed, (str, bytes)):
        if len(seed) != num_images:
            raise ConfigError(f"{len(seed)} seeds for {num_images} prompts; give one seed, or one per prompt")
        return tuple(checked_seed(item) for item in seed)
    return checked_seed(seed)


def checked_steps(steps: object, bundle: Bundle) -> int:
    """A step count of the bundle; the smallest for None. Raises: ConfigError, EngineMismatch."""
    built = bundle.built_steps
    if steps is None:
        return built[0]
    if isinstance(steps, bool) or not isinstance(steps, int):
        raise ConfigError(f"steps must be a whole number, got {steps!r} ({type(steps).__name__})")
    if steps not in built:
        how = f", or build with --steps {steps}" if 1 <= steps <= MAX_STEPS else f"; there are 1 to {MAX_STEPS}"
        raise EngineMismatch(
            f"{bundle.folder} was not built for {steps} steps; built: {', '.join(map(str, built))}; use one of these{how}"
        )
    return steps


def checked_size(size: object, bundle: Bundle) -> int:
    """A size of the bundle in pixels; its first for None. Raises: ConfigError, EngineMismatch."""
    if size is None:
        return bundle.manifest.sizes_px[0]
    if isinstance(size, bool) or not isinstance(size, int):
        raise ConfigError(f"size must be a whole number of pixels, got {size!r} ({type(size).__name__})")
    bundle.engines_at(size)  # refuses what was not built
    return size


def checked_deadline(deadline_s: object) -> float | None:
    """Seconds, also none left or fewer, as a remaining budget may be. Raises: ConfigError."""
    if deadline_s is None:
        return None
    if isinstance(deadline_s, bool) or not isinstance(deadline_s, (int, float)) or not math.isfinite(deadline_s):
        raise ConfigError(f"deadline_s must be a finite number of seconds, or None for no deadline, got {deadline_s!r}")
    return float(deadline_s)


def checked_max_queue(max_queue: object) -> int:
    """Raises: ConfigError unless it is a whole number from 1."""
    if isinstance(max_queue, bool) or not isinstance(max_queue, int) or max_queue < 1:
        raise ConfigError(f"max_queue must be a whole number of requests from 1, got {max_queue!r}")
    return max_queue

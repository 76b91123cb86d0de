"""The built-in prompts of calibration: seeded, varied in subject, colour, place and style; every other one plain and short.

Plain ones are what models of small images are asked for. They reach further into the ranges of nitro-emoji's layers than the
long ones, of which its tokenizer knows few words.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence

SUBJECTS = (
    "an apple", "a cat", "a dog", "a star", "a house", "a heart", "a rocket", "a balloon", "an umbrella", "a car", "a flower",
    "a camera", "a portrait of a woman", "an old man reading", "a crowd in a market", "a mountain lake", "a city at night",
    "a bowl of noodles", "a sailing ship", "a red-haired child", "a robot", "a forest path", "a horse", "a cup of coffee",
)  # fmt: skip
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "black and white", "pastel", "golden", "turquoise")
STYLES = (
    "flat style", "a photo, 35 mm", "oil painting", "watercolour", "macro photograph", "isometric 3D render", "line drawing",
    "cinematic light", "studio light", "on a plain background",
)  # fmt: skip


def built_in_prompts(num_prompts: int, seed: int) -> tuple[str, ...]:
    """Equal arguments give equal prompts, on every machine and version of Python."""
    draw = random.Random(seed).random  # what Random makes of it (`choice`, `shuffle`) may change; `random` itself does not
    subjects = sorted(SUBJECTS, key=lambda _: draw())
    prompts = []
    for index in range(num_prompts):
        subject = subjects[index % len(subjects)]
        colour, style = COLOURS[int(draw() * len(COLOURS))], STYLES[int(draw() * len(STYLES))]
        thing, article = subject.partition(" ")[2], "an" if colour[0] in "aeiou" else "a"
        is_plain = (index + index // len(subjects)) % 2 == 1  # each subject in turn, though their number is even
        prompts.append(f"{article} {colour} {thing}" if is_plain else f"{subject}, {colour}, {style}")
    return tuple(prompts)


def prompts_sha256(prompts: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(prompts).encode()).hexdigest()

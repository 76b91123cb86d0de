"""Draw two sheets with the public runtime API: sixteen prompts at one step, and four of them at 1, 2 and 4 steps.

    python examples/demo.py --one-step engines/nitro-emoji-1step --many-steps engines/nitro-emoji-124steps --out demo

Nothing but nitro_rt and Pillow is imported here.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from nitro_rt import Pipeline

PROMPTS = (
    "a red apple",
    "a blue car",
    "a cat face",
    "a pizza",
    "a green frog",
    "a smiling face with sunglasses",
    "a yellow star",
    "a red heart",
    "a robot",
    "a purple umbrella",
    "a ghost",
    "a rocket",
    "a hamburger",
    "an orange fish",
    "a house",
    "a soccer ball",
)
COMPARED = PROMPTS[:4]
STEPS = (1, 2, 4)
SEED = 7
GAP = 8
CAPTION_HEIGHT = 18


def draw_one_step(bundle: Path) -> tuple[list[Image.Image], float]:
    """One image per prompt, and the median time of an image in ms."""
    images, times_ms = [], []
    with Pipeline.load(bundle) as pipe:
        for prompt in PROMPTS:
            result = pipe(prompt, seed=SEED, steps=1)
            images.append(result.images[0])
            times_ms.append(result.timings_ms["total"])
    return images, statistics.median(times_ms)


def draw_many_steps(bundle: Path) -> list[Image.Image]:
    """`COMPARED` at every count of `STEPS`, row by row."""
    with Pipeline.load(bundle) as pipe:
        return [pipe(prompt, seed=SEED, steps=steps).images[0] for steps in STEPS for prompt in COMPARED]


def sheet(images: Sequence[Image.Image], captions: Sequence[str], columns: int) -> Image.Image:
    """The images in rows, each over its caption."""
    width, height = images[0].size
    cell_width, cell_height = width + GAP, height + CAPTION_HEIGHT + GAP
    rows = -(-len(images) // columns)
    page = Image.new("RGB", (columns * cell_width + GAP, rows * cell_height + GAP), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(11)
    for index, (image, caption) in enumerate(zip(images, captions, strict=True)):
        left, top = GAP + index % columns * cell_width, GAP + index // columns * cell_height
        page.paste(image, (left, top))
        pen.text((left, top + height + 2), shorten(caption, width, font), fill="black", font=font)
    return page


def shorten(caption: str, width: int, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> str:
    """`caption`, cut to `width` pixels."""
    if font.getlength(caption) <= width:
        return caption
    while caption and font.getlength(caption + "...") > width:
        caption = caption[:-1]
    return caption + "..."


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the two demo sheets.")
    parser.add_argument("--one-step", type=Path, required=True, help="a bundle built for one step")
    parser.add_argument("--many-steps", type=Path, required=True, help="a bundle built for 1, 2 and 4 steps")
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for the sheets (default: demo)")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)

    images, image_ms = draw_one_step(options.one_step)
    one_step = options.out / "one-step.png"
    sheet(images, PROMPTS, columns=4).save(one_step)

    many_steps = options.out / "steps-1-2-4.png"
    counts = [f"{prompt}, {steps} step{'s' * (steps > 1)}" for steps in STEPS for prompt in COMPARED]
    sheet(draw_many_steps(options.many_steps), counts, columns=len(COMPARED)).save(many_steps)

    print(f"{len(PROMPTS)} pictures in one step each, median {image_ms:.0f} ms:  {one_step}")
    print(f"{len(COMPARED)} prompts at {', '.join(map(str, STEPS))} steps:  {many_steps}")


if __name__ == "__main__":
    main()

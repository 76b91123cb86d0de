"""Picture sheets: the teacher beside the student at 1, 2 and 4 steps, prompt by prompt."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image, ImageDraw
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from nitro_rt.errors import ModelNotFound
from nitro_training import script
from nitro_training.generator import draw_student
from nitro_training.model import TextEncoders
from nitro_training.samplers import sample

HELDOUT = "heldout:"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder in memory, FP32."""

    text: TextEncoders
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    shifted_timestep: int

    @classmethod
    def load(cls, folder: Path) -> Checkpoint:
        if not (folder / "model_index.json").is_file():
            raise ModelNotFound(f"no checkpoint at {folder}: model_index.json is missing")
        text = TextEncoders(
            CLIPTokenizer.from_pretrained(str(folder / "tokenizer")),
            CLIPTextModel.from_pretrained(folder / "text_encoder").float().eval(),
            CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2").float().eval(),
        )
        return cls(
            text,
            UNet2DConditionModel.from_pretrained(folder / "unet").float().eval(),
            AutoencoderKL.from_pretrained(folder / "vae").float().eval(),
            json.loads((folder / "run.json").read_text(encoding="utf-8"))["shifted_timestep"],
        )


def read_prompts(path: Path) -> list[str]:
    """One prompt a line; `#` starts a comment. A leading "heldout:" is kept: it is a mark, not part of the prompt."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


@torch.no_grad()
def draw_columns(teacher: Checkpoint, student: Checkpoint, prompts: list[str], seed: int) -> dict[str, Tensor]:
    """Images uint8 [B, H, W, 3] per column, all from the same noise."""
    words = [prompt.removeprefix(HELDOUT).strip() for prompt in prompts]
    ids = student.text.tokenize(words)
    side = student.unet.config.sample_size
    noise = torch.randn(len(words), 4, side, side, generator=torch.Generator().manual_seed(seed))
    embeds, pooled = teacher.text.encode(ids)
    columns = {"teacher, 25 steps": sample(teacher.unet, embeds, pooled, noise, num_steps=25, guidance=3.0)}
    embeds, pooled = student.text.encode(ids)
    for steps in (1, 2, 4):
        generator = torch.Generator().manual_seed(seed + 1)
        latents = draw_student(
            student.unet, embeds, pooled, noise, num_steps=steps, shift=student.shifted_timestep, generator=generator
        )
        columns[f"student, {steps} step{'s' if steps > 1 else ''}"] = latents
    return {name: pixels(student.vae, latents) for name, latents in columns.items()}


def pixels(vae: AutoencoderKL, latents_B4hw: Tensor) -> Tensor:
    """Latents to uint8 [B, H, W, 3]."""
    image: Tensor = vae.decode(latents_B4hw / vae.config.scaling_factor).sample
    return ((image.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)


def sheet(prompts: list[str], columns: dict[str, Tensor], prompts_per_row: int = 4) -> Image.Image:
    """All prompts with their columns side by side, captions underneath."""
    names = list(columns)
    side = columns[names[0]].shape[1]
    gap, caption = 10, 16
    width_of_prompt = side * len(names) + gap
    rows = -(-len(prompts) // prompts_per_row)
    page = Image.new("RGB", (prompts_per_row * width_of_prompt + gap, caption + rows * (side + caption)), "white")
    pen = ImageDraw.Draw(page)
    for index, prompt in enumerate(prompts):
        left = gap + (index % prompts_per_row) * width_of_prompt
        top = caption + (index // prompts_per_row) * (side + caption)
        for column, name in enumerate(names):
            if index < prompts_per_row:
                pen.text((left + column * side + 4, 2), name, fill="grey")
            page.paste(Image.fromarray(columns[name][index].numpy()), (left + column * side, top))
        pen.text((left + 4, top + side), prompt, fill="black")
    return page


def main() -> None:
    """`python -m nitro_training.sheet`: draw a student's run beside its teacher."""
    import argparse

    parser = argparse.ArgumentParser(prog="python -m nitro_training.sheet", description=main.__doc__)
    parser.add_argument("run", type=Path, help="the folder of a student's run, with `checkpoint` in it")
    parser.add_argument("--teacher", type=Path, required=True, help="the teacher's checkpoint folder")
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    prompts = read_prompts(options.prompts)
    teacher, student = Checkpoint.load(options.teacher), Checkpoint.load(options.run / "checkpoint")
    sheet(prompts, draw_columns(teacher, student, prompts, options.seed)).save(options.out, optimize=True)
    print(options.out)


if __name__ == "__main__":
    script.run(main)

"""The emoji data set: npm icon packs rendered to pictures, captioned, and stored as one folder.

    images.safetensors   images, uint8 [N, H, W, 3]
    records.jsonl        one line per image: concept, style, colour, recoloured, split, captions
    prompts.txt          every distinct caption of the training split, one a line: what a student is trained on
    data.json            what it was made from: packages with versions and licences, options, counts, digests

Pairs of (colour, concept) are held out whole, never single images: about five pictures show the same concept, so a
picture held out alone would be known from its siblings.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import load_file, save_file

from nitro_rt.errors import ConfigError
from nitro_training import colours, script
from nitro_training.captions import bare_name, captions

SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Pack:
    """One npm icon pack."""

    package: str
    style: str
    """What the pack is called in captions."""
    licence: str
    author: str


PACKS = {
    "noto": Pack(package="@iconify-json/noto", style="noto", licence="Apache-2.0", author="Google"),
    "noto-v1": Pack(package="@iconify-json/noto-v1", style="blob", licence="Apache-2.0", author="Google"),
    "twemoji": Pack(package="@iconify-json/twemoji", style="twemoji", licence="CC-BY-4.0", author="Twitter and contributors"),
    "fluent-emoji": Pack(package="@iconify-json/fluent-emoji", style="fluent", licence="MIT", author="Microsoft"),
    "fluent-emoji-flat": Pack(package="@iconify-json/fluent-emoji-flat", style="flat", licence="MIT", author="Microsoft"),
    "fxemoji": Pack(package="@iconify-json/fxemoji", style="fx", licence="Apache-2.0", author="Mozilla"),
    "emojione": Pack(package="@iconify-json/emojione", style="emojitwo", licence="CC-BY-4.0", author="EmojiTwo"),
}


@dataclass(frozen=True, kw_only=True)
class EmojiConfig:
    """What goes into the data set."""

    packs: tuple[str, ...] = tuple(PACKS)
    """Names from `PACKS`."""
    default_style: str = "noto"
    """The style of a prompt that names none: one look per prompt is far easier to learn than a blend of several."""
    size_px: int = 128
    margin: float = 0.04
    """White border around every icon, as a share of the side."""
    one_colour_share: float = 0.5
    """An icon "has" a colour when that colour covers at least this share of its pixels."""
    recolour: bool = True
    """Add hue-shifted copies of one-colour icons."""
    heldout_share: float = 0.1
    """Share of the recoloured (colour, concept) pairs kept out of training."""
    seed: int = 0

    def __post_init__(self) -> None:
        unknown = sorted(set(self.packs) - set(PACKS))
        if unknown:
            raise ConfigError(f"unknown icon pack {', '.join(unknown)}; available: {', '.join(PACKS)}")
        styles = [PACKS[name].style for name in self.packs]
        if self.default_style not in styles:
            raise ConfigError(f"default_style {self.default_style!r} is not one of the packs' styles: {', '.join(styles)}")
        if self.size_px % 8 or not 32 <= self.size_px <= 512:
            raise ConfigError(f"size_px must be a multiple of 8 from 32 to 512, got {self.size_px}")


@dataclass(frozen=True, kw_only=True)
class Concept:
    """A thing that can be drawn."""

    label: str
    """The emojibase label."""
    synonyms: tuple[str, ...] = ()
    recolourable: bool = True
    """Faces keep their colour."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """What is known of one image."""

    concept: str
    style: str
    colour: str | None
    recoloured: bool
    split: str
    """`train` or `heldout`."""
    captions: tuple[str, ...]


def read_concepts(path: Path) -> list[Concept]:
    """The concepts of a text file: `label` or `label = synonym, synonym` a line; `# group` starts a group."""
    if not path.is_file():
        raise ConfigError(f"no concept list at {path}")
    found: list[Concept] = []
    group = ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            group = line[1:].strip()
        elif line.strip():
            label, _, synonyms = (part.strip() for part in line.partition("="))
            words = tuple(word.strip() for word in synonyms.split(",") if word.strip())
            found.append(Concept(label=label, synonyms=words, recolourable=group != "smileys"))
    return found


def slug(label: str) -> str:
    """The icon name of a label: "T-Rex" -> "t-rex"."""
    return re.sub(r"[^a-z0-9]+", "-", label.lower().replace("’", "").replace("'", "")).strip("-")


class IconPack:
    """The icons of one installed pack, found by label."""

    def __init__(self, name: str, node_modules: Path) -> None:
        folder = node_modules / PACKS[name].package
        if not (folder / "icons.json").is_file():
            raise ConfigError(f"icon pack {name!r} is not installed under {node_modules}; run `make emoji-data`")
        data = json.loads((folder / "icons.json").read_text(encoding="utf-8"))
        self.name = name
        self.version: str = json.loads((folder / "package.json").read_text(encoding="utf-8"))["version"]
        self._icons: dict[str, dict[str, object]] = data["icons"]
        self._width, self._height = int(data.get("width", 16)), int(data.get("height", 16))
        self._by_squeezed = {key.replace("-", ""): key for key in self._icons}

    def svg(self, label: str) -> str | None:
        """The SVG text of the icon that shows `label`; None where the pack has none."""
        key = slug(label)
        icon = self._icons.get(key) or self._icons.get(self._by_squeezed.get(key.replace("-", ""), ""))
        if icon is None:
            return None
        box = [icon.get("left", 0), icon.get("top", 0), icon.get("width", self._width), icon.get("height", self._height)]
        view = " ".join(str(side) for side in box)
        return (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{view}">{icon["body"]}</svg>'
        )


def render(svg: str, size_px: int, margin: float) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """An SVG on white: `rgb_HW3` in [0, 1] and the mask of the pixels that the icon covers."""
    import resvg_py

    inner = round(size_px * (1 - 2 * margin))
    png = resvg_py.svg_to_bytes(svg_string=svg, width=inner, height=inner, skip_system_fonts=True)
    icon = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    icon.thumbnail((inner, inner))
    canvas = Image.new("RGBA", (size_px, size_px), (255, 255, 255, 0))
    canvas.paste(icon, ((size_px - icon.width) // 2, (size_px - icon.height) // 2))
    rgba = np.asarray(canvas, dtype=np.float32) / 255.0
    alpha = rgba[..., 3:]
    return rgba[..., :3] * alpha + (1 - alpha), alpha[..., 0] > 0.5


def draw(config: EmojiConfig, concepts: list[Concept], packs: list[IconPack]) -> Iterator[tuple[Record, NDArray[np.uint8]]]:
    """Every record of the data set with its picture, uint8 [H, W, 3]; blank icons and repeats are left out."""
    seen: set[bytes] = set()
    natural: dict[str, set[str]] = {}
    drawn = [(concept, pack, svg) for concept in concepts for pack in packs if (svg := pack.svg(concept.label))]
    pictures = []
    for concept, pack, svg in drawn:
        rgb, mask = render(svg, config.size_px, config.margin)
        name, share = colours.dominant(rgb, mask)
        colour = name if share >= config.one_colour_share else None
        pictures.append((concept, pack, rgb, mask, colour))
        if colour:
            natural.setdefault(concept.label, set()).add(colour)
    for concept, pack, rgb, mask, colour in pictures:
        image = to_uint8(rgb)
        digest = hashlib.sha256(image.tobytes()).digest()
        if digest in seen or not mask.any():
            continue
        seen.add(digest)
        yield _record(config, concept, pack, colour, recoloured=False, split="train"), image
        if not (config.recolour and concept.recolourable and colour in colours.HUES_DEG):
            continue
        for target in colours.HUES_DEG:
            if target in natural[concept.label]:
                continue
            shifted = colours.shift_hue(rgb, mask, target)
            name, share = colours.dominant(shifted, mask)
            if name == target and share >= config.one_colour_share:
                split = "heldout" if is_heldout(target, concept.label, config) else "train"
                yield _record(config, concept, pack, target, recoloured=True, split=split), to_uint8(shifted)


def is_heldout(colour: str, label: str, config: EmojiConfig) -> bool:
    """Whether the pair (colour, concept) is kept out of training; decided by its name alone, so it never moves."""
    digest = hashlib.sha256(f"{config.seed}/{colour}/{label}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < config.heldout_share


def to_uint8(rgb_HW3: NDArray[np.float32]) -> NDArray[np.uint8]:
    return np.clip(np.rint(rgb_HW3 * 255.0), 0, 255).astype(np.uint8)


def _record(
    config: EmojiConfig, concept: Concept, pack: IconPack, colour: str | None, *, recoloured: bool, split: str
) -> Record:
    style = PACKS[pack.name].style
    is_default = style == config.default_style
    words = captions(concept.label, concept.synonyms, style, colour, recoloured=recoloured, is_default=is_default)
    return Record(
        concept=bare_name(concept.label), style=style, colour=colour, recoloured=recoloured, split=split, captions=tuple(words)
    )


def build_dataset(config: EmojiConfig, concepts_file: Path, node_modules: Path, out: Path) -> dict[str, object]:
    """Render and write the data set; returns the manifest.

    The manifest is written last, so a folder without `data.json` is an unfinished one.
    """
    concepts = read_concepts(concepts_file)
    packs = [IconPack(name, node_modules) for name in config.packs]
    records, images = zip(*draw(config, concepts, packs), strict=True)
    out.mkdir(parents=True, exist_ok=True)
    (out / "data.json").unlink(missing_ok=True)
    save_file({"images": np.stack(images)}, str(out / "images.safetensors"))
    lines = [json.dumps(asdict(record), ensure_ascii=False) for record in records]
    (out / "records.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    prompts = dict.fromkeys(caption for record in records if record.split == "train" for caption in record.captions)
    (out / "prompts.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")
    manifest: dict[str, object] = {
        "schema_version": SCHEMA_VERSION,
        "config": asdict(config),
        "packages": [
            {
                "package": PACKS[p.name].package,
                "version": p.version,
                "licence": PACKS[p.name].licence,
                "author": PACKS[p.name].author,
            }
            for p in packs
        ],
        "num_images": len(records),
        "num_concepts": len({record.concept for record in records}),
        "num_recoloured": sum(record.recoloured for record in records),
        "num_heldout": sum(record.split == "heldout" for record in records),
        "sha256": {name: file_sha256(out / name) for name in ("images.safetensors", "records.jsonl", "prompts.txt")},
    }
    (out / "data.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return manifest


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class EmojiDataset:
    """A data set read back."""

    images_NHW3: NDArray[np.uint8]
    records: list[Record]
    manifest: dict[str, object]

    @classmethod
    def load(cls, folder: Path) -> EmojiDataset:
        """Raises: ConfigError if the folder is no finished data set or its files differ from its manifest."""
        if not (folder / "data.json").is_file():
            raise ConfigError(f"no finished data set at {folder} (data.json is missing); run `make emoji-data`")
        manifest = json.loads((folder / "data.json").read_text(encoding="utf-8"))
        if manifest.get("schema_version") != SCHEMA_VERSION:
            raise ConfigError(f"{folder} has data schema {manifest.get('schema_version')}, this version reads {SCHEMA_VERSION}")
        for name, expected in manifest["sha256"].items():
            if file_sha256(folder / name) != expected:
                raise ConfigError(f"{folder / name} differs from its digest in data.json; run `make emoji-data` again")
        lines = (folder / "records.jsonl").read_text(encoding="utf-8").splitlines()
        records = [Record(**{**json.loads(line), "captions": tuple(json.loads(line)["captions"])}) for line in lines]
        return cls(load_file(str(folder / "images.safetensors"))["images"], records, manifest)

    def indices(self, split: str) -> list[int]:
        return [index for index, record in enumerate(self.records) if record.split == split]


def main() -> None:
    """`python -m nitro_training.emoji`: make the data set of a recipe from installed icon packs."""
    import argparse

    from nitro_training.recipe import read_teacher_recipe

    parser = argparse.ArgumentParser(prog="python -m nitro_training.emoji", description=main.__doc__)
    parser.add_argument("--recipe", type=Path, required=True, help="the recipe whose [emoji] options and concepts count")
    parser.add_argument("--npm", type=Path, required=True, help="the node_modules folder with the icon packs")
    parser.add_argument("--out", type=Path, required=True, help="the data set's folder")
    options = parser.parse_args()
    recipe = read_teacher_recipe(options.recipe)
    manifest = build_dataset(recipe.emoji, options.recipe.parent / recipe.data.concepts, options.npm, options.out)
    print(
        f"{manifest['num_images']} images of {manifest['num_concepts']} concepts "
        f"({manifest['num_recoloured']} recoloured, {manifest['num_heldout']} held out) in {options.out}"
    )


if __name__ == "__main__":
    script.run(main)

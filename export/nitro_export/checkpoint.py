"""A diffusers SDXL folder on disk: what it holds, whether it is one that can be exported, and its digest.

Reads JSON and file names only, so a wrong checkpoint is refused before torch is loaded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nitro_export.sdxl import CONFIGS, TAESDXL
from nitro_rt.errors import ConfigError, ExportError, ModelNotFound
from nitro_rt.manifest import sha256_of

PART_CLASSES = {
    "text_encoder": ("CLIPTextModel",),
    "text_encoder_2": ("CLIPTextModelWithProjection",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "tokenizer_2": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL", "AutoencoderTiny"),
}
WEIGHT_STEMS = {
    "text_encoder": "model",
    "text_encoder_2": "model",
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
}
TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
LATENT_CHANNELS = 4
NUM_TIME_IDS = 6
"""SDXL's micro-conditioning: original height and width, crop top and left, target height and width."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The configs of a checkpoint that passed all checks; weights are still on disk."""

    folder: Path
    unet: dict[str, Any]
    vae: dict[str, Any]
    text_encoders: tuple[dict[str, Any], dict[str, Any]]
    scheduler: dict[str, Any]
    run: dict[str, Any]
    """run.json, or empty."""
    variants: dict[str, str | None]
    """Part -> the `variant` of its weight files: None, or fp16 where only those are there."""

    @property
    def num_tokens(self) -> int:
        """Tokens per prompt: 77 in SDXL."""
        return int(self.text_encoders[0]["max_position_embeddings"])

    @property
    def vae_factor(self) -> int:
        """Pixels per latent, along one side."""
        blocks = self.vae.get("decoder_block_out_channels") or self.vae["block_out_channels"]
        return int(2 ** (len(blocks) - 1))

    @property
    def size_multiple(self) -> int:
        """Image sides must be multiples of this: the UNet halves the latents once per level but the first."""
        return self.vae_factor * int(2 ** (len(self.unet["block_out_channels"]) - 1))

    @property
    def native_size_px(self) -> int:
        return int(self.unet["sample_size"]) * self.vae_factor


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read and check a checkpoint's configs and file names.

    Raises: ModelNotFound if the folder or one of its files is not there; ExportError if it is not an SDXL checkpoint of
        the kind that NitroFusion uses (two CLIP text encoders, 4-channel epsilon UNet with text_time, safetensors);
        ConfigError if an index of shards names files outside of its folder.
    """
    index = _model_index(folder)
    _check_parts(folder, index)
    checkpoint = Checkpoint(
        folder=folder,
        unet=_read_json(folder / "unet" / "config.json"),
        vae=_read_json(folder / "vae" / "config.json"),
        text_encoders=(
            _read_json(folder / "text_encoder" / "config.json"),
            _read_json(folder / "text_encoder_2" / "config.json"),
        ),
        scheduler=_read_json(folder / "scheduler" / "scheduler_config.json"),
        run=_read_json(folder / "run.json") if (folder / "run.json").is_file() else {},
        variants={part: _variant(folder / part, stem) for part, stem in WEIGHT_STEMS.items()},
    )
    for part in ("tokenizer", "tokenizer_2"):
        check_tokenizer(folder / part)
    _check_text_encoders(checkpoint)
    _check_unet(checkpoint)
    _check_vae(checkpoint)
    _check_scheduler(checkpoint)
    return checkpoint


def checkpoint_sha256(folder: Path) -> str:
    """Digest over the files that an export reads: their names in the folder and their contents, nothing else.

    Raises: ModelNotFound, ExportError, ConfigError as `read_checkpoint`.
    """
    digest = hashlib.sha256()
    for path in _files(read_checkpoint(folder)):
        digest.update(f"{path.relative_to(folder).as_posix()}\0{sha256_of(path)}\n".encode())
    return digest.hexdigest()


def weight_files(checkpoint: Checkpoint, part: str) -> list[Path]:
    """The safetensors files of a part: one, or its shards."""
    files = _weight_files(checkpoint.folder / part, WEIGHT_STEMS[part], checkpoint.variants[part])
    return [path for path in files if path.suffix == ".safetensors"]


def part_files(folder: Path, part: str) -> list[Path]:
    """The weight files in `folder`, which is a `part`, and, where they are shards, their index.

    Raises: ModelNotFound if there are none; ExportError if there are pickles only; of shards also as `shards`.
    """
    stem = WEIGHT_STEMS[part]
    return _weight_files(folder, stem, _variant(folder, stem))


def shards(index: Path) -> tuple[Path, ...]:
    """The weight files that an index of shards names; all lie beside it.

    Raises: ExportError if the index is damaged; ConfigError if it names a file elsewhere; ModelNotFound if one is missing.
    """
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ExportError(f"{index} has no weight_map; fetch the checkpoint again")
    names = sorted({str(name) for name in weight_map.values()})
    if outside := [name for name in names if Path(name).name != name]:
        raise ConfigError(f"{index} names the file {outside[0]!r}, which is not beside it; refused")
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        raise ModelNotFound(f"{index.parent} lacks {missing[0]}, which its {index.name} names; fetch the checkpoint again")
    return tuple(index.parent / name for name in names)


def _files(checkpoint: Checkpoint) -> Iterator[Path]:
    folder = checkpoint.folder
    yield folder / "model_index.json"
    if (folder / "run.json").is_file():
        yield folder / "run.json"
    yield folder / "scheduler" / "scheduler_config.json"
    for part, stem in WEIGHT_STEMS.items():
        yield folder / part / "config.json"
        yield from _weight_files(folder / part, stem, checkpoint.variants[part])
    for part in ("tokenizer", "tokenizer_2"):
        yield from (folder / part / name for name in TOKENIZER_FILES if (folder / part / name).is_file())


def _model_index(folder: Path) -> dict[str, Any]:
    if folder.is_file():
        raise ModelNotFound(
            f"{folder} is a file; a checkpoint is a folder in the diffusers layout. Convert it once with "
            "StableDiffusionXLPipeline.from_single_file(...).save_pretrained(...)"
        )
    if not folder.is_dir():
        raise ModelNotFound(f"there is no checkpoint folder {folder}")
    if not (folder / "model_index.json").is_file():
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        raise ModelNotFound(f"{folder} has no model_index.json, so it is no diffusers checkpoint; found: {found}")
    return _read_json(folder / "model_index.json")


def _check_parts(folder: Path, index: dict[str, Any]) -> None:
    for part, allowed in PART_CLASSES.items():
        entry = index.get(part)
        kind = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
        if kind not in allowed:
            raise ExportError(
                f"{folder}: model_index.json has {part} = {kind!r}, supported: {' or '.join(allowed)}; "
                "this exports SDXL checkpoints with two CLIP text encoders and a VAE"
            )
    unknown = sorted(part for part, entry in index.items() if part not in PART_CLASSES and _is_network(part, entry))
    if unknown:
        raise ExportError(f"{folder}: model_index.json has the part {unknown[0]!r}, which an SDXL text-to-image pipeline lacks")


def _is_network(part: str, entry: Any) -> bool:
    """True for a part with weights that would be left out; SDXL's optional image encoder and extractor are null."""
    return part != "scheduler" and isinstance(entry, list) and len(entry) == 2 and entry[0] in ("diffusers", "transformers")


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ModelNotFound(f"{path} is missing; fetch the checkpoint again")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as exc:
        raise ExportError(f"{path} is not valid JSON: {exc}; fetch the checkpoint again") from exc
    if not isinstance(data, dict):
        raise ExportError(f"{path} holds a {type(data).__name__}, not an object; fetch the checkpoint again")
    return data


def _variant(part: Path, stem: str) -> str | None:
    """Which of the part's weight files to read. Raises: ModelNotFound; ExportError if there are pickles only."""
    for variant in (None, "fp16"):
        if _weight_files(part, stem, variant):
            return variant
    pickles = sorted(path.name for path in part.glob("*.bin"))
    if pickles:
        raise ExportError(
            f"{part} holds weights as a pickle only ({pickles[0]}), which is not opened because it can run code; "
            "save the checkpoint again as safetensors (save_pretrained(..., safe_serialization=True))"
        )
    raise ModelNotFound(f"{part} has no {stem}.safetensors; fetch the checkpoint again")


def _weight_files(part: Path, stem: str, variant: str | None) -> list[Path]:
    """The one weight file, or the shards with their index; empty if they are not there."""
    dotted = f".{variant}" if variant else ""
    single = part / f"{stem}{dotted}.safetensors"
    index = part / f"{stem}.safetensors.index{dotted}.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        return []
    return [index, *shards(index)]


def check_tokenizer(part: Path) -> None:
    """Raises: ModelNotFound unless the folder has a tokenizer in one of its two forms."""
    if (part / "tokenizer.json").is_file():
        return
    missing = [name for name in ("vocab.json", "merges.txt") if not (part / name).is_file()]
    if missing:
        raise ModelNotFound(f"{part} has neither tokenizer.json nor {missing[0]}; fetch the checkpoint again")


def _check_text_encoders(checkpoint: Checkpoint) -> None:
    for part, config in zip(("text_encoder", "text_encoder_2"), checkpoint.text_encoders, strict=True):
        where = checkpoint.folder / part / "config.json"
        for field in ("hidden_size", "vocab_size", "max_position_embeddings"):
            _require_count(where, config, field, CONFIGS[part])
    first, second = checkpoint.text_encoders
    where = checkpoint.folder / "text_encoder_2" / "config.json"
    _require_count(where, second, "projection_dim", CONFIGS["text_encoder_2"])
    if second["max_position_embeddings"] != first["max_position_embeddings"]:
        expected = f"{first['max_position_embeddings']} as in text_encoder; both encoders read the same tokens and must agree"
        raise _unexpected(where, second, "max_position_embeddings", expected)


def _check_unet(checkpoint: Checkpoint) -> None:
    config, where = checkpoint.unet, checkpoint.folder / "unet" / "config.json"
    for field in ("in_channels", "out_channels"):
        if config.get(field) != LATENT_CHANNELS:
            hint = " (9 are an inpainting UNet's)" if config.get(field) == 9 else ""
            raise _unexpected(where, config, field, f"{LATENT_CHANNELS} in a text-to-image SDXL UNet{hint}")
    if config.get("addition_embed_type") != "text_time":
        raise _unexpected(where, config, "addition_embed_type", "'text_time' as in SDXL")
    for field in ("time_cond_proj_dim", "class_embed_type", "encoder_hid_dim_type", "num_class_embeds", "timestep_post_act"):
        if config.get(field) is not None:
            raise _unexpected(where, config, field, "none in an SDXL UNet without guidance input")
    for field in ("sample_size", "addition_time_embed_dim"):
        _require_count(where, config, field, CONFIGS["unet"])
    _require_counts(where, config, "block_out_channels", CONFIGS["unet"])
    first, second = checkpoint.text_encoders
    widths = first["hidden_size"] + second["hidden_size"]
    if config.get("cross_attention_dim") != widths:
        expected = f"{widths}, the hidden_size of both text encoders; the parts are of different checkpoints"
        raise _unexpected(where, config, "cross_attention_dim", expected)
    pooled = second["projection_dim"] + NUM_TIME_IDS * config["addition_time_embed_dim"]
    if config.get("projection_class_embeddings_input_dim") != pooled:
        expected = f"{pooled} for pooled text and sizes; the parts are of different checkpoints"
        raise _unexpected(where, config, "projection_class_embeddings_input_dim", expected)


def _check_vae(checkpoint: Checkpoint) -> None:
    config, where = checkpoint.vae, checkpoint.folder / "vae" / "config.json"
    for field, channels in (("latent_channels", LATENT_CHANNELS), ("out_channels", 3)):
        if config.get(field, channels) != channels:
            raise _unexpected(where, config, field, f"{channels} in an SDXL VAE")
    if config.get("_class_name") == "AutoencoderTiny":
        _require_counts(where, config, "decoder_block_out_channels", TAESDXL)
    else:
        _require_counts(where, config, "block_out_channels", CONFIGS["vae"])


def _check_scheduler(checkpoint: Checkpoint) -> None:
    """The schedule is ours (shifted LCM); from the config come the betas and what the UNet predicts."""
    config, where = checkpoint.scheduler, checkpoint.folder / "scheduler" / "scheduler_config.json"
    prediction = config.get("prediction_type", "epsilon")
    if prediction != "epsilon":
        raise _unexpected(where, config, "prediction_type", "'epsilon', which NitroFusion checkpoints predict")
    for key in ("trained_betas", "rescale_betas_zero_snr", "clip_sample", "thresholding"):
        if config.get(key):
            raise _unexpected(where, config, key, "none: the shifted LCM schedule does not have it")


def _require_count(where: Path, config: dict[str, Any], field: str, of_sdxl: dict[str, Any]) -> None:
    if not _is_count(config.get(field)):
        raise _unexpected(where, config, field, f"a whole number ({of_sdxl[field]} in SDXL)")


def _require_counts(where: Path, config: dict[str, Any], field: str, of_sdxl: dict[str, Any]) -> None:
    found = config.get(field)
    if not isinstance(found, list) or not found or not all(map(_is_count, found)):
        raise _unexpected(where, config, field, f"a list of whole numbers ({of_sdxl[field]} in SDXL)")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _unexpected(where: Path, config: dict[str, Any], field: str, expected: str) -> ExportError:
    found = f"is {config[field]!r}" if field in config else "is missing"
    return ExportError(f"{where}: {field} {found}, expected {expected}")

"""A checkpoint folder being put together: a folder or a single file with its base, then another decoder, then LoRAs."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nitro_engines.assemble import Assembly, File, Link, Stream, Text, json_text
from nitro_engines.keys import Fields
from nitro_engines.places import hub_licence, require_safetensors, short_name
from nitro_rt.errors import ConfigError, ExportError, ModelNotFound

if TYPE_CHECKING:
    from nitro_engines.models import ModelSource
    from nitro_export.lazy import Tensors
    from nitro_export.lora import Lora

WEIGHT_FILE = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
    "text_encoder_2": "model.safetensors",
}
"""Of the parts with weights, what their file is called when it is written anew."""
DECODERS = ("AutoencoderKL", "AutoencoderTiny")
LATENT_CHANNELS = 4
UNKNOWN = "unknown"


@dataclass(kw_only=True)
class Draft:
    """The files of a checkpoint folder, and what is known about it."""

    name: str
    """Of what is built: the model's, then the decoder's and the LoRAs'."""
    model: str
    """The model's alone."""
    origin: str
    shift: int | None
    licences: dict[str, str]
    """Part, in words -> its licence."""
    files: dict[str, File] = field(default_factory=dict)
    changed: set[str] = field(default_factory=set)
    """Parts that are no longer those of the folder."""
    loras: list[tuple[Lora, float]] = field(default_factory=list)
    """With their scales; added in float32 all at once, so that the stored type rounds once."""

    @classmethod
    def of_folder(cls, source: ModelSource) -> Draft:
        """A checkpoint folder as it is. Raises: ModelNotFound, ExportError as `read_checkpoint`."""
        from nitro_export import read_checkpoint

        run = read_checkpoint(source.checkpoint).run
        draft = cls(
            name=source.name,
            model=source.name,
            origin=source.origin,
            shift=run.get("shifted_timestep", source.shift),
            licences={source.origin: source.licence or str(run.get("licence") or UNKNOWN)},
        )
        draft._take(source.checkpoint, WEIGHT_FILE)
        return draft

    @classmethod
    def of_unet(
        cls, path: Path, base: ModelSource, *, name: str, shift: int | None = None, licence: str | None = None
    ) -> Draft:
        """A single file, and from `base` what it lacks: at least the tokenizers.

        Args:
            shift, licence: None means what the file's metadata say.
        Raises: ConfigError if the file is no SDXL checkpoint; ModelNotFound if the base lacks something; ExportError.
        """
        from nitro_export.lazy import metadata_of
        from nitro_export.single_file import diffusers_tensors, parts_of_file

        parts = parts_of_file(path)
        if "unet" not in parts:
            raise ConfigError(f"--model {path} holds no UNet, only {', '.join(parts)}; a VAE alone is for --decoder")
        metadata = metadata_of(path)
        draft = cls(
            name=name,
            model=name,
            origin=f"{path.name} on {base.origin}",
            shift=_shift_of(metadata) if shift is None else shift,
            licences={path.name: licence or _licence_of(metadata), f"base {base.origin}": _licence_of_folder(base)},
        )
        draft._take(base.checkpoint, [part for part in WEIGHT_FILE if part not in parts])
        for part, tensors in parts.items():
            config = _config(base.checkpoint, part)
            if part == "vae":
                draft._set_vae_config(config)
            else:
                draft.files[f"{part}/config.json"] = json_text(config)
            converted = diffusers_tensors(part, tensors, config, f"--model {path}")
            # A UNet alone that has diffusers' names needs no new file.
            as_it_is = len(parts) == 1 and all(name == tensor.key for name, tensor in converted.items())
            draft._set_weights(part, Link(path=path) if as_it_is else Stream(tensors=converted, made_from=(path,)))
        return draft

    @property
    def licence(self) -> str:
        """All of them: what is made of several works is under the terms of each."""
        return " and ".join(dict.fromkeys(self.licences.values()))

    @property
    def notes(self) -> tuple[str, ...]:
        return tuple(f"{what}, licence {licence}" for what, licence in self.licences.items())

    def require_own_kl_decoder(self) -> None:
        """Raises: ConfigError if the checkpoint's VAE is no AutoencoderKL."""
        kind = self._json("vae/config.json").get("_class_name")
        if kind != "AutoencoderKL":
            raise ConfigError(
                f"--decoder kl: the VAE of {self.origin} is an {kind}; leave --decoder out, or say --decoder PATH"
            )

    def require_sdxl_latents(self, option: str) -> None:
        """Raises: ConfigError if the checkpoint has another latent space than SDXL, as far as its VAE's config tells."""
        from nitro_export.sdxl import SCALING_FACTOR

        config = self._json("vae/config.json")
        if config.get("_class_name") != "AutoencoderKL" or config.get("scaling_factor") != SCALING_FACTOR:
            raise ConfigError(
                f"{option} is for SDXL's latents (AutoencoderKL, scaling_factor {SCALING_FACTOR}); the VAE of {self.origin} is "
                f"an {config.get('_class_name')} with {config.get('scaling_factor')}; leave --decoder out, or name a PATH"
            )

    def replace_decoder(self, path: Path, option: str, *, licence: str | None = None, origin: str | None = None) -> None:
        """Put a diffusers VAE in the place of the checkpoint's own.

        Raises: ModelNotFound if it is not there; ConfigError if it is no AutoencoderKL or AutoencoderTiny, or has other
            latents; ExportError if it is damaged.
        """
        from nitro_export.checkpoint import part_files

        if not path.exists():
            raise ModelNotFound(
                f"{option} {path}: there is no such file or folder; a decoder is kl (the checkpoint's own), tiny, a folder "
                "with a diffusers VAE, or a .safetensors file of one"
            )
        own = self._json("vae/config.json")
        if path.is_dir():
            config = _read_json(
                path / "config.json", f"{option}: {path} holds no config.json, so it is no diffusers VAE folder"
            )
            files: dict[str, File] = {file.name: Link(path=file) for file in part_files(path, "vae")}
        else:
            config, weights = _single_decoder(path, option, own)
            files = {WEIGHT_FILE["vae"]: weights}
        kind, channels = config.get("_class_name"), config.get("latent_channels", LATENT_CHANNELS)
        if kind not in DECODERS:
            raise ConfigError(f"{option}: {path} is a {kind}, a decoder is one of {', '.join(DECODERS)}")
        if channels != LATENT_CHANNELS:
            raise ConfigError(f"{option}: {path} decodes {channels} latent channels, SDXL's UNet gives {LATENT_CHANNELS}")
        if _pixels_per_latent(config) != _pixels_per_latent(own):
            raise ConfigError(
                f"{option}: {path} makes {_pixels_per_latent(config)} pixels of a latent (along a side), the checkpoint's own "
                f"VAE {_pixels_per_latent(own)}"
            )
        self.files = {name: file for name, file in self.files.items() if not name.startswith("vae/")}
        self.files |= {f"vae/{name}": file for name, file in files.items()}
        self._set_vae_config(config)
        self.changed.add("vae")
        name = origin or path.absolute().name
        self.name, self.origin = f"{self.name}-{short_name(name)}", f"{self.origin}, decoder {name}"
        self.licences[f"decoder {name}"] = licence or _licence_of_decoder(path)

    def add_lora(self, path: Path, scale: float) -> None:
        """Fuse a LoRA into the UNet and the text encoders.

        Raises: ConfigError if it is no LoRA or for another base; ExportError if it is damaged.
        """
        require_safetensors(path, "--lora")
        from nitro_export.lora import read_lora, require_fit

        lora = read_lora(path, int(self._json("unet/config.json").get("layers_per_block") or 0))
        require_fit(lora, {part: self._tensors(part) for part in lora.layers})
        self.loras.append((lora, scale))
        self.changed |= set(lora.layers)
        if self.shift is None:
            self.shift = _shift_of(lora.metadata)
        self.name, self.origin = f"{self.name}-{short_name(path.name)}", f"{self.origin}, LoRA {path.name} x {scale:g}"
        self.licences[f"LoRA {path.name} x {scale:g}"] = _licence_of(lora.metadata)

    def assembly(self) -> Assembly:
        """The finished folder, its parts checked against each other.

        Raises: ExportError, ModelNotFound if they do not belong together.
        """
        files = dict(self.files)
        for part in sorted({part for lora, _ in self.loras for part in lora.layers}):
            files = {name: file for name, file in files.items() if name not in self._weights(part)}
            files[f"{part}/{WEIGHT_FILE[part]}"] = self._fused(part)
        run: Fields = {"name": self.model, "licence": self.licence, "shifted_timestep": self.shift}
        if self.shift is None:
            del run["shifted_timestep"]
        assembly = Assembly(files=files, run=run, what=self.origin)
        assembly.check(sorted(self.changed))
        return assembly

    def _fused(self, part: str) -> Stream:
        from nitro_export.lora import fused

        loras = [(lora, scale) for lora, scale in self.loras if part in lora.layers]
        sources: list[Path] = []
        for file in self._weights(part).values():
            sources += file.made_from if isinstance(file, Stream) else [file.path]
        return Stream(
            tensors=fused(part, self._tensors(part), loras),
            made_from=tuple(sources),
            loras=tuple((lora.path, scale) for lora, scale in loras),
        )

    def _take(self, folder: Path, parts: Iterable[str]) -> None:
        """Link a checkpoint's common files and these parts of it. Raises: ModelNotFound, ExportError if one is not there."""
        from nitro_export.checkpoint import TOKENIZER_FILES, check_tokenizer, part_files
        from nitro_export.sdxl import CONFIGS, MODEL_INDEX

        index, scheduler = folder / "model_index.json", folder / "scheduler" / "scheduler_config.json"
        self.files["model_index.json"] = Link(path=index) if index.is_file() else json_text(MODEL_INDEX)
        self.files["scheduler/scheduler_config.json"] = (
            Link(path=scheduler) if scheduler.is_file() else json_text(CONFIGS["scheduler"])
        )
        for part in ("tokenizer", "tokenizer_2"):
            found = [name for name in TOKENIZER_FILES if (folder / part / name).is_file()]
            if not found:
                raise ModelNotFound(f"{folder} has no {part}, which the checkpoint needs; name a base that has both tokenizers")
            check_tokenizer(folder / part)
            self.files |= {f"{part}/{name}": Link(path=folder / part / name) for name in found}
        for part in parts:
            for path in (folder / part / "config.json", *part_files(folder / part, part)):
                if not path.is_file():
                    raise ModelNotFound(f"{path} is missing; fetch the checkpoint again")
                self.files[f"{part}/{path.name}"] = Link(path=path)

    def _set_weights(self, part: str, file: Link | Stream) -> None:
        self.files[f"{part}/{WEIGHT_FILE[part]}"] = file
        self.changed.add(part)

    def _set_vae_config(self, config: Mapping[str, Any]) -> None:
        self.files["vae/config.json"] = json_text(config)
        index = self._json("model_index.json")
        self.files["model_index.json"] = json_text({**index, "vae": ["diffusers", config["_class_name"]]})

    def _weights(self, part: str) -> dict[str, Link | Stream]:
        """The part's weight files, with the index of shards, by their names in the folder."""
        return {
            name: file
            for name, file in self.files.items()
            if name.startswith(f"{part}/") and name != f"{part}/config.json" and not isinstance(file, Text)
        }

    def _tensors(self, part: str) -> Tensors:
        from nitro_export.lazy import lazy_tensors

        streams = [file for file in self._weights(part).values() if isinstance(file, Stream)]
        if streams:
            return streams[0].tensors
        links = [file.path for file in self._weights(part).values() if isinstance(file, Link)]
        return lazy_tensors(path for path in links if path.suffix == ".safetensors")

    def _json(self, name: str) -> dict[str, Any]:
        file = self.files[name]
        if isinstance(file, Text):
            return dict(json.loads(file.text))
        assert isinstance(file, Link)
        return _read_json(file.path, f"{file.path} is missing")


def _config(base: Path, part: str) -> dict[str, Any]:
    """The part's config: the base's, or SDXL's own where the base has none (or another kind of decoder)."""
    from nitro_export.sdxl import CONFIGS

    path = base / part / "config.json"
    found = _read_json(path, "") if path.is_file() else CONFIGS[part]
    return CONFIGS[part] if part == "vae" and found.get("_class_name") != "AutoencoderKL" else found


def _single_decoder(path: Path, option: str, own: Mapping[str, Any]) -> tuple[dict[str, Any], Link | Stream]:
    """Config and weights of an autoencoder in one file: the config is TAESDXL's, or that of the checkpoint's own VAE."""
    require_safetensors(path, option)
    from nitro_export.sdxl import CONFIGS, TAESDXL
    from nitro_export.single_file import diffusers_tensors, parts_of_file

    parts = parts_of_file(path)
    if "vae" not in parts:
        raise ConfigError(f"{option}: {path} holds no VAE, only {', '.join(parts)}")
    tensors = parts["vae"]
    kl = dict(own) if own.get("_class_name") == "AutoencoderKL" else CONFIGS["vae"]
    config = TAESDXL if any(key.startswith("decoder.layers.") for key in tensors) else kl
    for key, tensor in tensors.items():
        if key.endswith(("decoder.conv_in.weight", "decoder.layers.0.weight")):
            config = {**config, "latent_channels": tensor.shape[1]}
    converted = diffusers_tensors("vae", tensors, config, f"{option}: {path}")
    as_it_is = len(parts) == 1 and all(name == tensor.key for name, tensor in converted.items())
    return config, Link(path=path.absolute()) if as_it_is else Stream(tensors=converted, made_from=(path.absolute(),))


def _pixels_per_latent(config: Mapping[str, Any]) -> int:
    blocks = config.get("decoder_block_out_channels") or config.get("block_out_channels") or ()
    return int(2 ** (len(blocks) - 1)) if blocks else 0


def _read_json(path: Path, missing: str) -> dict[str, Any]:
    if not path.is_file():
        raise ModelNotFound(missing)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as exc:
        raise ExportError(f"{path} is not valid JSON: {exc}; fetch it again") from exc
    if not isinstance(data, dict):
        raise ExportError(f"{path} holds a {type(data).__name__}, not an object; fetch it again")
    return data


def _shift_of(metadata: Mapping[str, str]) -> int | None:
    """What `nitro-rt transfer` and `extract-lora` write into a file's metadata."""
    found = metadata.get("shifted_timestep", "")
    return int(found) if found.isdecimal() else None


def _licence_of(metadata: Mapping[str, str]) -> str:
    """By ModelSpec's key, ours, or the works that our own tools made the file of."""
    for key in ("modelspec.license", "licence", "license"):
        if metadata.get(key):
            return metadata[key]
    for key in ("transfer", "provenance"):
        with contextlib.suppress(ValueError):
            roles = json.loads(metadata.get(key, "{}")).values()
            if works := [str(role["licence"]) for role in roles if isinstance(role, dict) and "licence" in role]:
                return " and ".join(dict.fromkeys(works))
    return UNKNOWN


def _licence_of_folder(source: ModelSource) -> str:
    path = source.checkpoint / "run.json"
    told = _read_json(path, "").get("licence") if path.is_file() else None
    return source.licence or str(told or hub_licence(source.checkpoint) or UNKNOWN)


def _licence_of_decoder(path: Path) -> str:
    from nitro_export.lazy import metadata_of

    return hub_licence(path) or UNKNOWN if path.is_dir() else _licence_of(metadata_of(path))

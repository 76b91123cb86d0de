"""From what --model, --base, --decoder and --lora say to one checkpoint folder on this machine. No network is used."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import nitro_rt
from nitro_engines.assemble import Assembly
from nitro_engines.cache import EngineCache
from nitro_engines.draft import Draft
from nitro_engines.files import Report, silent
from nitro_engines.places import (
    HUB_ID,
    PICKLES,
    by_hand,
    fetched,
    hub_cache,
    hub_file,
    hub_folder,
    hub_licence,
    hub_snapshot,
    models_root,
    require_safetensors,
    short_name,
)
from nitro_rt.errors import ConfigError, ModelNotFound

DEFAULT_MODEL = "nitro-emoji"
SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
SDXL_LICENCE = "openrail++"
FETCH_SDXL = (
    f"`hf download {SDXL} --include '*.json' --include '*/merges.txt' --include 'text_encoder*/model.fp16.safetensors' "
    "--include 'vae/diffusion_pytorch_model.fp16.safetensors'`"
)
"""Without the UNet, which is another's."""
TAESDXL = "madebyollin/taesdxl"
FETCH_TAESDXL = f"`hf download {TAESDXL} config.json diffusion_pytorch_model.safetensors`"
TAESDXL_LICENCE = "MIT"
_WEIGHT_SUFFIXES = (".safetensors", ".gguf", *PICKLES)


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """A checkpoint on this machine, or the parts that one is assembled of when it is needed."""

    name: str
    checkpoint: Path
    """The folder; an assembled one is there after `assemble`."""
    origin: str
    """What --model was, without paths of this machine."""
    licence: str | None = None
    """None: the checkpoint's run.json says it."""
    shift: int | None = None
    """None: the checkpoint's run.json says it."""
    notes: tuple[str, ...] = ()
    """The parts and their licences, a line each; empty for a folder taken as it is."""
    assembly: Assembly | None = None

    @contextmanager
    def opened(self) -> Iterator[Path]:
        """A folder with this checkpoint's true configs and weight headers: the checkpoint itself, or an outline of it."""
        if self.assembly is None:
            yield self.checkpoint
            return
        with self.assembly.outline() as folder:
            yield folder

    def key(self) -> str:
        """Digest over everything that decides the checkpoint's bytes, known before it is assembled."""
        return self.assembly.key if self.assembly else self._checkpoint_sha256

    def known_sha256(self) -> str | None:
        """`nitro_export.checkpoint_sha256` of the folder; None while it is not assembled."""
        return self.assembly.known_sha256(EngineCache()) if self.assembly else self._checkpoint_sha256

    def new_bytes(self) -> int:
        """What `assemble` would write now."""
        return self.assembly.new_bytes(EngineCache()) if self.assembly else 0

    def assemble(self, report: Report = silent) -> Path:
        """The checkpoint's folder, made now if it does not exist. Raises: BuildError, ExportError as `Assembly.assemble`."""
        return self.assembly.assemble(EngineCache(), report) if self.assembly else self.checkpoint

    @cached_property
    def _checkpoint_sha256(self) -> str:
        from nitro_export import checkpoint_sha256

        return checkpoint_sha256(self.checkpoint)


@dataclass(frozen=True, kw_only=True)
class LoraRequest:
    """One --lora."""

    path: Path
    scale: float


@dataclass(frozen=True, kw_only=True)
class _Preset:
    shift: int
    licence: str
    repository: str
    unet: str


_PRESETS = {
    name: _Preset(shift=shift, licence=licence, repository="ChenDY/NitroFusion", unet=f"{name}_unet.safetensors")
    for name, shift, licence in (("nitrosd-realism", 250, "CC-BY-NC-SA-4.0"), ("nitrosd-vibrant", 500, "openrail++"))
}


def resolve_model(model: str, *, base: str | None = None, decoder: str | None = None, loras: Sequence[str] = ()) -> ModelSource:
    """The checkpoint that the options mean.

    Args:
        model: `nitro-emoji` (shipped), `nitrosd-realism` or `nitrosd-vibrant`, a checkpoint folder, a hub id (`owner/name`)
            that the hub's own cache holds, or a .safetensors file: a UNet alone or a whole checkpoint as ComfyUI saves it.
            A name wins over a folder of that name: write `./name`.
        base: folder or hub id of the checkpoint that a single file lacks the other parts of; for a preset, instead of the
            SDXL base in the hub's cache.
        decoder: `kl` (the checkpoint's own VAE), `tiny` (TAESDXL), or a diffusers VAE as a folder or .safetensors file.
        loras: `FILE` or `FILE:SCALE`, fused in this order.
    Returns: a folder as it is where nothing is added to it (`nitro_export.read_checkpoint` checks what it holds); otherwise
        the parts, checked against each other by their configs and headers, and their key.
    Raises: ModelNotFound saying what is missing, how to fetch it and where it goes; ConfigError for options that do not
        fit together, files of a wrong kind, and LoRAs for another base; ExportError for a damaged or wrong checkpoint.
    """
    requests = tuple(map(parse_lora, loras))
    found = _from_file(model, base) if _is_weight_file(model) else _from_name(model, base)
    if isinstance(found, Draft):
        draft = found
    elif decoder is None and not requests:
        return found
    else:
        draft = Draft.of_folder(found)
    if decoder is not None:
        _choose_decoder(draft, decoder)
    for request in requests:
        draft.add_lora(request.path, request.scale)
    if isinstance(found, ModelSource) and not draft.changed:
        return found
    assembly = draft.assembly()
    return ModelSource(
        name=draft.name,
        checkpoint=assembly.folder(EngineCache()),
        origin=draft.origin,
        licence=draft.licence,
        shift=draft.shift,
        notes=draft.notes,
        assembly=assembly,
    )


def parse_lora(text: str) -> LoraRequest:
    """`FILE` or `FILE:SCALE`; a file whose name is all of `text` wins, since a path may hold colons.

    Raises: ModelNotFound if there is no such file; ConfigError if the scale is no finite number.
    """
    if Path(text).expanduser().is_file():
        return LoraRequest(path=Path(text).expanduser().absolute(), scale=1.0)
    name, colon, number = text.rpartition(":")
    path = Path(name if colon else text).expanduser()
    if not colon or not path.is_file():
        wanted = path if _is_number(number) else Path(text)
        raise ModelNotFound(f"--lora {text}: there is no file {wanted}; say --lora FILE or --lora FILE:SCALE")
    if not _is_number(number):
        raise ConfigError(f"--lora {text}: the scale {number!r} is no number; say --lora {path}:0.8")
    scale = float(number)
    if not math.isfinite(scale):
        raise ConfigError(f"--lora {text}: the scale is {scale}; it must be finite")
    return LoraRequest(path=path.absolute(), scale=scale)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _is_weight_file(model: str) -> bool:
    path = Path(model).expanduser()
    return path.is_file() or (path.suffix.lower() in _WEIGHT_SUFFIXES and not path.is_dir() and model not in _PRESETS)


def _from_name(model: str, base: str | None) -> ModelSource | Draft:
    if model in _PRESETS:
        return _preset(model, base)
    if base is not None:
        raise ConfigError(
            f"--base {base} has no use with --model {model}, which is a whole checkpoint; leave it out. It belongs to a single "
            f"file (--model FILE.safetensors) and to {', '.join(_PRESETS)}"
        )
    return _whole(model)


def _whole(model: str, option: str = "--model") -> ModelSource:
    """A checkpoint folder by name, path or hub id."""
    if model == DEFAULT_MODEL:
        return _shipped(model)
    path = Path(model).expanduser()
    if model and path.is_dir():  # an empty name would mean the working directory
        resolved = path.resolve()
        return ModelSource(name=short_name(resolved.name), checkpoint=resolved, origin=resolved.name)
    if HUB_ID.fullmatch(model):
        return _from_hub_cache(model, option)
    known = ", ".join((DEFAULT_MODEL, *_PRESETS))
    raise ModelNotFound(
        f"{option} {model!r}: it is no folder here and no known name; known: {known}, a folder, a hub id OWNER/NAME, "
        "a .safetensors file with --base"
    )


def _shipped(model: str) -> ModelSource:
    folder = Path(nitro_rt.__file__).parent / "models" / model
    if not folder.is_dir():
        raise ModelNotFound(
            f"the model {model!r} is not part of this installation ({folder} is missing); "
            "train it with `make emoji-model`, reinstall nitro-rt, or say --model FOLDER"
        )
    return ModelSource(name=model, checkpoint=folder, origin=model)


def _preset(model: str, base: str | None) -> ModelSource | Draft:
    preset = _PRESETS[model]
    folder = models_root() / model
    if base is None and folder.is_dir():
        return ModelSource(name=model, checkpoint=folder, origin=model, licence=preset.licence, shift=preset.shift)
    unet = hub_file(preset.repository, preset.unet)
    others = _whole(base, "--base") if base is not None else _sdxl_base()
    missing = []
    if unet is None:
        missing.append(
            f"{preset.unet} of {preset.repository}: `hf download {preset.repository} {preset.unet}`, "
            f"or put the file at {models_root() / preset.unet}"
        )
    if others is None:
        missing.append(f"the SDXL base: {FETCH_SDXL}, or put its folder at {by_hand(SDXL)}, or say --base FOLDER")
    if unet is None or others is None:
        raise ModelNotFound(
            f"--model {model}: not all of it is on this machine, and nitro-rt downloads nothing. Missing: "
            f"{'; and '.join(missing)}. Or put a whole diffusers folder at {folder}, or say --model FOLDER"
        )
    with fetched(SDXL, FETCH_SDXL) if base is None else nullcontext():
        draft = Draft.of_unet(unet, others, name=model, shift=preset.shift, licence=preset.licence)
    draft.origin = f"{model} on {others.origin}"
    return draft


def _sdxl_base() -> ModelSource | None:
    folder = hub_folder(SDXL)
    return ModelSource(name="sdxl-base", checkpoint=folder, origin=SDXL, licence=SDXL_LICENCE) if folder else None


def _from_file(model: str, base: str | None) -> Draft:
    path = Path(model).expanduser()
    require_safetensors(path, "--model")
    if base is None:
        raise ConfigError(
            f"--model {model} is a single file, which has no tokenizers and no configs: say --base FOLDER or --base HUB_ID, "
            f"the diffusers checkpoint that it belongs to. For SDXL that is {SDXL}; {FETCH_SDXL} fetches it"
        )
    if _is_weight_file(base) or base in _PRESETS:
        raise ConfigError(f"--base {base} must be a checkpoint folder in the diffusers layout, or a hub id of one")
    return Draft.of_unet(path.absolute(), _whole(base, "--base"), name=short_name(path.name))


def _from_hub_cache(model: str, option: str) -> ModelSource:
    folder = hub_snapshot(model)
    if folder is None:
        raise ModelNotFound(
            f"{option} {model}: neither a folder here nor in the hub cache {hub_cache()}, and nitro-rt downloads nothing; "
            f"fetch it with `hf download {model}`, or name a folder: {option} FOLDER"
        )
    if not (folder / "model_index.json").is_file() and (files := sorted(folder.glob("*.safetensors"))):
        raise ModelNotFound(
            f"{option} {model}: this repository holds no diffusers checkpoint but single files, such as {files[0].name}; "
            f"name one: --model {files[0]} --base {SDXL}"
        )
    return ModelSource(name=model.rpartition("/")[2], checkpoint=folder, origin=model, licence=hub_licence(folder))


def _choose_decoder(draft: Draft, decoder: str) -> None:
    if decoder == "kl":
        draft.require_own_kl_decoder()
        return
    if decoder != "tiny":
        draft.replace_decoder(Path(decoder).expanduser(), "--decoder")
        return
    draft.require_sdxl_latents("--decoder tiny")
    folder = hub_folder(TAESDXL)
    if folder is None:
        raise ModelNotFound(
            f"--decoder tiny: {TAESDXL} is not on this machine, and nitro-rt downloads nothing; fetch it with {FETCH_TAESDXL}, "
            f"or put the two files into {by_hand(TAESDXL)}, or name another: --decoder PATH"
        )
    with fetched(TAESDXL, FETCH_TAESDXL):
        draft.replace_decoder(folder, "--decoder tiny", licence=TAESDXL_LICENCE, origin=TAESDXL)

"""Pretrained weights from disk: the teacher, one-step weights, and the discriminator's backbone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.utils import is_peft_available
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from nitro_export.weights import UNetWeights, open_unet
from nitro_rt.errors import BackendUnavailable, ConfigError, ExportError, ModelNotFound, TrainingError
from nitro_rt.manifest import sha256_of
from nitro_training.model import LATENT_PX, TextEncoders
from nitro_training.samplers import SAMPLERS

BACKBONES = ("teacher", "base")
_ARCHITECTURE = (
    "in_channels", "out_channels", "down_block_types", "mid_block_type", "up_block_types", "block_out_channels",
    "layers_per_block", "transformer_layers_per_block", "attention_head_dim", "num_attention_heads", "cross_attention_dim",
    "norm_num_groups", "use_linear_projection", "addition_embed_type", "addition_time_embed_dim", "time_cond_proj_dim",
    "projection_class_embeddings_input_dim", "class_embed_type", "act_fn", "resnet_time_scale_shift",
)  # fmt: skip
"""What must be alike in two UNets whose weights are exchanged; some of it (heads, say) does not show in any shape."""


@dataclass(frozen=True, kw_only=True)
class TeacherSourceConfig:
    """The pretrained teacher, how it draws, and whether its results are cached."""

    checkpoint: str
    """Folder in the diffusers SDXL layout: text encoders, tokenizers, VAE and, unless `unet` says otherwise, the UNet.
    Relative to the working folder, as all paths here."""
    unet: str = ""
    """The teacher's UNet, where it is not the checkpoint's: a .safetensors file, or a folder."""
    lora: str = ""
    """A LoRA (.safetensors) that is fused into the UNet; empty for none."""
    lora_scale: float = 1.0
    sampler: str
    """One of `dpm-solver++`, `lcm` (DMD2), `ddim-trailing` (Hyper-SDXL)."""
    num_steps: int
    guidance: float
    """Weight of the conditional direction; 1 or 0 means none, at half the cost."""
    size_px: int = 0
    """Side of the pictures; 0 takes the UNet's own."""
    cache_samples: int = 0
    """Samples that are drawn once and read back from then on; 0 draws each as it is needed."""
    cache: str = ""
    """The cache's folder; empty puts it into the run's."""
    shard_size: int = 256
    """Samples in one file of the cache."""
    batch: int = 32
    """Samples that the teacher draws at once while it fills the cache."""
    seed: int = 61

    def __post_init__(self) -> None:
        if not self.checkpoint:
            raise ConfigError("teacher.checkpoint is empty; it needs a checkpoint folder in the diffusers SDXL layout")
        if self.sampler not in SAMPLERS:
            raise ConfigError(f"teacher.sampler is one of {', '.join(SAMPLERS)}, got {self.sampler!r}")
        if not 1 <= self.num_steps <= 1000:
            raise ConfigError(f"teacher.num_steps must be from 1 to 1000, got {self.num_steps}")
        if self.guidance < 0:
            raise ConfigError(f"teacher.guidance must not be negative, got {self.guidance}")
        if self.size_px < 0 or self.size_px % LATENT_PX:
            raise ConfigError(f"teacher.size_px must be a multiple of {LATENT_PX} (or 0, the UNet's own), got {self.size_px}")
        if self.cache_samples < 0 or self.shard_size < 1 or self.batch < 1:
            raise ConfigError("teacher.shard_size and teacher.batch must be at least 1, teacher.cache_samples at least 0")
        if self.cache and not self.cache_samples:
            raise ConfigError(f"teacher.cache names {self.cache}, but teacher.cache_samples is 0: nothing would be cached")
        if self.lora_scale != 1.0 and not self.lora:
            raise ConfigError(f"teacher.lora_scale is {self.lora_scale}, but teacher.lora names no file")


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """Whose encoder the discriminator looks through."""

    source: str = "teacher"
    """`teacher` (the paper's section 3.2), or `base`: the model before its own distillation, which knows every t*."""
    checkpoint: str = ""
    """The base model: a checkpoint or UNet folder, or a .safetensors UNet; empty takes the one in teacher.checkpoint."""

    def __post_init__(self) -> None:
        if self.source not in BACKBONES:
            raise ConfigError(f"backbone.source is one of {', '.join(BACKBONES)}, got {self.source!r}")
        if self.checkpoint and self.source != "base":
            raise ConfigError(
                f'backbone.checkpoint names {self.checkpoint}, but backbone.source is {self.source!r}, not "base"'
            )


@dataclass(frozen=True)
class Teacher:
    """A pretrained teacher in memory, frozen."""

    unet: UNet2DConditionModel
    text: TextEncoders
    vae: AutoencoderKL
    digests: dict[str, str]
    """SHA-256 of what it was loaded from: `unet`, `text_encoders`, `vae`, and `lora` where there is one."""
    checkpoint: Path

    def latents_side(self, size_px: int) -> int:
        """Side of the latents for pictures of `size_px`; 0 means the UNet's own size.

        Raises: ConfigError if the UNet cannot halve them as often as it does.
        """
        side = size_px // LATENT_PX or int(self.unet.config.sample_size)
        halvings = len(self.unet.config.block_out_channels) - 1
        if side % 2**halvings:
            raise ConfigError(
                f"teacher.size_px = {size_px} gives latents of {side}x{side}, which the UNet cannot halve {halvings} times; "
                f"use a multiple of {LATENT_PX * 2**halvings}"
            )
        return side


def load_teacher(config: TeacherSourceConfig, device: torch.device, dtype: torch.dtype) -> Teacher:
    """The teacher on `device`, with all weights in `dtype` whatever the files hold.

    Raises: ModelNotFound naming the file that is missing, ConfigError where parts do not fit together, TrainingError for
        damaged files, BackendUnavailable if a LoRA is asked for and peft is not installed.
    """
    folder = Path(config.checkpoint)
    if not (folder / "model_index.json").is_file():
        raise ModelNotFound(
            f"teacher.checkpoint: no checkpoint at {folder} (model_index.json is missing), looked for it from {Path.cwd()}; "
            "put one in the diffusers SDXL layout there (`make emoji-teacher` trains the small one)"
        )
    unet, unet_sha256 = _load_own_unet(folder, "teacher.checkpoint")
    if config.unet:
        unet, unet_sha256 = _load_like(Path(config.unet), unet, "teacher.unet")
    digests = {"unet": unet_sha256}
    if config.lora:
        digests["lora"] = f"{fuse_lora(unet, Path(config.lora), config.lora_scale)} x {config.lora_scale}"
    text = load_text_encoders(folder)
    vae = _load_part(AutoencoderKL, folder / "vae")
    digests["text_encoders"] = _digest(
        [folder / name for name in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")]
    )
    digests["vae"] = _digest([folder / "vae"])
    width = text.first.config.hidden_size + text.second.config.hidden_size
    if width != unet.config.cross_attention_dim:
        raise ConfigError(
            f"{folder}: the text encoders give embeddings of width {width}, the UNet takes {unet.config.cross_attention_dim}"
        )
    for module in (unet, vae, *text.modules().values()):
        nn.Module.to(module.requires_grad_(False).eval(), device, dtype)  # diffusers' own `to` warns at every dtype
    return Teacher(unet, text, vae, digests, folder)


def load_unet(path: str, like: UNet2DConditionModel, *, option: str = "student.init") -> UNet2DConditionModel:
    """A UNet of the architecture of `like`, on its device, in float32 whatever the file holds.

    Args:
        path: a .safetensors file, a UNet's folder, or a checkpoint's.
        option: what of the recipe named it, for the messages.
    Raises: ModelNotFound if it is missing, ConfigError naming the first tensors or options that differ, TrainingError if it
        is damaged.
    """
    unet, _ = _load_like(Path(path), like, option)
    return unet.eval().to(like.device)


def load_backbone_unet(config: BackboneConfig, teacher: Teacher) -> UNet2DConditionModel:
    """The UNet through whose encoder the discriminator looks; the teacher's own, not a copy, where it is the teacher.

    Raises: as `load_unet`; ConfigError if its encoder does not take the student's latents and prompts, or gives other
        features than its config says.
    """
    if config.source == "teacher":
        unet = teacher.unet
    else:
        path = Path(config.checkpoint) if config.checkpoint else teacher.checkpoint
        if path.is_dir():
            unet, _ = _load_own_unet(path, "backbone.checkpoint")
        else:
            unet, _ = _load_like(path, teacher.unet, "backbone.checkpoint")
        nn.Module.to(unet.requires_grad_(False).eval(), teacher.unet.device, teacher.unet.dtype)
    require_backbone(unet, teacher.unet)
    return unet


def require_backbone(unet: UNet2DConditionModel, student: UNet2DConditionModel) -> None:
    """Whether the discriminator can look through `unet` at what `student` draws.

    Raises: ConfigError if it takes other latents or prompts, or if its encoder does not give the features that its config
        promises: conv_in, each layer and each downsampler of each level, and the mid-block; ten in SDXL's topology.
    """
    for key in ("in_channels", "cross_attention_dim", "projection_class_embeddings_input_dim"):
        if unet.config[key] != student.config[key]:
            raise ConfigError(
                f"the discriminator's backbone has {key} {unet.config[key]}, the student {student.config[key]}; "
                "take the encoder of a model of the student's own kind"
            )
    levels, layers = len(unet.config.block_out_channels), unet.config.layers_per_block
    blocks = [(len(block.resnets), len(getattr(block, "downsamplers", None) or ())) for block in unet.down_blocks]
    found = [1, *(num + down for num, down in blocks), int(unet.mid_block is not None)]
    wanted = [1, *(layers + (level < levels - 1) for level in range(levels)), 1] if isinstance(layers, int) else []
    if found != wanted:
        raise ConfigError(
            f"the discriminator's backbone gives {sum(found)} features, by part {found}; its config (layers_per_block "
            f"{layers}, {levels} levels) promises {sum(wanted)}, by part {wanted}; it must be built as SDXL's encoder is"
        )


def load_text_encoders(folder: Path) -> TextEncoders:
    """Both text encoders of a checkpoint folder with their tokenizers, float32.

    Raises: ModelNotFound, ConfigError or TrainingError, naming the part.
    """
    first, second = _load_tokenizer(folder / "tokenizer"), _load_tokenizer(folder / "tokenizer_2")
    if first.model_max_length != second.model_max_length:
        raise ConfigError(
            f"{folder}: the tokenizers cut at {first.model_max_length} and {second.model_max_length} tokens; SDXL joins both "
            "encoders token by token, so the lengths must be equal"
        )
    shared = first.get_vocab() == second.get_vocab() and first.pad_token_id == second.pad_token_id
    return TextEncoders(
        first,
        _load_part(CLIPTextModel, folder / "text_encoder"),
        _load_part(CLIPTextModelWithProjection, folder / "text_encoder_2"),
        tokenizer_2=None if shared else second,
    )


def unet_digest(path: str) -> str:
    """SHA-256 of the weight file or files of a UNet, as `Teacher.digests` has it."""
    with _opened(Path(path)) as weights:
        return _digest(weights.files)


@contextmanager
def _opened(path: Path) -> Iterator[UNetWeights]:
    """`open_unet` for a run. Raises: TrainingError, as for every other damaged part."""
    try:
        with open_unet(path) as weights:
            yield weights
    except ExportError as exc:
        raise TrainingError(str(exc)) from exc


def fuse_lora(unet: UNet2DConditionModel, path: Path, scale: float) -> str:
    """Add a LoRA to a UNet's weights for good; returns the file's SHA-256.

    Args:
        path: in the names of diffusers, peft or kohya.
    Raises: ModelNotFound, TrainingError (damaged), BackendUnavailable (peft is missing), ConfigError if it changes anything
        but this UNet, or does not fit it.
    """
    _require_exists(path, "teacher.lora")
    if not is_peft_available():
        raise BackendUnavailable("teacher.lora needs peft, which is not installed; pip install 'nitro-rt[train]'")
    try:
        found, alphas = StableDiffusionXLPipeline.lora_state_dict(load_file(path), unet_config=unet.config)
    except (SafetensorError, OSError) as exc:
        raise TrainingError(f"teacher.lora: {path} is damaged or no safetensors file: {exc}; fetch it again") from exc
    except ValueError as exc:
        raise ConfigError(f"teacher.lora: {path} has no layout that diffusers knows: {exc}") from exc
    others = sorted(key for key in found if not key.startswith("unet."))
    if others or not found:
        raise ConfigError(
            f"teacher.lora: {path} changes {len(others)} tensors outside the UNet, first {others[0] if others else 'none'}; "
            "a LoRA of the UNet alone is needed"
        )
    with _lora_fits(path):
        unet.load_lora_adapter(found, prefix="unet", network_alphas=alphas)
    asked = sum(key.endswith(("lora_A.weight", "down.weight")) for key in found)
    adapted = sum(hasattr(module, "lora_A") for module in unet.modules())
    if adapted != asked:
        raise ConfigError(f"teacher.lora: {path} changes {asked} layers, of which the UNet has {adapted}")
    unet.fuse_lora(lora_scale=scale)
    unet.unload_lora()
    return sha256_of(path)


@contextmanager
def _lora_fits(path: Path) -> Any:
    try:
        yield
    except (RuntimeError, ValueError, KeyError) as exc:
        reason = str(exc).strip().splitlines()
        raise ConfigError(f"teacher.lora: {path} does not fit the UNet: {reason[-1].strip() if reason else exc!r}") from exc


def _load_own_unet(path: Path, option: str) -> tuple[UNet2DConditionModel, str]:
    """The UNet of a checkpoint's or its own folder as its config.json says, float32, and its digest."""
    return _load(path, _unet_config(path, option), option, "its own config.json")


def _load_like(path: Path, like: UNet2DConditionModel, option: str) -> tuple[UNet2DConditionModel, str]:
    _require_exists(path, option)
    if path.is_dir():
        _require_same_architecture(path, _unet_config(path, option), like, option)
    return _load(path, dict(like.config), option, "the checkpoint's UNet")


def _load(path: Path, config: dict[str, Any], option: str, model: str) -> tuple[UNet2DConditionModel, str]:
    try:
        with torch.device("meta"):  # no memory and no random weights for what is loaded next
            unet = UNet2DConditionModel.from_config(config)
    except (TypeError, ValueError) as exc:
        raise ConfigError(f"{option}: diffusers cannot build a UNet from the config.json at {path}: {exc}") from exc
    with _opened(path) as weights:
        _require_same_tensors(path, weights, unet, option, model)
        # copies: what is in memory must not follow the mapped file
        state = {key: weights.tensor(key).to(torch.float32, copy=True) for key in weights.specs}
        digest = _digest(weights.files)
    unet.load_state_dict(state, assign=True)
    return unet, digest


def _require_same_tensors(path: Path, weights: UNetWeights, unet: nn.Module, option: str, model: str) -> None:
    wanted = {key: tuple(value.shape) for key, value in unet.state_dict().items()}
    found = {key: spec.shape for key, spec in weights.specs.items()}
    differing = sorted(key for key in wanted.keys() | found.keys() if wanted.get(key) != found.get(key))
    if differing:
        first = "; ".join(f"{key} {_shape(found, key)}, wanted {_shape(wanted, key)}" for key in differing[:2])
        raise ConfigError(
            f"{option}: the UNet at {path} does not fit {model}: {len(differing)} tensors differ, first {first}; "
            "take weights of the same architecture"
        )


def _shape(shapes: Mapping[str, tuple[int, ...]], key: str) -> str:
    return str(list(shapes[key])) if key in shapes else "missing"


def _require_same_architecture(path: Path, config: dict[str, Any], like: UNet2DConditionModel, option: str) -> None:
    with torch.device("meta"):
        other = UNet2DConditionModel.from_config(config)
    for key in _ARCHITECTURE:
        found, wanted = _plain(other, key), _plain(like, key)
        if found != wanted:
            raise ConfigError(
                f"{option}: the UNet at {path} has {key} {found}, the checkpoint's UNet {wanted}; "
                "take weights of the same architecture"
            )


def _plain(unet: UNet2DConditionModel, key: str) -> Any:
    """An option written one way: diffusers takes one number for all levels, or a number for each."""
    value = unet.config[key]
    if key in ("layers_per_block", "transformer_layers_per_block", "attention_head_dim") and isinstance(value, int):
        return [value] * len(unet.config.block_out_channels)
    return list(value) if isinstance(value, tuple) else value


def _unet_config(path: Path, option: str) -> dict[str, Any]:
    folder = path / "unet" if (path / "unet").is_dir() else path
    _require_exists(folder / "config.json", option)
    return _read_config(folder)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise ModelNotFound(f"{path} is missing; fetch the checkpoint again, with all its parts") from exc
    except ValueError as exc:
        raise TrainingError(f"{path} is not valid JSON: {exc}; fetch the checkpoint again") from exc
    if not isinstance(config, dict):
        raise TrainingError(f"{path} holds a {type(config).__name__}, not an object; fetch the checkpoint again")
    return config


def _load_part(kind: Any, folder: Path) -> Any:
    """A text encoder or VAE, float32; every one of its tensors comes from the file."""
    config = _read_config(folder)
    named = config.get("_class_name") or (config.get("architectures") or [kind.__name__])[0]
    if named != kind.__name__:
        raise ConfigError(f"{folder} holds a {named}; a {kind.__name__} is needed")
    weights = _part_weights(folder)
    variant = "fp16" if ".fp16." in weights.name else None
    try:
        module, facts = kind.from_pretrained(
            folder, variant=variant, torch_dtype=torch.float32, use_safetensors=True, local_files_only=True,
            output_loading_info=True,
        )  # fmt: skip
    except (SafetensorError, OSError, RuntimeError, ValueError) as exc:
        raise TrainingError(f"{folder} cannot be loaded: {str(exc).splitlines()[0]}; fetch the checkpoint again") from exc
    if missing := sorted(facts["missing_keys"]):
        raise TrainingError(f"{weights} lacks {len(missing)} tensors, first {missing[0]}; fetch the checkpoint again")
    return module


def _part_weights(folder: Path) -> Path:
    """The weight file of a text encoder or VAE: what is there in full precision first."""
    for name in ("model.safetensors", "diffusion_pytorch_model.safetensors"):
        for path in (folder / name, folder / name.replace(".safetensors", ".fp16.safetensors")):
            if path.is_file():
                return path
    found = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) if folder.is_dir() else "no folder"
    raise ModelNotFound(f"{folder} has no weights in .safetensors; found: {found}; fetch the checkpoint again")


def _load_tokenizer(folder: Path) -> CLIPTokenizer:
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise ModelNotFound(f"{folder} has neither tokenizer.json nor vocab.json; fetch the checkpoint again")
    try:
        tokenizer = CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError) as exc:
        raise TrainingError(f"{folder} cannot be loaded: {str(exc).splitlines()[0]}; fetch the checkpoint again") from exc
    assert isinstance(tokenizer, CLIPTokenizer)
    return tokenizer


def _require_exists(path: Path, option: str) -> None:
    if not path.exists():
        raise ModelNotFound(
            f"{option}: there is nothing at {path}, looked for it from {Path.cwd()}; fetch the file from its authors and put "
            "it there, or name another place in the recipe"
        )


def _digest(paths: Any) -> str:
    """SHA-256 of one file, or of the names and digests of several; folders stand for the files that are loaded from them."""
    files = [file for path in paths for file in (_part_files(path) if path.is_dir() else [path])]
    if len(files) == 1:
        return sha256_of(files[0])
    return hashlib.sha256("".join(f"{file.parent.name}/{file.name} {sha256_of(file)}\n" for file in files).encode()).hexdigest()


def _part_files(folder: Path) -> list[Path]:
    if folder.name.startswith("tokenizer"):
        return sorted(path for path in folder.iterdir() if path.is_file())
    return [folder / "config.json", _part_weights(folder)]

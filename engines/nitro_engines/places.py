"""Where models lie on this machine: the hub's own cache, <cache>/models, and files that the user names. Nothing is fetched."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nitro_engines.cache import default_cache_root
from nitro_rt.errors import ConfigError, ModelNotFound

PICKLES = (".ckpt", ".bin", ".pt", ".pth", ".pkl")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def short_name(name: str) -> str:
    """The name of a folder, file or repository as a part of file names: `my model!` -> `my-model`."""
    stem = name.rpartition("/")[2].removesuffix(".safetensors")
    return re.sub(r"[^\w.]+", "-", stem).strip("-.") or "model"


def models_root() -> Path:
    """Where users put what the hub's cache does not hold, and where assembled checkpoints are."""
    return default_cache_root() / "models"


def hub_cache() -> Path:
    """The hub's cache folder, as huggingface_hub finds it."""
    home = Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser()
    return Path(os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser()


def hub_snapshot(repository: str) -> Path | None:
    """The folder of the repository's main revision; None if the cache does not hold it."""
    stored = hub_cache() / ("models--" + repository.replace("/", "--"))
    reference = stored / "refs" / "main"
    revision = reference.read_text(encoding="utf-8").strip() if reference.is_file() else ""
    folder = stored / "snapshots" / revision
    return folder if revision and folder.is_dir() else None


def hub_file(repository: str, name: str) -> Path | None:
    """A single file of a repository: in the hub's cache, or put into <cache>/models by hand."""
    snapshot = hub_snapshot(repository)
    candidates = ([snapshot / name] if snapshot else []) + [models_root() / name]
    return next((path for path in candidates if path.is_file()), None)


def by_hand(repository: str) -> Path:
    """Where users put a repository's folder without the hub's cache."""
    return models_root() / repository.rpartition("/")[2]


def hub_folder(repository: str) -> Path | None:
    """A repository's folder: put into <cache>/models by hand, or in the hub's cache, which may hold a few of its files only."""
    folder = by_hand(repository)
    return folder if folder.is_dir() else hub_snapshot(repository)


@contextmanager
def fetched(repository: str, command: str) -> Iterator[None]:
    """For reading what `hub_folder` found: an error about a missing file also says where the file comes from.

    Args:
        command: fetches what is needed of the repository.
    """
    try:
        yield
    except ModelNotFound as exc:
        folder = by_hand(repository)
        mend = (
            f"complete {folder}, or remove it and fetch the files with {command}"
            if folder.is_dir()
            else f"fetch them with {command}, or put the whole folder at {folder}"
        )
        raise ModelNotFound(
            f"{exc}. Not all files of {repository} are on this machine, and nitro-rt downloads nothing; {mend}"
        ) from exc


def hub_licence(folder: Path) -> str | None:
    """What the model card in a snapshot says, `license: openrail++` in the YAML at its top."""
    card = folder / "README.md"
    top = card.read_text(encoding="utf-8", errors="replace").split("\n---", 1)[0] if card.is_file() else ""
    found = re.search(r"^license:[ \t]*[\"']?([^\s\"'#]+)", top, re.MULTILINE) if top.startswith("---") else None
    return found.group(1) if found else None


def require_safetensors(path: Path, option: str) -> None:
    """Raises: ModelNotFound if there is no file; ConfigError if it is a pickle, GGUF, or anything but safetensors."""
    suffix = path.suffix.lower()
    if suffix in PICKLES:
        raise ConfigError(
            f"{option} {path} is a pickle, which is not opened because it can run code. Convert it once, where you trust it: "
            f"""python -c "import sys, torch; from safetensors.torch import save_file; s = torch.load(sys.argv[1], """
            """map_location='cpu', weights_only=True); s = s.get('state_dict', s); """
            """save_file({k: v.contiguous() for k, v in s.items() if hasattr(v, 'contiguous')}, sys.argv[2])" """
            f"{path.name} {path.stem}.safetensors"
        )
    if suffix in (".gguf", ".ggml"):
        raise ConfigError(
            f"{option} {path} is quantised (GGUF); an engine is built from full weights: take the .safetensors file in fp16, "
            "bf16 or fp32, and let --precision int8 or fp8 quantise it"
        )
    if not path.is_file():
        raise ModelNotFound(f"{option} {path}: there is no such file")
    if suffix != ".safetensors":
        raise ConfigError(f"{option} {path} is no .safetensors file; weights are read from safetensors only")

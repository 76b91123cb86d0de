"""Checkpoint folders made of parts from several places: a base, a single-file UNet, another decoder, LoRAs.

    <cache>/models/<key>/       a diffusers folder like any other, plus assembly.json

What a part's files hold already is hard-linked; what changes is written anew, tensor by tensor. The key is a digest over
the contents of all parts and the scales of the LoRAs, so it is known without assembling, and paths have no share in it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nitro_engines.cache import EngineCache, touch
from nitro_engines.files import Report, free_mib, fsync, link_or_copy, silent, source_sha256, storage_errors, write_durably
from nitro_engines.keys import Fields, key_of
from nitro_rt.errors import BuildError, NitroError
from nitro_rt.manifest import sha256_of

if TYPE_CHECKING:
    from nitro_export.lazy import Tensors

RECORD = "assembly.json"


@dataclass(frozen=True, kw_only=True)
class Link:
    """A file taken over as it is."""

    path: Path


@dataclass(frozen=True, kw_only=True)
class Text:
    """A small file written by us."""

    text: str


@dataclass(frozen=True, kw_only=True)
class Stream:
    """A safetensors file written anew."""

    tensors: Tensors
    made_from: tuple[Path, ...]
    """The files whose contents decide the tensors."""
    loras: tuple[tuple[Path, float], ...] = ()
    """Fused into them, with their scales."""


File = Link | Text | Stream


@dataclass(kw_only=True)
class Assembly:
    """A checkpoint folder that may not exist yet."""

    files: Mapping[str, File]
    """Path in the folder -> what it is; run.json excepted."""
    run: Fields
    """run.json: name, licence, shifted_timestep."""
    what: str
    """For messages."""
    _whole: Path | None = field(default=None, init=False, repr=False, compare=False)
    """The folder, once this process has made it or compared its digest."""

    @cached_property
    def key(self) -> str:
        """Reads every part. Raises: ExportError if weights hold NaN or infinity."""
        return key_of({"code": _code_sha256(), "files": self._contents, "run": self.run})

    @cached_property
    def _contents(self) -> Fields:
        return {name: _content(file) for name, file in sorted(self.files.items())}

    def folder(self, cache: EngineCache) -> Path:
        return cache.root / "models" / self.key

    def known_sha256(self, cache: EngineCache) -> str | None:
        """`checkpoint_sha256` of the folder; None before it is assembled."""
        try:
            return str(json.loads((self.folder(cache) / RECORD).read_text(encoding="utf-8"))["checkpoint_sha256"])
        except (OSError, ValueError, KeyError):
            return None

    @contextmanager
    def outline(self) -> Iterator[Path]:
        """The folder as far as plans and checks read it: true configs, and weight files with headers but no values.

        Nothing is read but headers; the folder is gone afterwards. Errors raised inside name the parts, not the outline.
        """
        with tempfile.TemporaryDirectory(prefix="nitro-rt-outline-") as temporary:
            folder = Path(temporary) / "checkpoint"
            with storage_errors("outlining the checkpoint", folder):
                for name, file in {**self.files, "run.json": Text(text=json.dumps(self.run))}.items():
                    _write_outline(folder / name, file)
            try:
                yield folder
            except NitroError as exc:
                said = str(exc).replace(f"{folder}{os.sep}", f"{self.what}: ").replace(str(folder), self.what)
                raise type(exc)(said) from exc

    def check(self, parts: Sequence[str]) -> None:
        """Configs fit together, and these parts' weights are what their configs say.

        Raises: ExportError, ModelNotFound with the first ten names that are missing, unknown or of another shape.
        """
        from nitro_export import read_checkpoint
        from nitro_export.loading import empty_part

        with self.outline() as folder:
            checkpoint = read_checkpoint(folder)
            for part in parts:
                empty_part(checkpoint, part)

    def assemble(self, cache: EngineCache, report: Report = silent) -> Path:
        """Make the folder, unless it is there and undamaged. Killed at any moment, it is whole or absent.

        Raises: BuildError if it cannot be written or the disk is full; ExportError if a LoRA makes weights overflow.
        """
        folder = self.folder(cache)
        if self._whole == folder and folder.is_dir():
            touch(folder / RECORD)
            return folder
        with cache.making(f"model-{self.key}", f"the checkpoint {self.what}", report) as work:
            if folder.is_dir():
                if self._is_whole(folder, cache):
                    touch(folder / RECORD)
                    report(f"checkpoint {self.what} from the cache")
                    self._whole = folder
                    return folder
                report(f"the assembled checkpoint {self.key[:12]} is damaged and is assembled again")
                with storage_errors("removing a damaged checkpoint", folder):
                    shutil.rmtree(folder)
            new = work / "checkpoint"
            with storage_errors(f"assembling {self.what}", folder):
                self._require_room(work)
                self._write(new, report)
                folder.parent.mkdir(exist_ok=True)
                for path in new.rglob("*"):
                    if path.is_dir():
                        fsync(path)
                os.replace(new, folder)
                fsync(folder.parent)
        self._whole = folder
        return folder

    def _is_whole(self, folder: Path, cache: EngineCache) -> bool:
        from nitro_export import checkpoint_sha256

        with contextlib.suppress(NitroError, OSError):
            return checkpoint_sha256(folder) == self.known_sha256(cache)
        return False

    def new_bytes(self, cache: EngineCache) -> int:
        """What `assemble` would write now; links to the parts' own files take nothing."""
        folder = self.folder(cache)
        if folder.is_dir():
            return 0
        existing = next(path for path in folder.parents if path.exists())
        return self._bytes_on(existing.stat().st_dev)

    def _bytes_on(self, device: int) -> int:
        return sum(_new_bytes(file, device) for file in self.files.values())

    def _require_room(self, work: Path) -> None:
        num_bytes = self._bytes_on(work.stat().st_dev)
        if num_bytes >> 20 > free_mib(work):
            raise BuildError(
                f"assembling {self.what} writes {num_bytes >> 20} MiB, and {free_mib(work)} MiB are free at "
                f"{work.parent.parent}; free some space, or point NITRO_RT_CACHE at another disk"
            )

    def _write(self, folder: Path, report: Report) -> None:
        from nitro_export import checkpoint_sha256
        from nitro_export.lazy import write_lazy

        linked, copied = 0, []
        for name, file in self.files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(file, Stream):
                num_bytes = sum(tensor.num_bytes for tensor in file.tensors.values())
                report(f"writing {name}, {len(file.tensors)} tensors, {num_bytes >> 20} MiB{_with(file)}")
                write_lazy(path, file.tensors)
            elif isinstance(file, Text):
                write_durably(path, file.text)
            elif link_or_copy(file.path.resolve(), path):
                linked += 1
            else:
                copied.append(file.path)
        weights = {name: content for name, content in self._contents.items() if name.endswith(".safetensors")}
        write_durably(folder / "run.json", _json({**self.run, "weights": weights}))
        record = {"checkpoint_sha256": checkpoint_sha256(folder), "what": self.what}
        write_durably(folder / RECORD, _json(record))
        why = f"; {len(copied)} are copies: no hard links to {copied[0].parent}" if copied else ""
        report(f"checkpoint {self.what} assembled: {linked} files are hard links to the parts' own{why}")


def json_text(data: Mapping[str, Any]) -> Text:
    return Text(text=_json(data))


def _json(data: Mapping[str, Any]) -> str:
    return json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def _content(file: File) -> Any:
    """What decides a file's bytes, as JSON."""
    if isinstance(file, Text):
        return {"text": file.text}
    if isinstance(file, Link):
        return _sha256(file.path)
    return {
        "made_from": [_sha256(path) for path in file.made_from],
        "loras": [{"sha256": _sha256(path), "scale": scale} for path, scale in file.loras],
    }


def _sha256(path: Path) -> str:
    if path.suffix != ".safetensors":
        return sha256_of(path)
    from nitro_export.stored import sha256_of_finite

    return sha256_of_finite(path.resolve())


def _write_outline(path: Path, file: File) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(file, Text):
        path.write_text(file.text, encoding="utf-8")
    elif isinstance(file, Link):
        path.symlink_to(file.path.resolve())
    else:
        from nitro_export.lazy import write_outline

        write_outline(path, file.tensors)


def _new_bytes(file: File, device: int) -> int:
    if isinstance(file, Stream):
        return sum(tensor.num_bytes for tensor in file.tensors.values())
    if isinstance(file, Text):
        return len(file.text)
    facts = file.path.stat()
    return 0 if facts.st_dev == device else facts.st_size


def _with(file: Stream) -> str:
    return "".join(f", with {path.name} x {scale:g}" for path, scale in file.loras)


def _code_sha256() -> str:
    """Of what decides the bytes of an assembled folder."""
    import nitro_export

    modules = [Path(nitro_export.__file__).parent / name for name in ("lazy.py", "lora.py", "single_file.py", "sdxl.py")]
    return key_of({path.name: source_sha256(path) for path in (Path(__file__), *modules)})

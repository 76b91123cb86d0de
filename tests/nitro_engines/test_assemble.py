"""What becomes of an assembly when the disk fills, a build is killed, or a file is damaged."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import resource
import signal
from pathlib import Path

import pytest

from layouts import part_tensors, peft_lora
from nitro_engines import files
from nitro_engines.assemble import RECORD, Assembly
from nitro_engines.cache import EngineCache
from nitro_engines.models import ModelSource, resolve_model
from nitro_export import checkpoint_sha256
from nitro_rt.errors import BuildError

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_kl: Path) -> ModelSource:
    monkeypatch.setenv("NITRO_RT_CACHE", str(tmp_path / "cache"))
    return resolve_model(str(tiny_kl), loras=[str(peft_lora(tiny_kl, tmp_path / "l.safetensors"))])


def assembly_of(source: ModelSource) -> Assembly:
    assert source.assembly is not None
    return source.assembly


def again(source: ModelSource) -> ModelSource:
    """As another process would find it."""
    return dataclasses.replace(source, assembly=dataclasses.replace(assembly_of(source)))


def nothing_is_left(source: ModelSource) -> bool:
    cache = EngineCache()
    return not source.checkpoint.exists() and not any((cache.root / "work").iterdir())


def test_it_is_made_once(source: ModelSource) -> None:
    first = source.assemble()
    before = (first / UNET).stat()
    lines: list[str] = []
    assert source.assemble(lines.append) == first and lines == []  # it knows this one to be whole
    assert again(source).assemble(lines.append) == first
    assert lines == ["checkpoint tiny-kl, LoRA l.safetensors x 1 from the cache"]
    assert (first / UNET).stat().st_ino == before.st_ino
    run = json.loads((first / "run.json").read_text())
    assert run["weights"][UNET]["loras"][0]["scale"] == 1.0 and len(run["weights"][UNET]["made_from"][0]) == 64


def test_what_it_would_write_is_known_before(source: ModelSource) -> None:
    planned = source.new_bytes()
    folder = source.assemble()
    assert source.new_bytes() == 0
    written = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.stat().st_nlink == 1)
    assert planned == pytest.approx(written, rel=0.02) and planned > (folder / UNET).stat().st_size / 2


def test_a_damaged_folder_is_made_again(source: ModelSource) -> None:
    folder = source.assemble()
    whole = checkpoint_sha256(folder)
    with (folder / UNET).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x7f")
    lines: list[str] = []
    again(source).assemble(lines.append)
    assert checkpoint_sha256(folder) == whole and "is damaged and is assembled again" in lines[0]
    (folder / RECORD).unlink()
    again(source).assemble(lines.append)
    assert checkpoint_sha256(folder) == whole == source.known_sha256()


def test_a_disk_that_fills_half_way(source: ModelSource, monkeypatch: pytest.MonkeyPatch) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, before[1]))
    try:
        with pytest.raises(BuildError, match="assembling tiny-kl.*NITRO_RT_CACHE.*nothing was published"):
            source.assemble()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert nothing_is_left(source)
    source.assemble()


def test_a_disk_that_is_too_small_is_noticed_before(source: ModelSource, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nitro_engines.assemble.free_mib", lambda at: 4)
    with pytest.raises(BuildError, match="writes 5 MiB, and 4 MiB are free.*NITRO_RT_CACHE"):
        source.assemble()
    assert nothing_is_left(source)


def test_killed_half_way_it_is_made_by_the_next(source: ModelSource) -> None:
    child = os.fork()
    if child == 0:  # it dies as kill -9 would have it: no handler and no `finally` runs

        def die(line: str) -> None:
            if line.startswith("writing unet"):
                os.kill(os.getpid(), signal.SIGKILL)

        source.assemble(die)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert not source.checkpoint.exists() and any((EngineCache().root / "work").iterdir())
    source.assemble()
    assert source.known_sha256() == checkpoint_sha256(source.checkpoint)
    assert not any((EngineCache().root / "work").iterdir())


def test_without_hard_links_files_are_copied_and_it_is_said(
    source: ModelSource, tiny_kl: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(files.os, "link", refuse)
    lines: list[str] = []
    folder = source.assemble(lines.append)
    assert "0 files are hard links to the parts' own; 17 are copies: no hard links to" in lines[-1]
    assert part_tensors(folder, "vae").keys() == part_tensors(tiny_kl, "vae").keys()


def test_the_key_knows_contents_and_no_paths(source: ModelSource) -> None:
    assembly = assembly_of(source)
    assert str(source.checkpoint.parent) not in json.dumps(assembly._contents)
    assert len(assembly.key) == 64 and source.checkpoint.name == assembly.key


def test_the_outline_is_gone_afterwards(source: ModelSource) -> None:
    with source.opened() as folder:
        assert (folder / UNET).stat().st_size > 5_000_000 > 512 * (folder / UNET).stat().st_blocks
    assert not folder.exists()

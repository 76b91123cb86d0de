from __future__ import annotations

from pathlib import Path

import pytest

import nitro_rt
from nitro_engines.models import resolve_model
from nitro_rt.errors import ModelNotFound


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NITRO_RT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.chdir(tmp_path)


def test_a_folder(checkpoint: Path) -> None:
    source = resolve_model(str(checkpoint))
    assert (source.name, source.origin, source.checkpoint) == ("little", "little", checkpoint)
    assert resolve_model("./little") == source


def test_a_folders_name_becomes_part_of_file_names(checkpoint: Path) -> None:
    checkpoint.rename(checkpoint.with_name("my model!"))
    source = resolve_model("my model!")
    assert (source.name, source.origin) == ("my-model", "my model!")


def test_the_shipped_model(monkeypatch: pytest.MonkeyPatch, checkpoint: Path, tmp_path: Path) -> None:
    monkeypatch.setattr(nitro_rt, "__file__", str(tmp_path / "nitro_rt" / "__init__.py"))
    with pytest.raises(ModelNotFound, match="not part of this installation.*make emoji-model"):
        resolve_model("nitro-emoji")
    shipped = tmp_path / "nitro_rt" / "models" / "nitro-emoji"
    shipped.parent.mkdir(parents=True)
    checkpoint.rename(shipped)
    source = resolve_model("nitro-emoji")
    assert (source.name, source.origin, source.checkpoint) == ("nitro-emoji", "nitro-emoji", shipped)


@pytest.mark.parametrize(
    ("name", "shift", "licence"), [("nitrosd-realism", 250, "CC-BY-NC-SA-4.0"), ("nitrosd-vibrant", 500, "openrail++")]
)
def test_a_preset(checkpoint: Path, tmp_path: Path, name: str, shift: int, licence: str) -> None:
    with pytest.raises(ModelNotFound) as caught:
        resolve_model(name)
    for needed in (
        "downloads nothing",
        f"{name}_unet.safetensors",
        str(tmp_path / "cache" / "models" / name),
        "--model FOLDER",
    ):
        assert needed in str(caught.value)
    (tmp_path / "cache" / "models").mkdir(parents=True)
    checkpoint.rename(tmp_path / "cache" / "models" / name)
    source = resolve_model(name)
    assert (source.name, source.shift, source.licence) == (name, shift, licence)


def test_a_hub_id_is_looked_up_in_the_hubs_cache(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="hf download someone/little-model"):
        resolve_model("someone/little-model")
    stored = tmp_path / "hf" / "hub" / "models--someone--little-model"
    (stored / "refs").mkdir(parents=True)
    (stored / "refs" / "main").write_text("abc123")
    with pytest.raises(ModelNotFound, match="hf download"):
        resolve_model("someone/little-model")
    (stored / "snapshots").mkdir()
    checkpoint.rename(stored / "snapshots" / "abc123")
    source = resolve_model("someone/little-model")
    assert (source.name, source.origin) == ("little-model", "someone/little-model")
    assert source.checkpoint == stored / "snapshots" / "abc123"


@pytest.mark.parametrize("model", ["emoji", "", "../away", "/no/such/folder", "a/b/c", "nitro-emoji/"])
def test_an_unknown_model(model: str) -> None:
    with pytest.raises(ModelNotFound, match="known: nitro-emoji, nitrosd-realism, nitrosd-vibrant"):
        resolve_model(model)


def test_a_single_file(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelNotFound, match="from_single_file"):
        resolve_model("model.safetensors")

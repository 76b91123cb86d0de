from __future__ import annotations

from pathlib import Path

import pytest

import nitro_rt
from nitro_engines.models import LoraRequest, parse_lora, resolve_model
from nitro_rt.errors import ConfigError, ModelNotFound


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


PRESETS = [("nitrosd-realism", 250, "CC-BY-NC-SA-4.0"), ("nitrosd-vibrant", 500, "openrail++")]


@pytest.mark.parametrize(("name", "shift", "licence"), PRESETS)
def test_a_preset_as_a_whole_folder(checkpoint: Path, tmp_path: Path, name: str, shift: int, licence: str) -> None:
    (tmp_path / "cache" / "models").mkdir(parents=True)
    checkpoint.rename(tmp_path / "cache" / "models" / name)
    source = resolve_model(name)
    assert (source.name, source.shift, source.licence, source.assembly) == (name, shift, licence, None)


@pytest.mark.parametrize("name", [name for name, *_ in PRESETS])
def test_a_preset_names_what_is_missing_and_where_it_goes(checkpoint: Path, tmp_path: Path, name: str) -> None:
    models = tmp_path / "cache" / "models"
    unet, base, whole = models / f"{name}_unet.safetensors", models / "stable-diffusion-xl-base-1.0", models / name
    fetch_unet, fetch_base = (
        f"hf download ChenDY/NitroFusion {unet.name}",
        "hf download stabilityai/stable-diffusion-xl-base-1.0",
    )
    with pytest.raises(ModelNotFound) as caught:
        resolve_model(name)
    for needed in (
        "downloads nothing",
        fetch_unet,
        str(unet),
        fetch_base,
        str(base),
        str(whole),
        "--base FOLDER",
        "--model FOLDER",
    ):
        assert needed in str(caught.value)
    models.mkdir(parents=True)
    unet.touch()
    with pytest.raises(ModelNotFound) as caught:
        resolve_model(name)
    assert fetch_base in str(caught.value) and fetch_unet not in str(caught.value)
    unet.unlink()
    checkpoint.rename(base)
    with pytest.raises(ModelNotFound) as caught:
        resolve_model(name)
    assert fetch_unet in str(caught.value) and fetch_base not in str(caught.value)


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


def test_a_single_file_needs_its_base(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match="say --base FOLDER.*hf download stabilityai/stable-diffusion-xl-base-1.0"):
        resolve_model("model.safetensors")
    with pytest.raises(ConfigError, match="must be a checkpoint folder"):
        resolve_model("model.safetensors", base="model.safetensors")
    with pytest.raises(ModelNotFound, match="nowhere"):
        resolve_model("model.safetensors", base="nowhere")
    with pytest.raises(ModelNotFound, match="there is no such file"):
        resolve_model("other.safetensors", base="nowhere")


@pytest.mark.parametrize("model", ["nitro-emoji", "little", "someone/model"])
def test_a_base_is_refused_where_it_would_be_ignored(checkpoint: Path, model: str) -> None:
    with pytest.raises(ConfigError, match="--base little has no use with --model"):
        resolve_model(model, base="little")


@pytest.mark.parametrize("name", ["a.ckpt", "a.bin", "a.pt", "a.PTH"])
def test_a_pickle_is_refused_with_the_way_to_convert_it(tmp_path: Path, checkpoint: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x02")
    refused = "is a pickle.*can run code.*weights_only=True.*a.safetensors"
    with pytest.raises(ConfigError, match=refused):
        resolve_model(name, base="little")
    with pytest.raises(ConfigError, match=refused):
        resolve_model("little", decoder=name)
    with pytest.raises(ConfigError, match=refused):
        resolve_model("little", loras=[f"{name}:0.5"])


def test_other_weight_files_are_refused(tmp_path: Path, checkpoint: Path) -> None:
    for name, said in (("a.gguf", "is quantised.*--precision int8"), ("a.onnx", "no .safetensors file")):
        (tmp_path / name).write_bytes(b"GGUF")
        with pytest.raises(ConfigError, match=said):
            resolve_model(name, base="little")


def test_a_repository_of_single_files(tmp_path: Path) -> None:
    snapshot = stored_in_hub(tmp_path, "ChenDY/NitroFusion")
    (snapshot / "nitrosd-realism_unet.safetensors").touch()
    with pytest.raises(ModelNotFound, match="single files, such as nitrosd-realism_unet.safetensors.*--base"):
        resolve_model("ChenDY/NitroFusion")


def test_the_licence_of_a_hub_model(checkpoint: Path, tmp_path: Path) -> None:
    snapshot = stored_in_hub(tmp_path, "someone/little")
    snapshot.rmdir()
    checkpoint.rename(snapshot)
    assert resolve_model("someone/little").licence is None  # run.json says it
    (snapshot / "README.md").write_text("---\ntags: [x]\nlicense: openrail++\n---\nlicense: none\n")
    assert resolve_model("someone/little").licence == "openrail++"


def stored_in_hub(tmp_path: Path, repository: str) -> Path:
    stored = tmp_path / "hf" / "hub" / f"models--{repository.replace('/', '--')}"
    (stored / "refs").mkdir(parents=True)
    (stored / "refs" / "main").write_text("abc123\n")
    (stored / "snapshots" / "abc123").mkdir(parents=True)
    return stored / "snapshots" / "abc123"


@pytest.mark.parametrize(
    ("text", "path", "scale"),
    [
        ("a.safetensors", "a.safetensors", 1.0),
        ("a.safetensors:0.8", "a.safetensors", 0.8),
        ("a.safetensors:-1e-1", "a.safetensors", -0.1),
        ("b:0.5", "b:0.5", 1.0),
        ("b:0.5:0.25", "b:0.5", 0.25),
        ("x:y/c.safetensors", "x:y/c.safetensors", 1.0),
        ("x:y/c.safetensors:2", "x:y/c.safetensors", 2.0),
    ],
)
def test_a_lora_and_its_scale(tmp_path: Path, text: str, path: str, scale: float) -> None:
    (tmp_path / "x:y").mkdir()
    for name in ("a.safetensors", "b:0.5", "x:y/c.safetensors"):
        (tmp_path / name).touch()
    assert parse_lora(text) == LoraRequest(path=tmp_path / path, scale=scale)


@pytest.mark.parametrize(
    ("text", "kind", "said"),
    [
        ("a.safetensors:strong", ConfigError, "'strong' is no number; say --lora a.safetensors:0.8"),
        ("a.safetensors:", ConfigError, "'' is no number"),
        ("a.safetensors:nan", ConfigError, "the scale is nan; it must be finite"),
        ("a.safetensors:-inf", ConfigError, "finite"),
        ("away.safetensors:0.5", ModelNotFound, "there is no file away.safetensors;"),
        ("away.safetensors", ModelNotFound, "there is no file away.safetensors;"),
        ("x:y/away", ModelNotFound, "there is no file x:y/away;"),
        ("", ModelNotFound, "--lora FILE or --lora FILE:SCALE"),
    ],
)
def test_a_lora_that_cannot_be_meant(tmp_path: Path, text: str, kind: type[Exception], said: str) -> None:
    (tmp_path / "a.safetensors").touch()
    with pytest.raises(kind, match=said):
        resolve_model("little", loras=[text])

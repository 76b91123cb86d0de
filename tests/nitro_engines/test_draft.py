"""Every kind of --model, --decoder and --lora on a tiny checkpoint, down to the assembled folder's tensors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderTiny
from safetensors.torch import load_file, save_file

from checkpoints import make_tiny_sdxl
from layouts import PARTS, comfyui_file, kohya_lora, lora_matrices, original_unet_name, part_tensors, peft_lora
from nitro_engines.models import resolve_model
from nitro_export import checkpoint_sha256, read_checkpoint
from nitro_export.sdxl import TAESDXL
from nitro_rt.errors import ConfigError, ExportError, ModelNotFound

VAE_FILE = "vae/diffusion_pytorch_model.safetensors"


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NITRO_RT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def unet_file(tiny_kl: Path, tmp_path: Path) -> Path:
    """As NitroSD is published, here in the original UNet's names."""
    path = tmp_path / "some_unet.safetensors"
    save_file({original_unet_name(name): tensor for name, tensor in part_tensors(tiny_kl, "unet").items()}, path)
    return path


@pytest.fixture(scope="module")
def taesdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("decoders") / "taesdxl"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        AutoencoderTiny(**{key: value for key, value in TAESDXL.items() if not key.startswith("_")}).save_pretrained(folder)
    return folder


def require_weights_of(checkpoint: Path, assembled: Path, parts: tuple[str, ...] = PARTS) -> None:
    for part in parts:
        found, wanted = part_tensors(assembled, part), part_tensors(checkpoint, part)
        names = {name.removeprefix("text_model."): tensor for name, tensor in wanted.items()}
        assert {name.removeprefix("text_model.") for name in found} == names.keys()
        for name, tensor in found.items():
            assert torch.equal(tensor, names[name.removeprefix("text_model.")]), (part, name)


def run_of(folder: Path) -> dict[str, object]:
    return dict(json.loads((folder / "run.json").read_text()))


def test_a_unet_alone_with_its_base(tiny_kl: Path, unet_file: Path) -> None:
    source = resolve_model(unet_file.name, base=str(tiny_kl))
    assert (source.name, source.origin, source.shift) == ("some_unet", "some_unet.safetensors on tiny-kl", None)
    assert source.licence == "unknown and CC0-1.0"
    assert source.notes == ("some_unet.safetensors, licence unknown", "base tiny-kl, licence CC0-1.0")
    lines: list[str] = []
    folder = source.assemble(lines.append)
    assert folder == source.checkpoint
    require_weights_of(tiny_kl, folder)
    read_checkpoint(folder)
    assert run_of(folder)["licence"] == source.licence and "shifted_timestep" not in run_of(folder)
    assert (folder / "vae" / "diffusion_pytorch_model.safetensors").samefile(
        tiny_kl / "vae" / "diffusion_pytorch_model.safetensors"
    )
    assert any("writing unet/diffusion_pytorch_model.safetensors, 620 tensors" in line for line in lines)
    assert any("18 files are hard links" in line for line in lines)


def test_a_unet_with_diffusers_names_is_linked(tiny_kl: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(tiny_kl / "unet" / "diffusion_pytorch_model.safetensors", tmp_path / "u.safetensors"))
    folder = resolve_model("u.safetensors", base=str(tiny_kl)).assemble()
    assert (folder / "unet" / "diffusion_pytorch_model.safetensors").samefile(path)


def test_the_files_metadata_tell_shift_and_licence(tiny_kl: Path, tmp_path: Path) -> None:
    tensors = part_tensors(tiny_kl, "unet")
    roles = {"scale": 1.0} | {role: {"licence": licence} for role, licence in (("custom", "MIT"), ("nitro", "CC-BY-4.0"))}
    save_file(tensors, tmp_path / "u.safetensors", {"shifted_timestep": "250", "transfer": json.dumps(roles)})
    source = resolve_model("u.safetensors", base=str(tiny_kl))
    assert (source.shift, source.licence) == (250, "MIT and CC-BY-4.0 and CC0-1.0")
    assert run_of(source.assemble())["shifted_timestep"] == 250
    save_file(tensors, tmp_path / "u.safetensors", {"modelspec.license": "openrail++"})
    assert resolve_model("u.safetensors", base=str(tiny_kl)).licence == "openrail++ and CC0-1.0"


def test_a_comfyui_checkpoint_takes_only_configs_and_tokenizers_of_its_base(tiny_kl: Path, tmp_path: Path) -> None:
    comfyui_file(tiny_kl, tmp_path / "all.safetensors")
    base = Path(shutil.copytree(tiny_kl, tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors", "run.json")))
    folder = resolve_model("all.safetensors", base="base").assemble()
    require_weights_of(tiny_kl, folder)
    for part in (*PARTS, "tokenizer", "tokenizer_2"):
        for path in (base / part).glob("*.json"):
            assert json.loads(path.read_text()) == json.loads((folder / part / path.name).read_text())


def test_without_configs_in_the_base_sdxls_own_are_taken(tiny_kl: Path, tmp_path: Path) -> None:
    comfyui_file(tiny_kl, tmp_path / "all.safetensors")
    for part in ("tokenizer", "tokenizer_2"):
        shutil.copytree(tiny_kl / part, tmp_path / "base" / part)
    with pytest.raises(ExportError, match=r"^all.safetensors on base: text_encoder lacks 160 of 196 tensors: "):
        resolve_model("all.safetensors", base="base")  # the tiny one is not of SDXL's size


def test_a_base_that_lacks_what_the_file_lacks(tiny_kl: Path, unet_file: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny_kl, tmp_path / "base"))
    (base / "text_encoder_2" / "model.safetensors").unlink()
    with pytest.raises(ModelNotFound, match="text_encoder_2 has no model.safetensors"):
        resolve_model(unet_file.name, base="base")
    shutil.rmtree(base / "tokenizer_2")
    with pytest.raises(ModelNotFound, match="has no tokenizer_2"):
        resolve_model(unet_file.name, base="base")


def test_a_file_without_a_unet(tiny_kl: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_kl / "vae" / "diffusion_pytorch_model.safetensors", tmp_path / "v.safetensors")
    with pytest.raises(ConfigError, match="holds no UNet, only vae; a VAE alone is for --decoder"):
        resolve_model("v.safetensors", base=str(tiny_kl))


def test_a_unet_of_another_architecture(tiny_kl: Path, tmp_path: Path) -> None:
    tensors = part_tensors(tiny_kl, "unet")
    tensors["conv_in.weight"] = torch.zeros(16, 9, 3, 3)
    del tensors["conv_out.bias"]
    save_file(tensors, tmp_path / "u.safetensors")
    with pytest.raises(ExportError, match="u.safetensors on tiny-kl: unet") as caught:
        resolve_model("u.safetensors", base=str(tiny_kl))
    assert "conv_in.weight" in str(caught.value) or "conv_out.bias" in str(caught.value)


def test_nan_in_a_part_is_refused_before_anything_is_written(tiny_kl: Path, tmp_path: Path) -> None:
    tensors = part_tensors(tiny_kl, "unet")
    tensors["conv_in.weight"][0] = torch.nan
    save_file(tensors, tmp_path / "u.safetensors")
    with pytest.raises(ExportError, match="NaN or infinity in conv_in.weight"):
        resolve_model("u.safetensors", base=str(tiny_kl))
    assert not (tmp_path / "cache" / "models").exists()


def test_a_preset_of_its_parts(tiny_kl: Path, tmp_path: Path) -> None:
    models = tmp_path / "cache" / "models"
    models.mkdir(parents=True)
    shutil.copy(tiny_kl / "unet" / "diffusion_pytorch_model.safetensors", models / "nitrosd-realism_unet.safetensors")
    shutil.copytree(tiny_kl, models / "stable-diffusion-xl-base-1.0", ignore=shutil.ignore_patterns("run.json"))
    source = resolve_model("nitrosd-realism")
    assert (source.name, source.shift, source.licence) == ("nitrosd-realism", 250, "CC-BY-NC-SA-4.0 and openrail++")
    assert source.origin == "nitrosd-realism on stabilityai/stable-diffusion-xl-base-1.0"
    folder = source.assemble()
    require_weights_of(tiny_kl, folder)
    assert run_of(folder)["shifted_timestep"] == 250 and run_of(folder)["licence"] == source.licence
    other = resolve_model("nitrosd-realism", base=str(tiny_kl))
    assert other.licence == "CC-BY-NC-SA-4.0 and CC0-1.0"


def hub_snapshot(tmp_path: Path, repository: str) -> Path:
    """Where the hub's cache has this repository; the folder is not there yet."""
    stored = tmp_path / "hf" / "hub" / f"models--{repository.replace('/', '--')}"
    (stored / "refs").mkdir(parents=True)
    (stored / "refs" / "main").write_text("abc123")
    return stored / "snapshots" / "abc123"


def test_a_partly_fetched_base_says_how_to_fetch_the_rest(tiny_kl: Path, tmp_path: Path) -> None:
    models = tmp_path / "cache" / "models"
    models.mkdir(parents=True)
    shutil.copy(tiny_kl / "unet" / "diffusion_pytorch_model.safetensors", models / "nitrosd-realism_unet.safetensors")
    snapshot = hub_snapshot(tmp_path, "stabilityai/stable-diffusion-xl-base-1.0")
    fetch = (
        r".*hf download stabilityai/stable-diffusion-xl-base-1.0 .*or put .* at \S+/cache/models/stable-diffusion-xl-base-1.0"
    )
    shutil.copytree(tiny_kl, snapshot, ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(ModelNotFound, match=f"vae has no diffusion_pytorch_model.safetensors{fetch}"):
        resolve_model("nitrosd-realism")
    with pytest.raises(ModelNotFound, match="vae has no diffusion_pytorch_model.safetensors; fetch the checkpoint again$"):
        resolve_model("nitrosd-realism", base=str(snapshot))  # the user's own folder, wherever it is from
    for name in ("tokenizer.json", "merges.txt"):
        (snapshot / "tokenizer_2" / name).unlink(missing_ok=True)
    with pytest.raises(ModelNotFound, match=f"tokenizer_2 has neither tokenizer.json nor merges.txt{fetch}"):
        resolve_model("nitrosd-realism")

    by_hand = Path(shutil.copytree(tiny_kl, models / "stable-diffusion-xl-base-1.0"))
    assert resolve_model("nitrosd-realism").origin == "nitrosd-realism on stabilityai/stable-diffusion-xl-base-1.0"
    (by_hand / "text_encoder" / "model.safetensors").unlink()
    with pytest.raises(
        ModelNotFound, match=f"text_encoder has no model.safetensors.*complete {by_hand}, or remove it and fetch"
    ):
        resolve_model("nitrosd-realism")


def test_a_decoder_folder(tiny_kl: Path, taesdxl: Path) -> None:
    source = resolve_model(str(tiny_kl), decoder=str(taesdxl))
    assert (source.name, source.origin, source.shift) == ("tiny-kl-taesdxl", "tiny-kl, decoder taesdxl", 500)
    folder = source.assemble()
    require_weights_of(tiny_kl, folder, ("unet", "text_encoder", "text_encoder_2"))
    assert (folder / "vae" / "diffusion_pytorch_model.safetensors").samefile(taesdxl / "diffusion_pytorch_model.safetensors")
    assert read_checkpoint(folder).vae["_class_name"] == "AutoencoderTiny"
    assert json.loads((folder / "model_index.json").read_text())["vae"] == ["diffusers", "AutoencoderTiny"]


def test_the_tiny_decoder_is_looked_for(tiny_kl: Path, taesdxl: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="hf download madebyollin/taesdxl.*cache/models/taesdxl"):
        resolve_model(str(tiny_kl), decoder="tiny")
    shutil.copytree(taesdxl, tmp_path / "cache" / "models" / "taesdxl")
    source = resolve_model(str(tiny_kl), decoder="tiny")
    assert (source.name, source.licence) == ("tiny-kl-taesdxl", "CC0-1.0 and MIT")


def test_a_partly_fetched_tiny_decoder_says_how_to_fetch_the_rest(tiny_kl: Path, taesdxl: Path, tmp_path: Path) -> None:
    snapshot = hub_snapshot(tmp_path, "madebyollin/taesdxl")
    snapshot.mkdir(parents=True)
    for missing in ("holds no config.json", "has no diffusion_pytorch_model.safetensors"):
        with pytest.raises(ModelNotFound, match=f"{missing}.*hf download madebyollin/taesdxl .*cache/models/taesdxl"):
            resolve_model(str(tiny_kl), decoder="tiny")
        shutil.copy(taesdxl / "config.json", snapshot)
    shutil.copytree(taesdxl, tmp_path / "cache" / "models" / "taesdxl")
    assert resolve_model(str(tiny_kl), decoder="tiny").name == "tiny-kl-taesdxl"


def test_the_tiny_decoder_is_for_sdxls_latents_only() -> None:
    with pytest.raises(ConfigError, match="is for SDXL's latents.*nitro-emoji is an AutoencoderKL with 1.0"):
        resolve_model("nitro-emoji", decoder="tiny")


@pytest.mark.parametrize("kind", ["tiny", "kl", "kl, original names"])
def test_a_decoder_as_a_single_file(tiny_kl: Path, taesdxl: Path, tmp_path: Path, kind: str) -> None:
    path, whole = tmp_path / "decoder.safetensors", taesdxl if kind == "tiny" else tiny_kl / "vae"
    if "original" in kind:
        comfyui_file(tiny_kl, path, ("vae",))
    else:
        shutil.copy(whole / "diffusion_pytorch_model.safetensors", path)
    folder = resolve_model(str(tiny_kl), decoder="decoder.safetensors").assemble()
    found, wanted = (load_file(at / "diffusion_pytorch_model.safetensors") for at in (folder / "vae", whole))
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in found)
    assert read_checkpoint(folder).vae["_class_name"] == ("AutoencoderTiny" if kind == "tiny" else "AutoencoderKL")


def test_a_decoder_that_does_not_fit(tiny_kl: Path, taesdxl: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(taesdxl, tmp_path / "other"))
    config = json.loads((folder / "config.json").read_text())

    def configured(**changes: object) -> None:
        (folder / "config.json").write_text(json.dumps(config | changes))

    for changes, kind, said in (
        ({"latent_channels": 16}, ConfigError, "other decodes 16 latent channels, SDXL's UNet gives 4"),
        (
            {"_class_name": "AutoencoderDC"},
            ConfigError,
            "is a AutoencoderDC, a decoder is one of AutoencoderKL, AutoencoderTiny",
        ),
        ({"decoder_block_out_channels": [64, 64, 64]}, ConfigError, "makes 4 pixels of a latent"),
        (
            {"num_decoder_blocks": [3, 3, 4, 1]},
            ExportError,
            "^tiny-kl, decoder other: vae lacks 15 of 140 tensors",
        ),
    ):
        configured(**changes)
        with pytest.raises(kind, match=said):
            resolve_model(str(tiny_kl), decoder="other")
    tensors = load_file(taesdxl / "diffusion_pytorch_model.safetensors")
    tensors["decoder.layers.0.weight"] = torch.zeros(64, 16, 3, 3)
    save_file(tensors, tmp_path / "wide.safetensors")
    with pytest.raises(ConfigError, match="wide.safetensors decodes 16 latent channels"):
        resolve_model(str(tiny_kl), decoder="wide.safetensors")
    (folder / "config.json").unlink()
    with pytest.raises(ModelNotFound, match="holds no config.json"):
        resolve_model(str(tiny_kl), decoder="other")
    with pytest.raises(ModelNotFound, match="there is no such file"):
        resolve_model(str(tiny_kl), decoder="nowhere")
    with pytest.raises(ConfigError, match="holds no VAE, only unet"):
        resolve_model(str(tiny_kl), decoder=str(tiny_kl / "unet" / "diffusion_pytorch_model.safetensors"))


def test_kl_is_the_checkpoints_own(tiny_kl: Path, tmp_path: Path) -> None:
    source = resolve_model(str(tiny_kl), decoder="kl")
    assert source.assembly is None and source.checkpoint == tiny_kl
    make_tiny_sdxl(tmp_path / "tiny-tiny", vae="tiny")
    with pytest.raises(ConfigError, match="--decoder kl: the VAE of tiny-tiny is an AutoencoderTiny"):
        resolve_model("tiny-tiny", decoder="kl")


def test_loras_are_fused_and_enter_the_key_by_content(tiny_kl: Path, tmp_path: Path) -> None:
    kohya_lora(tiny_kl, tmp_path / "one.safetensors")
    peft_lora(tiny_kl, tmp_path / "two.safetensors", {"modelspec.license": "MIT"})
    source = resolve_model(str(tiny_kl), loras=["one.safetensors:0.5", "two.safetensors"])
    assert source.name == "tiny-kl-one-two" and source.shift == 500
    assert source.origin == "tiny-kl, LoRA one.safetensors x 0.5, LoRA two.safetensors x 1"
    assert source.licence == "CC0-1.0 and unknown and MIT"
    folder = source.assemble()
    weight = part_tensors(tiny_kl, "unet")["conv_in.weight"]
    down, up = lora_matrices(tiny_kl)["unet", "conv_in"]
    delta = (up.flatten(1) @ down.flatten(1)).view(weight.shape) * (0.5 * 2 / len(down) + 1)
    torch.testing.assert_close(part_tensors(folder, "unet")["conv_in.weight"], weight + delta, rtol=0, atol=3e-6)
    require_weights_of(tiny_kl, folder, ("vae",))

    (tmp_path / "away").mkdir()
    shutil.copytree(tiny_kl, tmp_path / "away" / "tiny-kl")
    for name in ("one", "two"):
        shutil.copy(f"{name}.safetensors", tmp_path / "away" / f"{name}-renamed.safetensors")
    moved = ["away/one-renamed.safetensors:0.5", "away/two-renamed.safetensors:1.0"]
    assert resolve_model("away/tiny-kl", loras=moved).key() == source.key()
    keys = {source.key()}
    for loras in (
        ["one.safetensors:0.5"],
        ["one.safetensors:0.25", "two.safetensors"],
        ["two.safetensors", "one.safetensors:0.5"],
    ):
        keys.add(resolve_model(str(tiny_kl), loras=loras).key())
    assert len(keys) == 4


def test_a_lora_on_a_unet_in_shards(tiny_kl: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny_kl, tmp_path / "base"))
    tensors, files = part_tensors(tiny_kl, "unet"), ("a.safetensors", "b.safetensors")
    (base / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    weight_map = {name: files[number % 2] for number, name in enumerate(sorted(tensors))}
    for file in files:
        save_file({name: tensor for name, tensor in tensors.items() if weight_map[name] == file}, base / "unet" / file)
    index = base / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    loras = [str(peft_lora(tiny_kl, tmp_path / "l.safetensors"))]
    folder = resolve_model("base", loras=loras).assemble()
    assert sorted(path.name for path in (folder / "unet").iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]
    require_weights_of(resolve_model(str(tiny_kl), loras=loras).assemble(), folder)


def test_files_of_the_hubs_cache_are_links_to_nameless_blobs(tiny_kl: Path, taesdxl: Path, tmp_path: Path) -> None:
    for number, path in enumerate((tiny_kl / "unet", taesdxl)):
        shutil.copy(path / "diffusion_pytorch_model.safetensors", tmp_path / f"blob{number}")
    shutil.copy(peft_lora(tiny_kl, tmp_path / "l.safetensors"), tmp_path / "blob2")
    (tmp_path / "hub").mkdir()
    names = ("unet.safetensors", "decoder.safetensors", "style.safetensors")
    for number, name in enumerate(names):
        (tmp_path / "hub" / name).symlink_to(tmp_path / f"blob{number}")
    unet, decoder, style = (f"hub/{name}" for name in names)
    source = resolve_model(unet, base=str(tiny_kl), decoder=decoder, loras=[f"{style}:0.5"])
    assert source.origin == "unet.safetensors on tiny-kl, decoder decoder.safetensors, LoRA style.safetensors x 0.5"
    wanted = resolve_model(str(tiny_kl), loras=["l.safetensors:0.5"]).assemble()
    require_weights_of(wanted, source.assemble(), ("unet", "text_encoder", "text_encoder_2"))
    linked = resolve_model(unet, base=str(tiny_kl)).assemble() / "unet" / "diffusion_pytorch_model.safetensors"
    assert linked.samefile(tmp_path / "blob0") and not linked.is_symlink()


def test_everything_at_once(tiny_kl: Path, unet_file: Path, taesdxl: Path) -> None:
    """A LoRA on renamed tensors, beside another decoder; the key is known before anything is written."""
    peft_lora(tiny_kl, unet_file.with_name("style.safetensors"))
    source = resolve_model(unet_file.name, base=str(tiny_kl), decoder=str(taesdxl), loras=["style.safetensors:2"])
    assert source.known_sha256() is None and not source.checkpoint.exists()
    with source.opened() as outline:
        assert read_checkpoint(outline).native_size_px == 64
    assert not source.checkpoint.exists()
    folder = source.assemble()
    assert folder.name == source.key() and source.known_sha256() == checkpoint_sha256(folder)
    before, after = part_tensors(tiny_kl, "unet"), part_tensors(folder, "unet")
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert changed == {f"{module}.weight" for part, module in lora_matrices(tiny_kl) if part == "unet"}


def test_a_lora_for_another_base(tiny_kl: Path, tmp_path: Path) -> None:
    peft_lora(tiny_kl, tmp_path / "l.safetensors")
    with pytest.raises(ConfigError, match="is for another base: of its 18 layers"):
        resolve_model("nitro-emoji", loras=["l.safetensors"])


def test_the_shift_of_an_extracted_lora(tiny_kl: Path, tmp_path: Path) -> None:
    """`extract-lora` writes the student's shift; it holds where the base, an ordinary SDXL, has none."""
    peft_lora(tiny_kl, tmp_path / "l.safetensors", {"shifted_timestep": "250"})
    assert resolve_model(str(tiny_kl), loras=["l.safetensors"]).shift == 500
    base = Path(shutil.copytree(tiny_kl, tmp_path / "base", ignore=shutil.ignore_patterns("run.json")))
    assert resolve_model(str(base), loras=["l.safetensors"]).shift == 250


@pytest.mark.slow
def test_build_from_parts(
    tiny_kl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole command: ComfyUI's file, a LoRA and another decoder; another scale makes another engine."""
    from nitro_rt.cli import main

    comfyui_file(tiny_kl, tmp_path / "all.safetensors")
    kohya_lora(tiny_kl, tmp_path / "l.safetensors")
    decoder = make_tiny_sdxl(tmp_path / "other", vae="tiny") / "vae"
    command = ["build", "--model", "all.safetensors", "--base", str(tiny_kl), "--decoder", str(decoder), "--shift", "500"]
    command += ["--backend", "onnxruntime", "--out", "bundle", "--json"]
    keys = []
    for scale in ("0.5", "1"):
        assert main([*command, "--lora", f"l.safetensors:{scale}", "--dry-run"]) == 0
        assert json.loads(capsys.readouterr().out)["source"]["licence"] == "unknown and CC0-1.0"
        assert main([*command, "--lora", f"l.safetensors:{scale}"]) == 0
        printed = capsys.readouterr()
        keys.append(json.loads(printed.out)["engine_key"])
        assert "licence: unknown and CC0-1.0" in printed.err and "LoRA l.safetensors x" in printed.err
    assert keys[0] != keys[1]
    manifest = json.loads((tmp_path / "bundle" / "bundle.json").read_text())
    assert manifest["source"]["licence"] == "unknown and CC0-1.0"
    assert manifest["source"]["origin"] == "all.safetensors on tiny-kl, decoder vae, LoRA l.safetensors x 1"

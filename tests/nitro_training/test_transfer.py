"""Weight transfer: exact where it must be, streamed, and nothing half-written."""

from __future__ import annotations

import json
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoints import make_tiny_sdxl
from nitro_export.checkpoint import checkpoint_sha256
from nitro_export.weights import DTYPES, TensorSpec, open_unet, write_safetensors
from nitro_rt.cli import main
from nitro_rt.errors import ConfigError, ExportError, ModelNotFound, NitroError, TrainingError
from nitro_rt.manifest import sha256_of
from nitro_training import publish
from nitro_training.transfer import add_difference, transfer

UNET_FILE = Path("unet/diffusion_pytorch_model.safetensors")
Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three tiny checkpoints of one architecture with three different UNets."""
    root = tmp_path_factory.mktemp("checkpoints")
    return {role: make_tiny_sdxl(root / role, seed=seed) for seed, role in enumerate(("custom", "nitro", "base"))}


def small(seed: int, dtype: torch.dtype = torch.float16) -> Weights:
    """Weights that pass for a UNet: what is looked at is their names, types and shapes."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"conv_in.weight": (8, 4, 3, 3), "conv_in.bias": (8,), "mid.to_q.weight": (8, 8), "mid.norm.weight": (8,)}
    return {key: torch.randn(shape, generator=generator).to(dtype) for key, shape in shapes.items()}


def written(folder: Path, **unets: Weights) -> dict[str, Path]:
    for role, tensors in unets.items():
        save_file(tensors, str(folder / f"{role}.safetensors"))
    return {role: folder / f"{role}.safetensors" for role in unets}


def same_bits(first: Weights, second: Weights) -> bool:
    return first.keys() == second.keys() and all(
        first[key].dtype == second[key].dtype
        and first[key].shape == second[key].shape
        and first[key].contiguous().view(-1).view(torch.uint8).equal(second[key].contiguous().view(-1).view(torch.uint8))
        for key in first
    )


def everything(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


# --- the arithmetic ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_custom_equal_to_base_gives_nitro_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    nitro, base = small(1, dtype), small(2, dtype)
    nitro["conv_in.weight"][0, 0, 0, 0] = -0.0
    base["conv_in.weight"][0, 0, 0, 1] *= 3000  # a base so large that + nitro - base would round nitro away
    paths = written(tmp_path, custom=base, nitro=nitro, base=base)
    result = transfer(**paths, out=tmp_path / "out.safetensors")
    assert result is not None and (result.num_from_nitro, result.num_from_custom, result.custom_distance) == (4, 0, 0.0)
    assert same_bits(load_file(tmp_path / "out.safetensors"), nitro)


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_nitro_equal_to_base_gives_custom_bit_for_bit(scale: float, tmp_path: Path) -> None:
    custom, base = small(1), small(2)
    custom["mid.norm.weight"][0] = -0.0
    paths = written(tmp_path, custom=custom, nitro=base, base=base)
    result = transfer(**paths, out=tmp_path / "out.safetensors", scale=scale)
    assert result is not None and (result.num_from_nitro, result.num_from_custom, result.nitro_distance) == (0, 4, 0.0)
    assert same_bits(load_file(tmp_path / "out.safetensors"), custom)


def test_exactness_holds_element_by_element() -> None:
    custom, nitro, base = torch.randn(3, 1000, generator=torch.Generator().manual_seed(0)) * 100
    custom[:500] = base[:500]
    nitro[500:700] = base[500:700]
    result = add_difference(custom, nitro, base)
    assert result[:500].equal(nitro[:500]) and result[500:700].equal(custom[500:700])
    naive = (custom + (nitro - base))[:500]
    assert not naive.equal(nitro[:500]), "the case is too easy: plain arithmetic is exact here"


def test_the_sum_is_that_of_float64_rounded_once() -> None:
    custom, nitro, base = torch.randn(3, 20_000, generator=torch.Generator().manual_seed(0)).half()
    exact = (custom.double() + 0.7 * (nitro.double() - base.double())).half()
    found = add_difference(custom, nitro, base, 0.7)
    assert (found != exact).float().mean() < 1e-3  # double rounding, one unit in the last place
    assert torch.allclose(found.float(), exact.float(), rtol=1e-3, atol=1e-6)
    assert not (custom + 0.7 * (nitro - base)).equal(exact)


@pytest.mark.parametrize(
    ("custom", "nitro", "base"),
    [("F16", "F32", "F32"), ("F32", "F16", "F16"), ("BF16", "F16", "F32"), ("F64", "F32", "BF16")],
)
def test_the_result_has_custom_s_number_type(custom: str, nitro: str, base: str, tmp_path: Path) -> None:
    unets = {"custom": small(0, DTYPES[custom]), "nitro": small(1, DTYPES[nitro]), "base": small(2, DTYPES[base])}
    transfer(**written(tmp_path, **unets), out=tmp_path / "out.safetensors")
    for key, found in load_file(tmp_path / "out.safetensors").items():
        c, n, b = (unets[role][key] for role in ("custom", "nitro", "base"))
        assert found.dtype == c.dtype
        torch.testing.assert_close(found, (c.double() + n.double() - b.double()).to(c.dtype))


def test_custom_in_float32_that_equals_a_float16_base_gives_nitro_s_values(tmp_path: Path) -> None:
    nitro, base = small(1), small(2)
    paths = written(tmp_path, custom={key: value.float() for key, value in base.items()}, nitro=nitro, base=base)
    transfer(**paths, out=tmp_path / "out.safetensors")
    assert same_bits(load_file(tmp_path / "out.safetensors"), {key: value.float() for key, value in nitro.items()})


def test_overflow_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    custom, nitro, base = small(0), small(1), small(2)
    custom["mid.to_q.weight"][0, 0], nitro["mid.to_q.weight"][0, 0], base["mid.to_q.weight"][0, 0] = 6e4, 6e4, -6e4
    paths = written(tmp_path, custom=custom, nitro=nitro, base=base)
    before = everything(tmp_path)
    with pytest.raises(ConfigError, match=r"mid\.to_q\.weight would hold infinite .* in torch\.float16"):
        transfer(**paths, out=tmp_path / "out.safetensors")
    assert everything(tmp_path) == before


# --- reading ----------------------------------------------------------------------------------------------------------
def shard(source: Path, folder: Path, num: int = 3) -> Path:
    """The UNet of a file, as transformers and diffusers cut large ones."""
    folder.mkdir()
    tensors = load_file(source)
    weight_map = {}
    for index in range(num):
        name = f"diffusion_pytorch_model-{index + 1:05d}-of-{num:05d}.safetensors"
        part = {key: tensors[key] for key in sorted(tensors)[index::num]}
        save_file(part, str(folder / name))
        weight_map |= dict.fromkeys(part, name)
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def ldm_from_diffusers(key: str) -> str:
    """The name of a tensor of SDXL's UNet in single-file checkpoints; written from the layout, for comparison only."""
    resnet = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
              "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}  # fmt: skip
    plain = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
             "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
             "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}  # fmt: skip
    stem, _, kind = key.rpartition(".")
    if stem in plain:
        return f"{plain[stem]}.{kind}"
    if found := re.match(r"(down|up)_blocks\.(\d)\.(resnets|attentions|downsamplers|upsamplers)\.(\d)\.(.+)", key):
        side, block, what, layer, rest = found[1], int(found[2]), found[3], int(found[4]), found[5]
        place = {"down": f"input_blocks.{1 + 3 * block + layer}", "up": f"output_blocks.{3 * block + layer}"}[side]
        if what == "downsamplers":
            return f"input_blocks.{3 * (block + 1)}.0.op.{kind}"
        if what == "upsamplers":
            return (
                f"output_blocks.{3 * block + 2}.2.conv.{kind}" if block < 2 else f"output_blocks.{3 * block + 2}.1.conv.{kind}"
            )
    else:
        found = re.match(r"mid_block\.(resnets|attentions)\.(\d)\.(.+)", key)
        assert found, key
        what, rest = found[1], found[3]
        place = "middle_block.1" if what == "attentions" else f"middle_block.{2 * int(found[2])}"
        return f"{place}.{rest}" if what == "attentions" else f"{place}.{_renamed(rest, resnet)}"
    return f"{place}.1.{rest}" if what == "attentions" else f"{place}.0.{_renamed(rest, resnet)}"


def _renamed(rest: str, names: dict[str, str]) -> str:
    head, _, tail = rest.partition(".")
    return f"{names[head]}.{tail}"


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", ""], ids=["checkpoint", "unet"])
def test_a_single_file_in_the_layout_of_comfyui_reads_as_the_same_unet(
    prefix: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    tensors = load_file(folders["custom"] / UNET_FILE)
    named = {prefix + ldm_from_diffusers(key): value for key, value in tensors.items()}
    assert len(named) == len(tensors)
    if prefix:
        named["first_stage_model.decoder.conv_in.weight"] = torch.zeros(2)
    save_file(named, str(tmp_path / "single.safetensors"))
    with open_unet(tmp_path / "single.safetensors") as unet:
        assert same_bits({key: unet.tensor(key).clone() for key in unet.specs}, tensors)


@pytest.mark.parametrize("kind", ["checkpoint", "unet folder", "shards", "index", "fp16 variant"])
def test_every_way_to_name_a_unet_reads_the_same(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    source = folders["custom"] / UNET_FILE
    if kind == "fp16 variant":
        (tmp_path / "unet").mkdir()
        shutil.copyfile(source, tmp_path / "unet/diffusion_pytorch_model.fp16.safetensors")
        path = tmp_path
    elif kind in ("shards", "index"):
        path = shard(source, tmp_path / "unet")
        path = path / "diffusion_pytorch_model.safetensors.index.json" if kind == "index" else path
    else:
        path = folders["custom"] if kind == "checkpoint" else source.parent
    with open_unet(path) as unet:
        assert same_bits({key: unet.tensor(key).clone() for key in unet.specs}, load_file(source))
        assert set(unet.sha256()) == {file.name for file in unet.files}
        assert unet.sha256()[unet.files[0].name] == sha256_of(unet.files[0])


def _quantised(folder: Path) -> Path:
    save_file({"conv_in.weight": torch.zeros(4, dtype=torch.int8)}, str(folder / "int8.safetensors"))
    return folder / "int8.safetensors"


def _no_unet(folder: Path) -> Path:
    save_file({"text_model.weight": torch.zeros(4)}, str(folder / "text.safetensors"))
    return folder / "text.safetensors"


def _cut(folder: Path) -> Path:
    save_file(small(0), str(folder / "cut.safetensors"))
    data = (folder / "cut.safetensors").read_bytes()
    (folder / "cut.safetensors").write_bytes(data[:-10])
    return folder / "cut.safetensors"


def _pickle(folder: Path) -> Path:
    (folder / "model.ckpt").write_bytes(b"\x80\x04")
    return folder / "model.ckpt"


def _pickle_folder(folder: Path) -> Path:
    (folder / "unet").mkdir()
    (folder / "unet/diffusion_pytorch_model.bin").write_bytes(b"\x80\x04")
    return folder


def _shard_missing(folder: Path) -> Path:
    save_file(small(0), str(folder / "all.safetensors"))
    next(shard(folder / "all.safetensors", folder / "unet").glob("*-00002-*")).unlink()
    return folder


def _shard_outside(folder: Path) -> Path:
    (folder / "unet").mkdir()
    index = {"weight_map": {"conv_in.weight": "../elsewhere.safetensors"}}
    (folder / "unet/diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda folder: folder / "nowhere", ModelNotFound, "there is no file or folder"),
        (_pickle, ConfigError, "can run code"),
        (_pickle_folder, ModelNotFound, "found: diffusion_pytorch_model.bin"),
        (_quantised, ConfigError, "conv_in.weight has the number type I8"),
        (_no_unet, ConfigError, "holds no UNet.*first text_model.weight"),
        (_cut, ExportError, "is damaged"),
        (_shard_missing, ModelNotFound, "lacks diffusion_pytorch_model-00002-of-00003"),
        (_shard_outside, ConfigError, "not beside it; refused"),
    ],
)
def test_what_is_no_unet_is_refused(make: Any, error: type[NitroError], message: str, tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()
    path = make(tmp_path / "bad")
    paths = written(tmp_path, custom=small(0), base=small(1))
    before = everything(tmp_path)
    with pytest.raises(error, match=message):
        transfer(**paths, nitro=path, out=tmp_path / "out.safetensors")
    assert everything(tmp_path) == before


# --- what does not fit ------------------------------------------------------------------------------------------------
def test_missing_and_further_tensors_are_named(tmp_path: Path) -> None:
    nitro = small(1)
    nitro["mid.extra"] = nitro.pop("mid.to_q.weight")
    paths = written(tmp_path, custom=small(0), nitro=nitro, base=small(2))
    message = r"nitro lacks 1 of the 4 tensors of custom, first mid\.to_q\.weight and has 1 .* first mid\.extra"
    with pytest.raises(ConfigError, match=message):
        transfer(**paths, out=tmp_path / "out.safetensors")


def test_other_shapes_are_named(tmp_path: Path) -> None:
    base = small(2)
    base["conv_in.weight"] = torch.zeros(8, 9, 3, 3).half()
    paths = written(tmp_path, custom=small(0), nitro=small(1), base=base)
    message = r"1 of 4 tensors have other shapes, first conv_in\.weight: \[8, 4, 3, 3\] in custom, \[8, 9, 3, 3\] in base"
    with pytest.raises(ConfigError, match=message):
        transfer(**paths, out=tmp_path / "out.safetensors")


@pytest.mark.parametrize("scale", [0.0, float("nan"), float("inf")])
def test_a_scale_that_is_none_is_refused(scale: float, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--scale"):
        transfer(tmp_path, tmp_path, tmp_path, tmp_path / "out.safetensors", scale=scale)


# --- a whole checkpoint -----------------------------------------------------------------------------------------------
def test_a_whole_checkpoint_with_custom_s_other_parts(folders: dict[str, Path], tmp_path: Path) -> None:
    result = transfer(**folders, out=tmp_path / "anime-nitro", scale=0.5)
    out = tmp_path / "anime-nitro"
    assert result is not None and result.shifted_timestep == 500
    checkpoint_sha256(out)  # `nitro-rt build` takes it
    run = json.loads((out / "run.json").read_text())
    assert (run["name"], run["licence"], run["shifted_timestep"]) == ("anime-nitro", "CC0-1.0", 500)
    assert run["transfer"]["scale"] == 0.5
    for role, folder in folders.items():
        assert run["transfer"][role]["unet_sha256"] == {UNET_FILE.name: sha256_of(folder / UNET_FILE)}
    copied = everything(folders["custom"]) - {UNET_FILE.as_posix(), "run.json"}
    assert everything(out) - {UNET_FILE.as_posix(), "run.json"} == copied
    assert all((out / n).read_bytes() == (folders["custom"] / n).read_bytes() for n in copied if (out / n).is_file())
    unets = [load_file(folders[role] / UNET_FILE) for role in ("custom", "nitro", "base")]
    for key, found in load_file(out / UNET_FILE).items():
        c, n, b = (unet[key] for unet in unets)
        torch.testing.assert_close(found, c + 0.5 * (n - b))
    pipe = StableDiffusionXLPipeline.from_pretrained(out, dtype=torch.float32)
    assert pipe.unet.config.sample_size == 8
    assert everything(tmp_path) == everything(out.parent) and not list(tmp_path.glob(".*"))


def test_parts_that_are_there_as_fp16_only_take_the_plain_name(folders: dict[str, Path], tmp_path: Path) -> None:
    custom = shutil.copytree(folders["custom"], tmp_path / "custom")
    for name in ("text_encoder/model", "text_encoder_2/model", "vae/diffusion_pytorch_model", "unet/diffusion_pytorch_model"):
        (custom / f"{name}.safetensors").rename(custom / f"{name}.fp16.safetensors")
    transfer(custom, folders["nitro"], folders["base"], tmp_path / "out")
    StableDiffusionXLPipeline.from_pretrained(tmp_path / "out", dtype=torch.float32)


def test_a_checkpoint_without_a_shift_is_refused_until_it_is_said(folders: dict[str, Path], tmp_path: Path) -> None:
    unets = {"nitro": folders["nitro"] / UNET_FILE, "base": folders["base"] / UNET_FILE}
    with pytest.raises(ConfigError, match="say --shift"):
        transfer(folders["custom"], **unets, out=tmp_path / "out")
    with pytest.raises(ConfigError, match="from 1 to 1000"):
        transfer(folders["custom"], **unets, out=tmp_path / "out", shift=1001)
    assert not everything(tmp_path)
    transfer(folders["custom"], **unets, out=tmp_path / "out", shift=250)
    assert json.loads((tmp_path / "out/run.json").read_text())["shifted_timestep"] == 250


def test_a_folder_needs_a_checkpoint_as_custom(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is a UNet alone.*out\.safetensors"):
        transfer(folders["custom"] / UNET_FILE, folders["nitro"], folders["base"], tmp_path / "out")


def test_a_file_says_where_it_comes_from(folders: dict[str, Path], tmp_path: Path) -> None:
    transfer(**folders, out=tmp_path / "unet.safetensors", shift=400)
    with safe_open(str(tmp_path / "unet.safetensors"), framework="pt") as file:
        metadata = file.metadata()
    assert metadata["shifted_timestep"] == "400" and metadata["format"] == "pt"
    assert json.loads(metadata["transfer"])["base"]["unet_sha256"]


# --- the place of the result ------------------------------------------------------------------------------------------
def test_what_is_there_is_replaced_only_when_asked(folders: dict[str, Path], tmp_path: Path) -> None:
    for out in (tmp_path / "out", tmp_path / "out.safetensors"):
        transfer(**folders, out=out)
        with pytest.raises(ConfigError, match="already there; add --force"):
            transfer(**folders, out=out)
        transfer(**folders, out=out, scale=0.5, force=True)
    assert json.loads((tmp_path / "out/run.json").read_text())["transfer"]["scale"] == 0.5
    assert {path.name for path in tmp_path.iterdir()} == {"out", "out.safetensors"}


def test_force_replaces_no_other_folder_and_no_input(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters/mine.txt").write_text("dear")
    with pytest.raises(ConfigError, match="no checkpoint; it is not replaced"):
        transfer(**folders, out=tmp_path / "letters", force=True)
    for out in (folders["base"], folders["base"] / "unet/new.safetensors", folders["base"].parent):
        with pytest.raises(ConfigError, match="overlaps with the input"):
            transfer(**folders, out=out, force=True)
    assert (tmp_path / "letters/mine.txt").read_text() == "dear" and (folders["base"] / UNET_FILE).is_file()


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """The system refuses to let a file grow further, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("name", ["out", "out.safetensors"])
def test_a_disk_that_fills_up_leaves_what_was_there(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / name
    transfer(**folders, out=out)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with largest_file(200_000), pytest.raises(TrainingError, match="cannot write .*what was there before is kept"):
        transfer(**folders, out=out, scale=0.5, force=True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_no_room_is_said_before_the_work(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publish, "_free", lambda path: 1000)
    with pytest.raises(TrainingError, match="1000 are free there"):
        transfer(**folders, out=tmp_path / "out")
    assert not everything(tmp_path)


def test_an_interrupt_leaves_nothing(folders: dict[str, Path], tmp_path: Path) -> None:
    def interrupt(stage: str, done: int, total: int, figures: object) -> None:
        if done == total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        transfer(**folders, out=tmp_path / "out", report=interrupt)
    assert not everything(tmp_path)


def test_a_killed_predecessor_is_put_right(folders: dict[str, Path], tmp_path: Path) -> None:
    """Killed between the two renames, with the old checkpoint aside and a half-written one beside it."""
    transfer(**folders, out=tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / ".out.old")
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial/half").write_text("x")
    with largest_file(200_000), pytest.raises(TrainingError):
        transfer(**folders, out=tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"out"} and (tmp_path / "out/run.json").is_file()


# --- streaming --------------------------------------------------------------------------------------------------------
def test_the_written_file_is_what_safetensors_writes(tmp_path: Path) -> None:
    tensors = small(0) | {"wide": torch.randn(3, 2), "odd.bias": torch.randn(3).half(), "one": torch.tensor(2.0)}
    specs = {key: TensorSpec(value.dtype, tuple(value.shape)) for key, value in tensors.items()}
    metadata = {"format": "pt", "name": 'ü "quoted"'}
    write_safetensors(tmp_path / "ours", specs, lambda key: tensors[key].reshape(-1).split(5), metadata)
    save_file(tensors, str(tmp_path / "theirs"), metadata=metadata)
    with safe_open(str(tmp_path / "ours"), framework="pt") as file:
        assert file.metadata() == metadata
    assert same_bits(load_file(tmp_path / "ours"), tensors)
    starts = [struct.unpack("<Q", (tmp_path / name).read_bytes()[:8])[0] + 8 for name in ("ours", "theirs")]
    assert starts[0] % 8 == 0
    assert (tmp_path / "ours").read_bytes()[starts[0] :] == (tmp_path / "theirs").read_bytes()[starts[1] :]


WATCHED_TRANSFER = """
import re, sys, threading
from pathlib import Path

from nitro_training.transfer import transfer


def anonymous_bytes():
    # Without the pages of mapped files, which cost nothing.
    return int(re.search(r"RssAnon:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def watch():
    while not stop.wait(0.001):
        peak[0] = max(peak[0], anonymous_bytes() - start)


folder = Path(sys.argv[1])
stop, start, peak = threading.Event(), anonymous_bytes(), [0]
thread = threading.Thread(target=watch)
thread.start()
roles = {role: folder / f"{role}.safetensors" for role in ("custom", "nitro", "base")}
transfer(**roles, out=folder / "out.safetensors")
stop.set()
thread.join()
print(peak[0])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_memory_stays_flat_whatever_the_size(tmp_path: Path) -> None:
    """96 MB per input, two thirds of it in one tensor; in a process of its own, where nothing else allocates."""
    shapes = {f"block.{index}.weight": (4_000_000,) for index in range(4)} | {"conv_in.weight": (32_000_000,)}
    for role, value in (("custom", 1.0), ("nitro", 2.0), ("base", 0.5)):
        save_file({key: torch.full(s, value).half() for key, s in shapes.items()}, str(tmp_path / f"{role}.safetensors"))
    assert (tmp_path / "base.safetensors").stat().st_size > 95e6
    done = subprocess.run([sys.executable, "-c", WATCHED_TRANSFER, str(tmp_path)], capture_output=True, text=True, check=True)
    # A dozen intermediates of one part, 4 MB each; of the large tensor, each would be 128 MB.
    assert int(done.stdout) < 100e6, f"{int(done.stdout) / 1e6:.0f} MB"
    with open_unet(tmp_path / "out.safetensors") as unet:
        assert unet.tensor("conv_in.weight")[-1] == 2.5


# --- the command ------------------------------------------------------------------------------------------------------
def _options(folders: dict[str, Path], out: Path) -> list[str]:
    return ["transfer", *(word for role, path in folders.items() for word in (f"--{role}", str(path))), "-o", str(out)]


def test_the_command(folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*_options(folders, tmp_path / "out"), "--dry-run"]) == 0
    assert not everything(tmp_path) and "the three fit" in capsys.readouterr().out
    assert main(_options(folders, tmp_path / "out")) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "out")
    assert main([*_options(folders, tmp_path / "out"), "--force", "--json", "--scale", "0.25"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["provenance"]["scale"] == 0.25 and facts["shifted_timestep"] == 500
    assert main(_options(folders, tmp_path / "out")) == 1
    assert "already there" in capsys.readouterr().err

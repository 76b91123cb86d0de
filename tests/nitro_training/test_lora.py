"""LoRA extraction: what the factors are, that diffusers fuses them to the same weights, and that the report is true."""

from __future__ import annotations

import json
import math
import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoints import make_tiny_sdxl
from nitro_rt.cli import main
from nitro_rt.errors import BackendUnavailable, ConfigError, NitroError, TrainingError
from nitro_rt.manifest import sha256_of
from nitro_training.likeness import likeness
from nitro_training.lora import LoraReport, extract_lora, low_rank

UNET_FILE = Path("unet/diffusion_pytorch_model.safetensors")
FULL_RANK = 64
"""Of the tiny UNet: its largest matrix is the time embedding's, 64 by 64."""
Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny base and a student of it: all weights and biases moved a little, but for one layer that stayed."""
    root = tmp_path_factory.mktemp("checkpoints")
    base = make_tiny_sdxl(root / "base", seed=0)
    student = shutil.copytree(base, root / "student")
    generator = torch.Generator().manual_seed(1)
    tensors = load_file(base / UNET_FILE)
    for key, tensor in tensors.items():
        if not key.startswith("time_embedding.linear_1."):
            tensor += 0.05 * tensor.std().nan_to_num() * torch.randn(tensor.shape, generator=generator)
    save_file(tensors, str(student / UNET_FILE))
    run = json.loads((student / "run.json").read_text()) | {"name": "tiny-student"}
    (student / "run.json").write_text(json.dumps(run))
    return student, base


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("# two\na red apple\nheldout: the blue cat\n")
    return path


@pytest.fixture(scope="module")
def full(pair: tuple[Path, Path], prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> LoraReport:
    """Everything that can be extracted, in float32, and what lower ranks would lose."""
    out = tmp_path_factory.mktemp("lora") / "full.safetensors"
    student, base = pair
    report = extract_lora(
        student, base, out, rank=FULL_RANK, report_ranks=[2, 8, 32], dtype="fp32", prompts=prompts, seed=3
    )  # fmt: skip
    assert report is not None
    return report


def differences(pair: tuple[Path, Path]) -> Weights:
    student, base = (load_file(folder / UNET_FILE) for folder in pair)
    return {key: student[key] - base[key] for key in base}


def is_layer(key: str, tensor: Tensor) -> bool:
    return key.endswith(".weight") and tensor.ndim in (2, 4)


def products(path: Path, rank: int | None = None) -> Weights:
    """Layer's weight -> B A, from the file alone."""
    stored = load_file(path)
    found = {}
    for key in stored:
        if key.endswith(".lora_A.weight"):
            a, b = stored[key].float(), stored[key.replace("lora_A", "lora_B")].float()
            name = key.removeprefix("unet.").replace(".lora_A", "")
            found[name] = (b.flatten(1)[:, :rank] @ a.flatten(1)[:rank]).view(len(b), *a.shape[1:])
    return found


def relative(errors: Weights, whole: Weights) -> float:
    def square(tensors: Weights) -> float:
        return sum(float(tensor.double().square().sum()) for tensor in tensors.values())

    return math.sqrt(square(errors) / square(whole))


# --- the factors ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", [(20, 30), (30, 20), (700, 600)], ids=str)
def test_a_matrix_of_low_rank_comes_back_whole(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(shape[0], 5, generator=generator) @ torch.randn(5, shape[1], generator=generator)
    b, a = low_rank(matrix, 5, seed=0)
    assert b.shape == (shape[0], 5) and a.shape == (5, shape[1])
    torch.testing.assert_close(b @ a, matrix, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(b.norm(dim=0), a.norm(dim=1))  # balanced, so that float16 holds both
    assert (b @ a - (b[:, :4] @ a[:4])).norm() > 1, "the last rank counts"


def test_a_side_shorter_than_the_rank_is_filled_with_zeros() -> None:
    matrix = torch.randn(4, 90, generator=torch.Generator().manual_seed(0))
    b, a = low_rank(matrix, 16, seed=0)
    assert b.shape == (4, 16) and a.shape == (16, 90) and not b[:, 4:].any() and not a[4:].any()
    torch.testing.assert_close(b @ a, matrix)


def test_random_projection_is_nearly_the_best_and_repeats() -> None:
    matrix = torch.randn(600, 640, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(matrix)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    b, a = low_rank(matrix, 32, seed=1)
    assert torch.equal(torch.get_rng_state(), state), "the caller's random numbers are its own"
    error, best = (matrix - b @ a).norm(), values[32:].norm()
    assert best <= error < 1.003 * best
    again = low_rank(matrix, 32, seed=1)
    assert b.equal(again[0]) and a.equal(again[1])


# --- the file ---------------------------------------------------------------------------------------------------------
def test_full_rank_is_the_difference_of_all_layers(pair: tuple[Path, Path], full: LoraReport) -> None:
    found = products(full.out)
    wanted = {key: value for key, value in differences(pair).items() if is_layer(key, value) and value.any()}
    assert found.keys() == wanted.keys() and full.num_layers == len(found) and full.num_layers_unchanged == 1
    assert {len(value.shape) for value in found.values()} == {2, 4}
    assert {tuple(value.shape[2:]) for value in found.values()} == {(), (1, 1), (3, 3)}
    for key, value in wanted.items():
        assert (found[key] - value).norm() < 1e-5 * value.norm(), key


def test_diffusers_loads_it_and_fuses_to_base_plus_difference(pair: tuple[Path, Path], tmp_path: Path) -> None:
    pytest.importorskip("peft")
    student, base = pair
    out = tmp_path / "lora.safetensors"
    extract_lora(student, base, out, rank=8, dtype="fp32")
    pipe = StableDiffusionXLPipeline.from_pretrained(base, dtype=torch.float32)
    pipe.load_lora_weights(str(out))
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    fused, wanted, added = pipe.unet.state_dict(), load_file(base / UNET_FILE), products(out)
    assert fused.keys() == wanted.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(fused[key], value + added.get(key, torch.zeros(())), rtol=0, atol=1e-6)
    assert sum(not fused[key].equal(value) for key, value in wanted.items()) == len(added)


def test_an_unfused_float16_lora_brings_the_pictures_near_the_student_s(pair: tuple[Path, Path], tmp_path: Path) -> None:
    pytest.importorskip("peft")
    student, base = pair
    extract_lora(student, base, tmp_path / "lora.safetensors", rank=48)

    def draw(pipe: Any) -> Tensor:
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        images = pipe("a red apple", num_inference_steps=1, guidance_scale=0.0, generator=generator, output_type="pt").images
        return torch.as_tensor(images).float()

    wanted = draw(StableDiffusionXLPipeline.from_pretrained(student, dtype=torch.float32))
    pipe = StableDiffusionXLPipeline.from_pretrained(base, dtype=torch.float32)
    before = (draw(pipe) - wanted).abs().mean()
    pipe.load_lora_weights(str(tmp_path / "lora.safetensors"))
    assert (draw(pipe) - wanted).abs().mean() < 0.5 * before


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_number_types(dtype: str, pair: tuple[Path, Path], tmp_path: Path) -> None:
    report = extract_lora(*pair, tmp_path / "lora.safetensors", rank=4, dtype=dtype)
    stored = load_file(tmp_path / "lora.safetensors")
    assert {value.dtype for value in stored.values()} == {{"fp16": torch.float16, "bf16": torch.bfloat16}[dtype]}
    assert report is not None and report.ranks[0].num_bytes == sum(value.numel() * 2 for value in stored.values())


def test_a_file_says_where_it_comes_from(pair: tuple[Path, Path], full: LoraReport) -> None:
    with safe_open(str(full.out), framework="pt") as file:
        metadata = file.metadata()
    assert (metadata["base"], metadata["student"], metadata["rank"]) == ("tiny-sdxl-kl", "tiny-student", str(FULL_RANK))
    assert metadata["shifted_timestep"] == "500" and metadata["format"] == "pt"
    provenance = json.loads(metadata["provenance"])
    for role, folder in zip(("student", "base"), pair, strict=True):
        assert provenance[role]["unet_sha256"] == {UNET_FILE.name: sha256_of(folder / UNET_FILE)}


# --- the report -------------------------------------------------------------------------------------------------------
def test_errors_are_those_of_the_stored_factors(pair: tuple[Path, Path], full: LoraReport) -> None:
    whole = differences(pair)
    layers = {key: value for key, value in whole.items() if is_layer(key, value)}
    for row in full.ranks:
        added = products(full.out, row.rank)
        left = {key: value - added.get(key, torch.zeros(())) for key, value in whole.items()}
        assert row.layers_error == pytest.approx(relative({key: left[key] for key in layers}, layers), rel=1e-3, abs=1e-6)
        assert row.total_error == pytest.approx(relative(left, whole), rel=1e-3)
        by_layer = {key: float(left[key].norm() / layers[key].norm()) for key in layers if layers[key].any()}
        worst = max(by_layer, key=lambda key: by_layer[key])
        if row.layers_error > 1e-4:
            assert row.worst_layers[0].layer == worst.removesuffix(".weight")
            assert row.worst_layers[0].relative_error == pytest.approx(
                float(left[worst].norm() / layers[worst].norm()), rel=1e-3
            )
    errors = [row.layers_error for row in full.ranks]
    assert [row.rank for row in full.ranks] == [2, 8, 32, FULL_RANK]
    assert errors == sorted(errors, reverse=True) and errors[0] > 0.5 and errors[-1] < 1e-5


def test_what_is_left_out_is_in_the_report(pair: tuple[Path, Path], full: LoraReport) -> None:
    whole = differences(pair)
    left = {key: value for key, value in whole.items() if not is_layer(key, value) and value.any()}
    assert full.num_left_out == len(left) > 100
    assert full.left_out_error == pytest.approx(relative(left, whole), rel=1e-3)
    assert full.ranks[-1].total_error == pytest.approx(full.left_out_error, rel=1e-3)
    largest = max(left, key=lambda key: float(left[key].norm()))
    assert full.most_left_out[0].name == largest and full.other_parts_that_differ == ()


def test_the_cut_of_a_higher_rank_is_the_lora_of_the_lower(pair: tuple[Path, Path], full: LoraReport, tmp_path: Path) -> None:
    low = extract_lora(*pair, tmp_path / "low.safetensors", rank=8, dtype="fp32", seed=3)
    assert low is not None
    assert low.ranks[0].layers_error == pytest.approx(full.ranks[1].layers_error, rel=1e-4)
    assert low.ranks[0].num_bytes == full.ranks[1].num_bytes


def test_pictures_come_nearer_with_the_rank(full: LoraReport) -> None:
    rows = [full.base_likeness, *(row.likeness for row in full.ranks), full.full_likeness]
    found = [row.mean_abs_difference for row in rows if row is not None]
    assert len(found) == len(rows) == 6
    assert found[0] > found[1] > found[3] > 0 and found[0] > 1
    assert found[-2] == pytest.approx(found[-1], abs=0.05), "what full rank leaves is what biases and norms do"


def test_likeness_of_known_pictures() -> None:
    black = torch.zeros(2, 4, 4, 3, dtype=torch.uint8)
    same = likeness(black, black.clone())
    assert (same.mean_abs_difference, same.psnr_db) == (0, None)
    far = likeness(black, torch.full_like(black, 255))
    assert far.mean_abs_difference == 255 and far.psnr_db == pytest.approx(0)
    half = black.clone()
    half[0] = 10
    assert likeness(black, half).mean_abs_difference == 5
    assert likeness(half, black).psnr_db == pytest.approx(10 * math.log10(255**2 / 50))


def test_text_encoders_that_differ_are_named(pair: tuple[Path, Path], tmp_path: Path) -> None:
    student = shutil.copytree(pair[0], tmp_path / "student")
    path = student / "text_encoder_2/model.safetensors"
    save_file({key: value + 1 for key, value in load_file(path).items()}, str(path))
    report = extract_lora(student, pair[1], tmp_path / "lora.safetensors", rank=1)
    assert report is not None and report.other_parts_that_differ == ("text_encoder_2",)


# --- bad input --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rank": 0}, ConfigError, "--rank 0 must be at least 1"),
        ({"rank": 500}, ConfigError, "more than the full rank"),
        ({"report_ranks": [2, 9]}, ConfigError, "--report-ranks has 9"),
        ({"dtype": "fp8"}, ConfigError, "--dtype 'fp8'"),
        ({"prompts": Path("nowhere.txt")}, ConfigError, "no file of prompts"),
        ({"shift": 0}, ConfigError, "from 1 to 1000"),
    ],
)
def test_wrong_options_are_refused(
    options: dict[str, Any], error: type[NitroError], message: str, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        extract_lora(*pair, tmp_path / "lora.safetensors", **({"rank": 4} | options))
    assert not list(tmp_path.iterdir())


def test_inputs_that_cannot_be_are_refused(pair: tuple[Path, Path], prompts: Path, tmp_path: Path) -> None:
    student, base = pair
    with pytest.raises(ConfigError, match="are the same: there is nothing to extract"):
        extract_lora(base, base / "unet", tmp_path / "lora.safetensors", rank=4)
    with pytest.raises(ConfigError, match="is a UNet alone; give --student as a checkpoint folder"):
        extract_lora(student / UNET_FILE, base, tmp_path / "lora.safetensors", rank=4, prompts=prompts)
    with pytest.raises(ConfigError, match=r"must end in \.safetensors"):
        extract_lora(student, base, tmp_path / "lora.bin", rank=4)
    with pytest.raises(ConfigError, match="overlaps with the input"):
        extract_lora(student, base / UNET_FILE, base / UNET_FILE, rank=4, force=True)
    save_file({"conv_in.weight": torch.zeros(16, 9, 3, 3)}, str(tmp_path / "other.safetensors"))
    with pytest.raises(ConfigError, match=r"base lacks \d+ of the \d+ tensors of student"):
        extract_lora(student, tmp_path / "other.safetensors", tmp_path / "lora.safetensors", rank=4)
    assert {path.name for path in tmp_path.iterdir()} == {"other.safetensors"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_said(pair: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(BackendUnavailable, match="torch finds no GPU"):
        extract_lora(*pair, tmp_path / "lora.safetensors", rank=4, device="cuda")


def test_weights_that_are_no_numbers_are_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    student = shutil.copytree(pair[0] / "unet", tmp_path / "student")
    tensors = load_file(student / UNET_FILE.name)
    tensors["conv_in.weight"][0, 0, 0, 0] = float("nan")
    save_file(tensors, str(student / UNET_FILE.name))
    with pytest.raises(ConfigError, match="conv_in.weight holds infinite or undefined"):
        extract_lora(student, pair[1], tmp_path / "lora.safetensors", rank=4)


def test_a_disk_that_fills_up_leaves_what_was_there(pair: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "lora.safetensors"
    extract_lora(*pair, out, rank=1)
    before = out.read_bytes()
    with pytest.raises(ConfigError, match="already there"):
        extract_lora(*pair, out, rank=2)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limit[1]))
    try:
        with pytest.raises(TrainingError, match="cannot write .*what was there before is kept"):
            extract_lora(*pair, out, rank=2, force=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert {path.name for path in tmp_path.iterdir()} == {out.name} and out.read_bytes() == before


# --- the command ------------------------------------------------------------------------------------------------------
def test_the_command(pair: tuple[Path, Path], prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "lora.safetensors"
    words = ["extract-lora", "--student", str(pair[0]), "--base", str(pair[1]), "--rank", "4", "-o", str(out)]
    assert main([*words, "--dry-run"]) == 0
    assert not out.exists() and "the two fit" in capsys.readouterr().out
    assert main([*words, "--report-ranks", "1,2", "--prompts", str(prompts)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == str(out)
    table = [line.split()[0] for line in lines[:-1]]
    assert table[table.index("rank") :] == ["rank", "base", "1", "2", "4", "full"]
    assert main([*words, "--force", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [row["rank"] for row in facts["ranks"]] == [4] and facts["base_likeness"] is None
    assert main(words) == 1
    assert "already there" in capsys.readouterr().err

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import nitro_rt
from nitro_bench.peers.conversion import converted
from nitro_bench.peers.transformers4 import in_transformers_4_form, stored_dtype

EMOJI = Path(nitro_rt.__file__).parent / "models" / "nitro-emoji"
CONVERT = """
import json, pathlib, sys
request = json.loads(sys.argv[1])
assert request["limit_bytes"] > 2**28
if request["fail"]:
    sys.exit("no luck")
assert (pathlib.Path(request["checkpoint"]) / "unet" / "model.safetensors").is_file()
(pathlib.Path(request["out"]) / "model.bin").write_bytes(b"made")
log = pathlib.Path(request["log"])
log.write_text(log.read_text() + "x")
print("a library that talks")
print(json.dumps({"peak_rss_bytes": 2**30, "versions": {"lib": "1.0"}}))
"""


@pytest.fixture
def given(tmp_path: Path) -> dict[str, Any]:
    unet = tmp_path / "checkpoint" / "unet"
    unet.mkdir(parents=True)
    save_file({"small": np.zeros(2, np.float32), "large": np.zeros(64, np.float16)}, unet / "model.safetensors")
    (tmp_path / "convert.py").write_text(CONVERT)
    (tmp_path / "pins.txt").write_text("lib==1.0\n")
    (tmp_path / "log").write_text("")
    return {
        "models": tmp_path / "models",
        "python": Path(sys.executable),
        "script": tmp_path / "convert.py",
        "model": tmp_path / "checkpoint",
        "settings": {"fail": False, "log": str(tmp_path / "log")},
        "pins": tmp_path / "pins.txt",
    }


def test_a_checkpoint_is_converted_once(given: dict[str, Any], tmp_path: Path) -> None:
    first, second = converted(**given), converted(**given)
    assert first == second and (first.folder / "model.bin").read_bytes() == b"made"
    assert (tmp_path / "log").read_text() == "x"
    assert first.note.endswith("1.0 GiB at peak (lib 1.0)")


def test_a_changed_checkpoint_script_setting_or_pin_is_converted_anew(given: dict[str, Any], tmp_path: Path) -> None:
    folders = {converted(**given).folder}
    save_file({"large": np.ones(64, np.float16)}, tmp_path / "checkpoint" / "unet" / "model.safetensors")
    folders.add(converted(**given).folder)
    (tmp_path / "pins.txt").write_text("lib==1.1\n")
    folders.add(converted(**given).folder)
    (tmp_path / "pins-no-deps.txt").write_text("other==2.0\n")
    folders.add(converted(**given).folder)
    (tmp_path / "convert.py").write_text(CONVERT + "# newer\n")
    folders.add(converted(**given).folder)
    given["settings"]["more"] = 1
    folders.add(converted(**given).folder)
    assert len(folders) == 6 and (tmp_path / "log").read_text() == "x" * 6


def test_a_conversion_that_fails_leaves_nothing_and_says_its_last_word(given: dict[str, Any]) -> None:
    given["settings"]["fail"] = True
    with pytest.raises(RuntimeError, match="^convert.py ended with 1: no luck$"):
        converted(**given)
    assert list(given["models"].iterdir()) == []


def test_what_a_killed_conversion_left_is_removed_by_the_next(given: dict[str, Any]) -> None:
    left = given["models"] / ".making-abc" / "out"
    left.mkdir(parents=True)
    (left / "half.bin").write_bytes(b"x")
    found = converted(**given)
    assert list(given["models"].iterdir()) == [found.folder]


def test_the_largest_tensor_tells_what_weights_are_stored_in(given: dict[str, Any], tmp_path: Path) -> None:
    assert stored_dtype(given["model"]) == "F16"
    with pytest.raises(FileNotFoundError, match="holds no .safetensors file"):
        stored_dtype(tmp_path)


def test_the_form_of_transformers_4_has_its_files_and_names(tmp_path: Path) -> None:
    folder = in_transformers_4_form(EMOJI, tmp_path / "form")
    pieces = json.loads((EMOJI / "tokenizer" / "tokenizer.json").read_text())["model"]
    assert json.loads((folder / "tokenizer" / "vocab.json").read_text()) == pieces["vocab"]
    merges = (folder / "tokenizer" / "merges.txt").read_text().splitlines()
    assert merges[1:3] == ["i n", "t h"] and len(merges) == 1 + len(pieces["merges"])

    name = "text_encoder/model.safetensors"
    before, after = load_file(EMOJI / name), load_file(folder / name)
    assert set(after) == {f"text_model.{key}" for key in before} and not (folder / name).is_symlink()
    assert all(np.array_equal(after[f"text_model.{key}"], before[key]) for key in before)
    assert (folder / "text_encoder_2" / "model.safetensors").is_symlink()  # its names are the older ones already
    assert (folder / "unet").is_dir() and (folder / "unet" / "diffusion_pytorch_model.safetensors").is_symlink()
    assert (folder / "model_index.json").resolve() == EMOJI / "model_index.json"


def test_a_tokenizer_in_the_older_form_is_only_linked(tmp_path: Path) -> None:
    tokenizer = tmp_path / "model" / "tokenizer"
    tokenizer.mkdir(parents=True)
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        (tokenizer / name).write_text("{}")
    folder = in_transformers_4_form(tmp_path / "model", tmp_path / "form")
    assert all((folder / "tokenizer" / name).is_symlink() for name in ("tokenizer.json", "vocab.json", "merges.txt"))

"""The command line: what it prints, where it writes, and its exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from nitro_rt import cli
from nitro_rt.cli import COMMANDS, main
from nitro_rt.cli.build import command as build_command
from nitro_rt.errors import BuildError
from nitro_rt.pipeline import Pipeline
from nitro_rt.png import read_png_text
from nitro_rt.verify import Check

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


def _written() -> list[str]:
    return sorted(path.relative_to(Path.cwd()).as_posix() for path in Path.cwd().rglob("*") if path.is_file())


@pytest.mark.parametrize("arguments", [[], *[[name] for name in COMMANDS]], ids=["nitro-rt", *COMMANDS])
def test_every_command_has_help(arguments: list[str], capsys: Capture) -> None:
    assert main([*arguments, "--help"]) == 0
    output = capsys.readouterr().out
    assert output.startswith(f"Usage: {' '.join(['nitro-rt', *arguments])}")
    if not arguments:
        assert all(name in output for name in COMMANDS)


def test_the_listed_help_is_the_command_s_first_line() -> None:
    assert list(COMMANDS) == sorted(COMMANDS)
    for name in COMMANDS:
        command = cli.cli.get_command(click.Context(cli.cli), name)
        assert command is not None and command.name == name and command.help


def test_version(capsys: Capture) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("nitro-rt ")


@pytest.mark.parametrize(
    "arguments",
    [
        ["paint"],
        ["--colour"],
        ["generate"],
        ["generate", "bundle"],
        ["generate", "bundle", "a dog", "--seed", "seven"],
        ["generate", "bundle", "a dog", "--guidance", "7"],
        ["build", "--steps", "1,x"],
        ["build", "--steps", ""],
        ["build", "--target", "sm86,,sm89"],
        ["build", "--precision", "fp4"],
        ["build", "--backend", "abacus"],
        ["train"],
        ["train", "recipe.toml", "--max-steps", "0"],
        ["inspect"],
        ["verify", "a", "b"],
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_2(arguments: list[str], capsys: Capture) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert "Usage:" in captured.err and not captured.out


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_no_bundle_there_exits_1_in_one_line(command: str, capsys: Capture) -> None:
    assert main([command, "nowhere"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("nitro-rt: no bundle at nowhere") and error.count("\n") == 1


def test_generate_writes_the_named_file(bundle_folder: Path, capsys: Capture) -> None:
    assert main(["generate", str(bundle_folder), "a red apple", "--seed", "7", "--steps", "2", "-o", "new/apple.png"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("new/apple.png  seed 7, steps 2, ") and not captured.err
    assert _written() == ["new/apple.png"]
    text = read_png_text("new/apple.png")
    assert (text["prompt"], text["seed"], text["steps"]) == ("a red apple", "7", "2")
    with Pipeline.load(bundle_folder) as pipe:
        assert text["bundle"] == pipe.bundle.digest
        from PIL import Image

        assert Image.open("new/apple.png").tobytes() == pipe("a red apple", seed=7, steps=2).images[0].tobytes()


def test_generate_draws_a_size_of_the_bundle(make_bundle: Any, tmp_path: Path, capsys: Capture) -> None:
    from PIL import Image

    folder = str(make_bundle(tmp_path / "both", more_sizes_px=(64,)))
    for options, size_px in ([], 32), (["--size", "64"], 64):
        assert main(["generate", folder, "a dog", *options, "--seed", "0", "-o", "a.png", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)[0]["size_px"] == size_px
        with Image.open("a.png") as image:
            assert image.size == (size_px, size_px)
    assert main(["inspect", folder]) == 0
    assert "32x32, 64x64 pixels" in (said := capsys.readouterr().out) and "decode@64" in said
    assert main(["generate", folder, "a dog", "--size", "48"]) == 1
    assert "built: 32, 64; the nearest built size is 32" in capsys.readouterr().err


def test_a_named_file_is_replaced_and_a_made_name_is_not(bundle_folder: Path) -> None:
    for _ in range(2):
        assert main(["generate", str(bundle_folder), "A red, red apple!", "--seed", "7", "-o", "a.png"]) == 0
        assert main(["generate", str(bundle_folder), "A red, red apple!", "--seed", "7"]) == 0
    assert _written() == ["a-red-red-apple-7-2.png", "a-red-red-apple-7.png", "a.png"]


def test_several_prompts_make_numbered_files(bundle_folder: Path, capsys: Capture) -> None:
    prompts = ["a dog", "a red house", "a pear"]  # more than the bundle's batch of 2
    assert main(["generate", str(bundle_folder), *prompts, "--seed", "3", "-o", "out.png", "--json"]) == 0
    records = json.loads(capsys.readouterr().out)
    assert [record["path"] for record in records] == ["out-1.png", "out-2.png", "out-3.png"] == _written()
    assert [record["prompt"] for record in records] == prompts
    assert {record["seed"] for record in records} == {3}
    assert records[0]["timings_ms"]["total"] > 0
    # A prompt's image does not depend on the prompts beside it.
    assert main(["generate", str(bundle_folder), "a pear", "--seed", "3", "-o", "alone.png"]) == 0
    from PIL import Image

    assert Image.open("alone.png").tobytes() == Image.open("out-3.png").tobytes()


def test_a_wrong_bundle_leaves_no_folder(capsys: Capture) -> None:
    assert main(["generate", "nowhere", "a dog", "-o", "new/apple.png"]) == 1
    assert "no bundle at nowhere" in capsys.readouterr().err
    assert not Path("new").exists()


def test_a_folder_is_filled(bundle_folder: Path) -> None:
    assert main(["generate", str(bundle_folder), "a dog", "??", "--seed", "3", "-o", "pictures"]) == 0
    assert _written() == ["pictures/a-dog-3.png", "pictures/image-3.png"]


def test_without_a_seed_each_image_has_its_own(bundle_folder: Path, capsys: Capture) -> None:
    assert main(["generate", str(bundle_folder), "a dog", "a dog", "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)
    assert first["seed"] != second["seed"]
    assert read_png_text(first["path"])["seed"] == str(first["seed"])


def test_a_cut_prompt_is_warned_of_in_one_line(bundle_folder: Path, capsys: Capture) -> None:
    prompt = "a red apple " * 3 + "and blue pear"
    assert main(["generate", str(bundle_folder), prompt, prompt, "a dog", "--seed", "0", "-o", "a.png"]) == 0
    error = capsys.readouterr().err
    assert error.startswith("nitro-rt: warning: the prompt has 14 tokens") and "'blue pear'" in error
    assert error.count("\n") == 1


BAD_GENERATE = {
    "steps not built": (["a dog", "--steps", "3"], "built: 1, 2"),
    "seed out of range": (["a dog", "--seed", "-1"], "out of range"),
    "huge seed": (["a dog", "--seed", str(2**64)], "out of range"),
    "not a png": (["a dog", "-o", "a.jpg"], "does not end in .png"),
    "a file as folder": (["a dog", "-o", "file/a.png"], "cannot be made"),
}


@pytest.mark.parametrize("name", BAD_GENERATE)
def test_generate_refuses_in_one_line(name: str, bundle_folder: Path, capsys: Capture) -> None:
    Path("file").write_text("")
    arguments, message = BAD_GENERATE[name]
    assert main(["generate", str(bundle_folder), *arguments]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("nitro-rt: ") and message in captured.err and captured.err.count("\n") == 1
    assert not captured.out and _written() == ["file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_generate_into_a_folder_that_cannot_be_written(bundle_folder: Path, capsys: Capture) -> None:
    Path("locked").mkdir(mode=0o500)
    assert main(["generate", str(bundle_folder), "a dog", "-o", "locked"]) == 1
    assert "cannot be written" in capsys.readouterr().err


def test_inspect(bundle_folder: Path, capsys: Capture) -> None:
    assert main(["inspect", str(bundle_folder)]) == 0
    output = capsys.readouterr().out
    for expected in ("32x32 pixels, at most 2", "999 -> 249, 499 -> 124", "computes in float32", "next_latents float32 [2, 4"):
        assert expected in output
    assert main(["inspect", str(bundle_folder), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["schedule"]["steps"]["2"]["timesteps"] == [999, 499]
    assert len(data["digest"]) == 64


def test_inspect_sums_up_what_is_quantised(bundle_folder: Path, edit_manifest: Any, capsys: Capture) -> None:
    layers = [{"name": f"layer.{index}", "sqnr_db": 30 + index, "smoothing": "base64"} for index in range(12)]
    recipe = {"precision": "int8", "steps": [1, 2], "layers": layers, "kept": [{"name": "first"}]}
    edit_manifest(bundle_folder, lambda data: data.update(quantisation=recipe))
    assert main(["inspect", str(bundle_folder)]) == 0
    output = capsys.readouterr().out
    assert "precision int8, steps [1, 2]" in output and "12 quantised, 1 kept" in output and "layer.9 39.0 dB" in output
    assert "base64" not in output and "layer.10" not in output


def test_verify(bundle_folder: Path, capsys: Capture) -> None:
    assert main(["verify", str(bundle_folder)]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["ok"] * 4 + ["skipped", "ok", "skipped"]
    assert main(["verify", str(bundle_folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True
    (bundle_folder / "extra").write_text("")
    assert main(["verify", str(bundle_folder), "--json"]) == 1
    captured = capsys.readouterr()
    answer = json.loads(captured.out)
    assert (
        answer["ok"] is False and "'extra'" in answer["error"] and [check["name"] for check in answer["checks"]] == ["manifest"]
    )
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize("stop", [KeyboardInterrupt, ZeroDivisionError])
def test_verify_is_not_ok_before_its_end(
    stop: type[BaseException], bundle_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def stopped(folder: Path) -> Iterator[Check]:
        yield Check(name="manifest", status="ok", detail="")
        raise stop

    monkeypatch.setattr("nitro_rt.verify.verify_bundle", stopped)
    if stop is KeyboardInterrupt:
        assert main(["verify", str(bundle_folder), "--json"]) == 130
    else:
        with pytest.raises(stop):
            main(["verify", str(bundle_folder), "--json"])
    answer = json.loads(capsys.readouterr().out)
    assert answer["ok"] is False and answer["error"] == "the check did not finish"
    assert [check["name"] for check in answer["checks"]] == ["manifest"]


def test_a_bundle_for_a_gpu_is_inspected_and_verified_anywhere(make_bundle: Any, tmp_path: Path, capsys: Capture) -> None:
    folder = str(make_bundle(tmp_path / "gpu", backend="tensorrt-rtx", target={"device": "cuda", "targets": "sm89"}))
    assert main(["inspect", folder]) == 0
    assert "targets sm89" in capsys.readouterr().out
    assert main(["verify", folder]) == 0
    assert "skipped image: " in capsys.readouterr().out
    assert main(["generate", folder, "a dog"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "engines for sm89" in error


def test_doctor(capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NITRO_RT_CACHE", str(tmp_path / "kept"))
    assert main(["doctor"]) == 0
    assert "run openvino" in capsys.readouterr().out
    assert main(["doctor", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["cache"] == str(tmp_path / "kept")
    assert data["versions"]["numpy"] and data["runs"]["openvino"] == data["runs"]["onnxruntime"] == "yes"
    assert data["cpu"]["num_cores"] >= 1 and set(data["runs"]) == set(data["builds"])


def test_doctor_s_cache_is_the_builder_s(monkeypatch: pytest.MonkeyPatch) -> None:
    from nitro_engines.cache import default_cache_root
    from nitro_rt.doctor import cache_folder

    assert cache_folder() == default_cache_root()
    monkeypatch.setenv("NITRO_RT_CACHE", "~/kept")
    assert cache_folder() == default_cache_root()


def test_build_passes_on_what_was_said(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    import nitro_engines

    asked: list[Any] = []

    def build(request: Any, report: Any) -> Any:
        asked.append(request)
        report("text: built")
        raise BuildError("enough\nfor now")

    monkeypatch.setattr(nitro_engines, "build", build)
    options = (
        "--steps 4,1 --model m --precision fp16 --backend tensorrt-rtx --target sm86,sm89 --size 512,1024 --batch 2 "
        "--shift 250 --refit --rebuild --gate-prompts 2 --allow-quality-loss"
    )
    assert main(["build", *options.split(), "--out", "o"]) == 1
    captured = capsys.readouterr()
    assert captured.err == "text: built\nnitro-rt: enough for now\n" and not captured.out
    assert asked == [
        nitro_engines.BuildRequest(
            model="m",
            steps=(1, 4),
            precision="fp16",
            backend="tensorrt-rtx",
            targets=("sm86", "sm89"),
            sizes_px=(512, 1024),
            batch=2,
            shift=250,
            gate_prompts=2,
            allow_quality_loss=True,
            refit=True,
            rebuild=True,
            out=Path("o"),
        )
    ]
    assert main(["build"]) == 1
    assert asked[1] == nitro_engines.BuildRequest()
    assert main(["build", "--backend", "onnxruntime", "--provider", "cuda"]) == 1
    assert asked[2] == nitro_engines.BuildRequest(backend="onnxruntime", provider="cuda")


def test_the_defaults_that_build_shows_are_the_request_s() -> None:
    from nitro_engines import BuildRequest

    default = BuildRequest()
    shown = {option.name: option.show_default for option in build_command.params if isinstance(option, click.Option)}
    expected = {"steps": "1", "model": default.model, "precision": default.precision, "backend": default.backend}
    expected |= {"batch": str(default.batch), "gate_prompts": str(default.gate_prompts)}
    assert {name: value for name, value in shown.items() if isinstance(value, str)} == expected
    assert default.steps == (1,) and default.provider is default.shift is default.out is None
    assert default.targets == default.sizes_px == default.loras == ()


TRAIN = ["train", "r.toml", "--out", "o", "--max-steps", "3", "--resume", "--allow-changed"]


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What `nitro_training` was asked for."""
    import nitro_training

    asked: list[Any] = []

    def train(recipe: Path, *, report: Any, **options: Any) -> Path:
        asked.append((recipe, options))
        for done in range(1001):
            report("student", done, 1000, {"d_loss": 0.5, "d_loss/t10": 0.4, "g_loss": 0.25, "g_grad_norm": 1.0})
        return Path("runs/x/checkpoint")

    def describe(recipe: Path, max_steps: int | None) -> str:
        asked.append((recipe, max_steps))
        return "student: 3 steps"

    monkeypatch.setitem(vars(nitro_training), "train", train)  # setattr would import the real one, and torch
    monkeypatch.setitem(vars(nitro_training), "describe", describe)
    return asked


def test_train_passes_on_what_was_said(trained: list[Any], capsys: Capture) -> None:
    assert main(TRAIN) == 0
    assert trained == [(Path("r.toml"), {"out": Path("o"), "max_steps": 3, "resume": True, "allow_changed": True})]
    captured = capsys.readouterr()
    assert captured.out == "runs/x/checkpoint\n"
    first, last = captured.err.splitlines()
    assert first == "student: 0 of 1000 d_loss 0.5, g_loss 0.25", "of some twenty numbers those that fit into a line"
    assert last == "student: 1000 of 1000 d_loss 0.5, g_loss 0.25"


def test_a_dry_run_describes_and_does_not_train(trained: list[Any], capsys: Capture) -> None:
    assert main([*TRAIN, "--dry-run"]) == 0
    assert trained == [(Path("r.toml"), 3)]
    assert capsys.readouterr().out == "student: 3 steps\n"


def test_of_several_processes_the_first_speaks(trained: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setenv("RANK", "1")
    assert main(TRAIN) == main([*TRAIN, "--dry-run"]) == 0
    assert len(trained) == 1, "all train, one describes"
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("command", ["build", "train"])
def test_a_missing_package_gives_the_pip_line(command: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    import nitro_engines
    import nitro_training

    def lacking(*args: Any, **kwargs: Any) -> Any:
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.setattr(nitro_engines, "build", lacking)
    monkeypatch.setitem(vars(nitro_training), "train", lacking)
    assert main([command, *(["r.toml"] if command == "train" else [])]) == 1
    extra = {"build": "cpu,export", "train": "train"}[command]
    assert capsys.readouterr().err == (
        f"nitro-rt: this needs the package torch, which is not installed; pip install 'nitro-rt[{extra}]'\n"
    )


def test_our_own_missing_module_is_a_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nitro_training", None)
    with pytest.raises(ModuleNotFoundError):
        main(["train", "r.toml"])


def test_a_bug_keeps_its_traceback(bundle_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nitro_rt.bundle.open_bundle", lambda folder: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["inspect", str(bundle_folder)])


def test_ctrl_c_exits_130_in_one_line(bundle_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    def interrupted(folder: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("nitro_rt.bundle.open_bundle", interrupted)
    assert main(["inspect", str(bundle_folder)]) == 130
    assert capsys.readouterr().err.strip() == "nitro-rt: interrupted"


def test_the_module_runs_too(bundle_folder: Path) -> None:
    command = [sys.executable, "-m", "nitro_rt", "inspect", str(bundle_folder), "--json"]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(answer.stdout)["name"] == "tiny"


def test_an_unreadable_pipe_is_no_traceback(bundle_folder: Path) -> None:
    command = f"{sys.executable} -m nitro_rt inspect {bundle_folder} --json | head -c 1"
    answer = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert "Traceback" not in answer.stderr


@pytest.fixture
def small_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of one record and one file that nothing names."""
    root = tmp_path / "cache"
    (root / "gates").mkdir(parents=True)
    (root / "gates" / f"{'0' * 64}.json").write_text("{}")
    (root / "engines" / "files").mkdir(parents=True)
    (root / "engines" / "files" / f"{'1' * 64}.plan").write_bytes(bytes(3 << 20))
    monkeypatch.setenv("NITRO_RT_CACHE", str(root))
    return root


def test_cache_lists_and_prunes(small_cache: Path, capsys: Capture) -> None:
    assert main(["cache"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["what", "size", "age", "last", "use"] and lines[1].startswith("gates  1 of them")
    assert lines[2] == "1 unnamed files, 3.0 MiB: nitro-rt cache prune removes them"
    assert lines[3] == f"{small_cache}: 3.0 MiB, what is shared counted once"
    assert main(["cache", "prune", "--dry-run"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("would be removed: 0 things, and 1 files")
    assert main(["cache", "prune", "--older-than", "30d", "--max-size", "1KB", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["removed"], told["unnamed_files"], told["freed_bytes"]) == ([], 1, 3 << 20)
    assert main(["cache", "prune", "--max-size", "0B"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("removed: 1 things, and 0 files")
    assert main(["cache", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["items"] == []


@pytest.mark.parametrize(
    "options", [["--older-than", "30"], ["--older-than", "a month"], ["--max-size", "20"], ["--max-size", "-1GB"]]
)
def test_wrong_ages_and_sizes_exit_2(options: list[str], small_cache: Path, capsys: Capture) -> None:
    assert main(["cache", "prune", *options]) == 2
    assert "such as" in capsys.readouterr().err

"""Guards against drift: what the repository promises in README, pyproject.toml and Makefile is there, and no more."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

from nitro_bench.environment import canonical, closure

ROOT = Path(__file__).parents[1]
ROOMS = {
    "nitro_rt": ROOT / "nitro_rt",
    "nitro_export": ROOT / "export/nitro_export",
    "nitro_engines": ROOT / "engines/nitro_engines",
    "nitro_training": ROOT / "training/nitro_training",
    "nitro_bench": ROOT / "benchmarks/nitro_bench",
}
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
README = (ROOT / "README.md").read_text(encoding="utf-8")
LEFT_OUT = {"torch", "diffusers", "transformers", "onnx", "nitro_export", "nitro_engines", "nitro_training", "nitro_bench"}
"""What no module of nitro_rt may load."""
BACKENDS = {"onnxruntime", "openvino", "tensorrt", "tensorrt_rtx", "cuda"}
"""What only a backend's own module loads, when a bundle asks for it."""
MAKE_TARGETS = {"demo", "test", "test-full", "check", "fix", "bench", "emoji-data", "emoji-model"}

# Written so that these lines do not match themselves.
FORBIDDEN_TEXT = {
    "a path of somebody's machine": re.compile(r"(?<![\w.>])/(?:work|root|farm|Users|home/\w+|tmp/\w+)/"),
    "a package registry's address": re.compile(
        r"index[-]url|pypi[.]org|pythonhosted[.]|registry[.]npm|download[.]pytorch|//deb[.]"
    ),
}


def run(*command: str, cwd: Path = ROOT) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="session")
def tracked_files() -> list[Path]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout, so nothing is tracked")
    names = run("git", "ls-files", "-z").split("\0")
    return [ROOT / name for name in names if name and (ROOT / name).is_file()]


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder))
    (built,) = folder.glob("*.whl")
    return built


@pytest.mark.parametrize("what", FORBIDDEN_TEXT)
def test_tracked_files_hold_no(what: str, tracked_files: list[Path]) -> None:
    found = []
    for path in tracked_files:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # weights and pictures
        for number, line in enumerate(text.splitlines(), start=1):
            if FORBIDDEN_TEXT[what].search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert not found, "\n".join(found)


def test_forbidden_text_is_recognised() -> None:
    path, address = FORBIDDEN_TEXT.values()
    assert path.search("see /" + "work/main") and path.search('"/' + 'home/ann/x"')
    assert not path.search("example.org/work/x") and not path.search("data/root/x")
    assert address.search("--index-" + "url=x") and address.search("https://pypi" + ".org/simple")


def test_tracked_files_hold_no_pickles(tracked_files: list[Path]) -> None:
    assert not [path for path in tracked_files if path.suffix in {".pkl", ".pickle", ".pt", ".pth", ".ckpt", ".bin"}]


def test_make_has_the_targets_of_the_design_and_readme() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z][a-z-]*):", makefile, re.MULTILINE))
    assert targets >= MAKE_TARGETS
    assert set(re.findall(r"\bmake ([a-z][a-z-]*)", "\n".join(code_of(README)))) <= targets


def test_ci_runs_the_same_targets() -> None:
    assert "make check test" in (ROOT / ".ci/run").read_text(encoding="utf-8")
    assert (ROOT / ".ci/run").stat().st_mode & 0o111


def test_readme_commands_and_options_exist() -> None:
    lines = re.findall(r"^ {4}(nitro-rt .+)$", README, re.MULTILINE)
    assert len(lines) >= 6
    for line in lines:
        words = line.partition("#")[0].split()
        known = run(*nitro_rt_command(), words[1], "--help")
        for option in re.findall(r"(?<=\s)--?[a-z][a-z-]*", line.partition("#")[0]):
            assert option in known, f"{line}: {option} is not in nitro-rt {words[1]} --help"


def test_readme_names_of_the_package_exist() -> None:
    import nitro_rt

    (imported,) = re.findall(r"^from nitro_rt import (.+)$", README, re.MULTILINE)
    for name in imported.split(", "):
        assert name in nitro_rt.__all__


@pytest.mark.parametrize(
    "command",
    [["nitro-rt"], ["-m", "nitro_bench.lean"], ["examples/demo.py"]],
    ids=["nitro-rt", "nitro_bench.lean", "examples/demo.py"],
)
def test_commands_start(command: list[str]) -> None:
    start = nitro_rt_command() if command == ["nitro-rt"] else [sys.executable, *command]
    assert "usage" in run(*start, "--help").lower()


def test_the_only_script_is_nitro_rt() -> None:
    scripts = metadata.distribution("nitro-rt").entry_points.select(group="console_scripts")
    assert {script.name: script.value for script in scripts} == {"nitro-rt": "nitro_rt.cli:main"}


WALK = """
import importlib, json, pkgutil, sys
import nitro_rt
from nitro_rt import *
names = [found.name for found in pkgutil.walk_packages(nitro_rt.__path__, "nitro_rt.") if not found.name.endswith("__main__")]
names = [name for name in names if name.startswith(sys.argv[1])]
for name in names: importlib.import_module(name)
print(json.dumps([len(names), sorted({name.partition(".")[0] for name in sys.modules})]))
"""


# What import-linter cannot see: whether an import inside a command stays inside it.
@pytest.mark.parametrize(
    ("part", "absent"),
    [("nitro_rt.", LEFT_OUT), ("nitro_rt.cli", LEFT_OUT | BACKENDS)],
    ids=["every module", "public names and the command line"],
)
def test_importing_nitro_rt_loads_no_sibling(part: str, absent: set[str]) -> None:
    num_modules, loaded = json.loads(run(sys.executable, "-c", WALK, part))
    assert num_modules >= 5
    assert sorted(set(loaded) & absent) == []


def test_the_core_dependencies_are_what_nitro_rt_imports() -> None:
    declared = {canonical(re.split(r"[^\w.-]", need)[0]) for need in PYPROJECT["project"]["dependencies"]}
    distributions = {"PIL": "pillow", "cuda": "cuda-core"}
    optional = LEFT_OUT | BACKENDS | set(ROOMS)
    imported = set()
    for path in ROOMS["nitro_rt"].rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                imported.add(node.module.partition(".")[0])
    needed = {canonical(distributions.get(name, name)) for name in imported - sys.stdlib_module_names - optional}
    assert needed == declared


def test_constraints_pin_all_that_is_installed() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    installed = closure(["nitro-rt[dev]"]).versions
    installed.pop("nitro-rt")
    # torch's CPU build calls itself 2.13.0+cpu; a pin without the local part accepts it.
    assert {name: version.partition("+")[0] for name, version in installed.items()} == {
        name: pins.get(name, "no pin") for name in installed
    }
    # No CUDA library; nvidia-ml-py is one Python file that asks a driver, where there is one.
    assert not [name for name in installed if name.startswith("nvidia-") and name != "nvidia-ml-py"]


def test_wheel_holds_the_five_packages_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
    for package, folder in ROOMS.items():
        sources = {f"{package}/{path.relative_to(folder).as_posix()}" for path in folder.rglob("*.py")}
        assert sources <= set(names)
        assert f"{package}/py.typed" in names
    assert {name.partition("/")[0] for name in names} == set(ROOMS)
    assert not [name for name in names if name.endswith((".pyc", ".onnx"))]


def test_wheel_carries_recipes_models_and_licences(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    recipes = {f"nitro_training/recipes/{path.name}" for path in (ROOT / "training/recipes").iterdir()}
    models = ROOT / "nitro_rt/models"
    shipped = {f"nitro_rt/models/{path.relative_to(models).as_posix()}" for path in models.rglob("*") if path.is_file()}
    assert len(recipes) >= 2 and shipped
    assert recipes | shipped <= names
    assert {Path(name).name for name in names if "/licenses/" in name} == {"LICENSE", "THIRD_PARTY.md"}


def test_wheel_packages_import_from_where_they_are_installed(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    script = f"""
import sys; sys.path.insert(0, {str(tmp_path)!r})
for name in {sorted(ROOMS)!r}: print(__import__(name).__file__)
"""
    files = run(sys.executable, "-c", script, cwd=tmp_path).split()
    assert [Path(file).parent for file in files] == [tmp_path / name for name in sorted(ROOMS)]


def code_of(markdown: str) -> list[str]:
    """The indented blocks and the inline code of a page."""
    return re.findall(r"(?:^ {4}.*\n?)+", markdown, re.MULTILINE) + re.findall(r"`([^`\n]+)`", markdown)


def nitro_rt_command() -> list[str]:
    return [str(Path(sys.executable).with_name("nitro-rt"))]

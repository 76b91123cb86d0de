"""The public surface: exact names, and an import that loads nothing heavy."""

from __future__ import annotations

import json
import resource
import subprocess
import sys

import pytest

import nitro_rt

HEAVY = (
    "torch", "diffusers", "transformers", "onnx", "onnxruntime", "openvino", "tensorrt", "tensorrt_rtx", "cuda",
    "numpy", "PIL", "tokenizers", "click", "rich",
)  # fmt: skip
NEVER = ("torch", "diffusers", "transformers", "onnx", "tensorrt", "tensorrt_rtx", "cuda")


def test_all_is_sorted_and_every_name_is_there() -> None:
    assert nitro_rt.__all__ == sorted(nitro_rt.__all__)
    for name in nitro_rt.__all__:
        assert getattr(nitro_rt, name).__module__.startswith("nitro_rt.")
    assert set(nitro_rt.__all__) <= set(dir(nitro_rt))


def test_all_is_exactly_the_public_names() -> None:
    from nitro_rt import errors

    public_errors = {name for name in vars(errors) if isinstance(getattr(errors, name), type)}
    others = {"Bundle", "ComputeTypeDiffers", "Pipeline", "PromptTruncated", "Result", "open_bundle"}
    assert set(nitro_rt.__all__) == public_errors | others


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="Pipelines"):
        nitro_rt.Pipelines  # noqa: B018


def _loaded_after(code: str) -> set[str]:
    """Top-level modules in a fresh interpreter after `code`."""
    script = f"{code}\nimport sys, json\nprint(json.dumps(sorted({{name.partition('.')[0] for name in sys.modules}})))"
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(json.loads(answer.stdout.splitlines()[-1]))


def test_import_loads_nothing_heavy() -> None:
    assert not _loaded_after("import nitro_rt") & set(HEAVY)


def test_the_command_line_loads_click_only() -> None:
    assert not _loaded_after("import nitro_rt.cli; nitro_rt.cli.main(['--help'])") & (set(HEAVY) - {"click"})


def test_the_pipeline_needs_numpy_only() -> None:
    assert not _loaded_after("from nitro_rt import Pipeline") & (set(HEAVY) - {"numpy"})


def test_drawing_loads_no_training_library(bundle_folder: object) -> None:
    code = f"from nitro_rt import Pipeline\nwith Pipeline.load({str(bundle_folder)!r}) as pipe: pipe('a dog').images"
    loaded = _loaded_after(code)
    assert {"numpy", "PIL", "tokenizers"} <= loaded
    assert not loaded & {*NEVER, "openvino", "onnxruntime"}


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
def test_drawing_on_a_host_backend_loads_no_training_library(backend: str, make_bundle: object, tmp_path: object) -> None:
    folder = make_bundle(tmp_path / "bundle", backend=backend)  # type: ignore[operator]
    code = f"from nitro_rt import Pipeline\nwith Pipeline.load({str(folder)!r}) as pipe: pipe('a dog')"
    assert not _loaded_after(code) & set(NEVER)


def test_help_starts_at_once() -> None:
    """Processor time, interpreter start included, best of five: wall time would measure what else the machine does.

    150 ms are promised; an idle machine takes 50.
    """
    times_s = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "nitro_rt", "--help"], capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times_s.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(times_s) < 0.15

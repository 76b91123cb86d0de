"""What peers are given and how they are set up; their own environments are tried in test_peers_for_real.py."""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from checkpoints import make_tiny_sdxl
from nitro_bench.peers import catalogue
from nitro_bench.peers.adapter import CannotRun
from nitro_bench.peers.diffusers_pipeline import Adapter, compile_parts
from nitro_bench.peers.onnxruntime_pipeline import CPU, CUDA, require_provider
from nitro_bench.peers.openvino_common import export, properties
from nitro_bench.peers.stages import Stages
from nitro_rt.noise import draw_noise
from oracle import oracle_images

ROOT = Path(__file__).resolve().parents[2]
PROMPTS, SEED, SHIFT, SIZE = ("a red apple", "the blue house"), 11, 500, 64


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_sdxl(tmp_path_factory.mktemp("tiny") / "tiny", size_px=SIZE)


@pytest.fixture(scope="module")
def loaded(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Adapter]:
    num_threads = torch.get_num_threads()
    adapter = Adapter()
    assert set(adapter.import_libraries()) == {"diffusers", "torch", "transformers"}
    facts = adapter.load(
        {
            "model": str(checkpoint),
            "size_px": SIZE,
            "batch": len(PROMPTS),
            "steps": (1, 2, 4),
            "shift": SHIFT,
            "work": str(tmp_path_factory.mktemp("work")),
            "options": {"threads": "1"},
        }
    )
    assert facts["compute_dtype"] == "float32" and facts["notes"] == ["1 thread; UNet and decoder channels last"]
    yield adapter
    adapter.close()
    torch.set_num_threads(num_threads)


def drawing_of(folder: Path, steps: int, seed: int = SEED) -> dict[str, Any]:
    path = folder / f"noise-{steps}-{seed}.npy"
    np.save(path, draw_noise(seed, steps, len(PROMPTS), len(PROMPTS), (4, SIZE // 8, SIZE // 8)))
    return {"prompts": PROMPTS, "seed": seed, "steps": steps, "size_px": SIZE, "noise": str(path)}


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_a_pipeline_draws_the_oracles_pictures_from_the_noise_file(
    loaded: Adapter, checkpoint: Path, tmp_path: Path, steps: int
) -> None:
    draw = loaded.prepare(drawing_of(tmp_path, steps))
    first, second = (np.stack([np.asarray(image) for image in draw()]) for _ in range(2))
    assert np.array_equal(first, second)
    expected = oracle_images(checkpoint, PROMPTS, seed=SEED, steps=steps, shift=SHIFT)
    # Our noise and torch's differ by 5e-7, and channels last changes the order of sums.
    assert np.abs(first.astype(int) - expected).max() <= 1
    assert set(loaded.timings_ms()) == {"text", "denoise", "decode"}


def test_only_the_last_step_takes_no_fresh_noise(loaded: Adapter, tmp_path: Path) -> None:
    drawing = drawing_of(tmp_path, 2)
    before = np.stack([np.asarray(image) for image in loaded.prepare(drawing)()])
    noise = np.load(drawing["noise"])
    noise[1] = -noise[1]
    np.save(drawing["noise"], noise)
    after = np.stack([np.asarray(image) for image in loaded.prepare(drawing)()])
    assert np.abs(before.astype(int) - after).max() > 10


def test_guidance_is_off_so_the_networks_batch_is_the_image_batch(loaded: Adapter, tmp_path: Path) -> None:
    batches = []
    hook = loaded._pipe.unet.conv_in.register_forward_pre_hook(lambda module, inputs: batches.append(len(inputs[0])))
    loaded.prepare(drawing_of(tmp_path, 2))()
    hook.remove()
    assert batches == [len(PROMPTS)] * 2


def test_a_drawing_that_does_not_fit_is_refused(loaded: Adapter, tmp_path: Path) -> None:
    drawing = drawing_of(tmp_path, 2)
    with pytest.raises(CannotRun, match="was loaded for 2 images per call, and got 1 prompts"):
        loaded.prepare(drawing | {"prompts": PROMPTS[:1]})
    with pytest.raises(ValueError, match="the noise is for 2 steps, the image for 4"):
        loaded.prepare(drawing | {"steps": 4})


def test_what_is_not_here_says_so(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    request = {"model": str(checkpoint), "options": {"device": "cuda"}}
    with pytest.raises(CannotRun, match=r"needs an NVIDIA GPU and its driver, and torch .* finds none"):
        Adapter().load(request)
    with pytest.raises(CannotRun, match="no compiler 'magic'; there are inductor, torch_tensorrt"):
        compile_parts(None, "magic", tmp_path)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(CannotRun, match="needs a C"):
        compile_parts(None, "inductor", tmp_path)
    monkeypatch.setitem(sys.modules, "torch_tensorrt", None)
    with pytest.raises(CannotRun, match="torch_tensorrt does not import"):
        compile_parts(None, "torch_tensorrt", tmp_path)
    require_provider([CUDA, CPU], CUDA, "unet")
    with pytest.raises(CannotRun, match=f"unet runs on {CPU} instead of {CUDA}"):
        require_provider([CPU], CUDA, "unet")
    with pytest.raises(CannotRun, match="the environment of optimum-intel, which exports for it, is not made; make peers"):
        export({"model": str(checkpoint), "options": {"export_python": str(tmp_path / "python")}})


def test_openvino_computes_in_what_is_asked_for_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    assert properties({})["INFERENCE_PRECISION_HINT"] == "f32"
    assert properties({"threads": "3"})["INFERENCE_NUM_THREADS"] == 3

    class Core:
        def get_property(self, device: str, name: str) -> list[str]:
            return ["FP32", "INT8"]

    monkeypatch.setattr("openvino.Core", Core)
    with pytest.raises(CannotRun, match="does not compute in bfloat16, OpenVINO lists FP32, INT8"):
        properties({"precision": "bf16"})


def test_stages_add_up_until_they_are_cleared() -> None:
    stages = Stages()
    call = stages.timed("denoise", lambda value: value + 1)
    assert call(1) == 2 and call(2) == 3
    once = stages.ms["denoise"]
    assert once > 0
    stages.clear()
    assert stages.ms == {}


def test_every_peer_has_an_adapter_that_loads_nothing_its_environment_may_lack() -> None:
    for peer in catalogue.PEERS.values():
        assert re.fullmatch(r"[a-z0-9-]+", peer.name) and peer.adapter.is_file()
    for path in sorted(catalogue.FOLDER.glob("*.py")):
        if path.name == "catalogue.py":  # the benchmark's own side
            continue
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                ours = name == "nitro_bench.peers" or name.startswith("nitro_bench.peers.")
                assert ours or name.partition(".")[0] in sys.stdlib_module_names, (
                    f"{path.name} imports {name} when it is loaded"
                )


def test_every_environment_is_pinned_exactly_and_made_by_make_peers() -> None:
    made = re.search(r"^PEERS := (.*)\$\(if \$\(wildcard \S+\),(.*)\)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert made is not None
    environments = {peer.python.parents[1].name: peer.how_to_make for peer in catalogue.PEERS.values()}
    assert {*made[1].split()} == {name for name, how in environments.items() if how == catalogue.HOW_TO_MAKE}
    assert {*made[2].split()} == {name for name, how in environments.items() if how == catalogue.HOW_TO_MAKE_FOR_GPU}
    for path in catalogue.REQUIREMENTS.glob("*.txt"):
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
        for line in lines:
            included = re.fullmatch(r"-r (\S+)", line)
            assert re.fullmatch(r"[a-z0-9-]+==[0-9a-z.]+", line) or included, f"{path.name}: {line}"
            assert included is None or (catalogue.REQUIREMENTS / included[1]).is_file()
    assert set(environments) <= {path.stem for path in catalogue.REQUIREMENTS.glob("*.txt")}


def test_the_page_on_peers_names_each() -> None:
    page = (ROOT / "docs" / "peers.md").read_text(encoding="utf-8")
    assert [name for name in catalogue.PEERS if f"`{name}`" not in page] == []


def test_options_are_strings_that_a_request_can_carry() -> None:
    for peer in catalogue.PEERS.values():
        assert json.loads(json.dumps(dict(peer.options))) == dict(peer.options)
        assert all(isinstance(value, str) for value in peer.options.values())

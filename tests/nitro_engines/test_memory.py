"""The memory plan: its arithmetic on SDXL's own shapes, what it refuses, and small measured runs beside it."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nitro_engines.memory import GIB, MIB, MemoryForecast, Step, activation_numbers, plan_memory
from nitro_export import read_checkpoint
from nitro_rt.errors import BuildError

FORECAST = MemoryForecast(
    weight_bytes={"denoise": 5 * GIB},
    activation_bytes={"denoise": GIB},
    steps=(Step(name="exporting", held_bytes=GIB), Step(name="compiling denoise/1", held_bytes=10 * GIB, mapped_bytes=5 * GIB)),
    disk_bytes=5 * GIB,
    available_bytes=12 * GIB,
    free_disk_bytes=80 * GIB,
    gpu_bytes=9 * GIB,
    targets=("sm89",),
)


def test_mapped_files_do_not_decide() -> None:
    assert FORECAST.fits and FORECAST.steps[1].peak_bytes > FORECAST.available_bytes
    FORECAST.require()
    assert "go" in FORECAST.lines()[-1] and "fits a card of 10 GiB" in "\n".join(FORECAST.lines())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"available_bytes": 8 * GIB}, "compiling denoise/1 needs 10.0 GiB, 8.0 GiB are available"),
        ({"free_disk_bytes": GIB}, "the cache's disk needs 5.0 GiB, 1.0 GiB are free"),
        ({"gpu_bytes": 50 * GIB}, "running needs 50.0 GiB of GPU memory, the largest sm89 card has 48 GiB"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_numbers(change: dict[str, int], message: str) -> None:
    forecast = dataclasses.replace(FORECAST, **change)
    assert not forecast.fits and message in forecast.lines()[-1]
    with pytest.raises(BuildError, match=f"does not fit: {message}.* Choose a smaller --size") as caught:
        forecast.require()
    assert "exporting" not in str(caught.value)
    assert json.loads(json.dumps(forecast.as_dict()))["refusals"] == [message]


@pytest.fixture
def sdxl(checkpoint: Path) -> Path:
    """SDXL's shapes in a checkpoint of holes: true configs, and weight files with headers but no values."""
    folder = checkpoint
    unet = json.loads((folder / "unet" / "config.json").read_text())
    text = {"max_position_embeddings": 77, "vocab_size": 49408}
    configs = {
        "unet": unet
        | {
            "sample_size": 128,
            "block_out_channels": [320, 640, 1280],
            "cross_attention_dim": 2048,
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        "vae": {"block_out_channels": [128, 256, 512, 512]},
        "text_encoder": text | {"hidden_size": 768, "intermediate_size": 3072, "projection_dim": 768},
        "text_encoder_2": text | {"hidden_size": 1280, "intermediate_size": 5120, "projection_dim": 1280},
    }
    numbers = {"unet": 2_567_463_684, "vae": 49_490_199, "text_encoder": 123_060_480, "text_encoder_2": 694_659_840}
    for part, config in configs.items():
        (folder / part / "config.json").write_text(json.dumps(config))
        (path,) = (folder / part).glob("*.safetensors")
        size, rest = divmod(numbers[part], 1680)
        ends = [2 * size * (index + 1) for index in range(1680)]
        ends[-1] += 2 * rest
        entries = {
            f"decoder.{index}": {"dtype": "F16", "shape": [(end - begin) // 2], "data_offsets": [begin, end]}
            for index, (begin, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True))
        }
        header = json.dumps(entries).encode()
        with path.open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.truncate(8 + len(header) + 2 * numbers[part])
    return folder


def test_the_plan_of_sdxl_is_what_was_measured(tmp_path: Path, sdxl: Path) -> None:
    """docs/memory.md has the runs: full size, 1024 px, on a machine of 2 cores and 24 GiB."""
    checkpoint = read_checkpoint(sdxl)
    options = {
        "precision": "fp16",
        "num_steps": (1,),
        "size_px": 1024,
        "batch": 1,
        "cache_root": tmp_path,
        "available": 21 * GIB,
    }
    rtx = plan_memory(checkpoint, backend="tensorrt-rtx", compute_dtype="float16", targets=("sm89",), **options)  # type: ignore[arg-type]
    host = plan_memory(checkpoint, backend="openvino", compute_dtype="float32", **options)  # type: ignore[arg-type]
    peaks = {step.name: step.peak_bytes / GIB for step in (*rtx.steps, *host.steps)}
    measured = {"exporting": 0.66, "compiling text": 3.86, "compiling denoise/1": 14.31, "compiling decode": 0.61}
    for name, gib in measured.items():
        assert peaks[name] == pytest.approx(gib, rel=0.15), name
    loaded = (host.steps[-1].held_bytes - sum(host.activation_bytes.values())) / GIB
    assert host.steps[-1].name == "running on this CPU" and loaded == pytest.approx(14.39, rel=0.15)
    assert host.activation_bytes["denoise"] / GIB == pytest.approx(0.27, rel=0.15)
    assert rtx.fits and host.fits
    assert not plan_memory(checkpoint, backend="openvino", compute_dtype="float32", **options | {"available": 8 * GIB}).fits  # type: ignore[arg-type]


def test_the_plan_of_an_int8_build_is_what_was_measured(tmp_path: Path, sdxl: Path) -> None:
    """docs/memory.md: calibration of 512 px peaked at 7.4 to 8.0 GiB, the references' pictures at 8.0 to 8.6."""
    forecast = plan_memory(
        read_checkpoint(sdxl),
        precision="int8",
        num_steps=(1,),
        size_px=512,
        batch=1,
        backend="openvino",
        compute_dtype="float32",
        cache_root=tmp_path,
        gated=True,
    )
    peaks = {step.name: step.peak_bytes / GIB for step in forecast.steps}
    assert peaks["calibrating the denoiser"] == pytest.approx(7.7, rel=0.1)
    assert peaks["calibrating the decoder"] < peaks["calibrating the denoiser"]
    assert peaks["drawing the references"] == pytest.approx(8.3, rel=0.15)


def test_onnxruntime_on_a_gpu_needs_the_gpus_memory(tmp_path: Path, sdxl: Path) -> None:
    checkpoint = read_checkpoint(sdxl)
    options = {"precision": "fp16", "num_steps": (1,), "size_px": 1024, "batch": 1, "cache_root": tmp_path, "gated": True}
    found = {
        provider: plan_memory(checkpoint, backend="onnxruntime", compute_dtype="float16", provider=provider, **options)  # type: ignore[arg-type]
        for provider in ("cpu", "cuda", "tensorrt")
    }
    assert found["cpu"].gpu_bytes is None
    assert found["cuda"].gpu_bytes == found["tensorrt"].gpu_bytes == pytest.approx(9.4 * GIB, rel=0.1)
    assert any(line.startswith("GPU ") for line in found["cuda"].lines())
    # Judged on the CPU where the GPU is not here.
    assert [forecast.steps[-1].name for forecast in found.values()] == ["running on this CPU"] * 3


def test_new_bytes_on_disk(tmp_path: Path, sdxl: Path) -> None:
    """Links take nothing; a quantised network does, and a plan, which all step counts share."""

    def disk_gib(precision: str, backend: str = "openvino", built: frozenset[str] = frozenset()) -> float:
        forecast = plan_memory(
            read_checkpoint(sdxl),
            precision=precision,
            num_steps=(1, 4),
            size_px=1024,
            batch=1,
            backend=backend,
            compute_dtype="float16",
            cache_root=tmp_path,
            built=built,
        )
        return forecast.disk_bytes / GIB

    assert disk_gib("fp16") == 0
    assert disk_gib("int8") == pytest.approx(2.44, abs=0.01)
    assert disk_gib("fp32") == pytest.approx(12.79, abs=0.01)
    assert disk_gib("fp16", "tensorrt-rtx") == pytest.approx(4.78 + 1.52 + 0.09, abs=0.02)
    built = frozenset({"denoise/1", "denoise/4"})
    assert disk_gib("fp16", "tensorrt-rtx", built) == pytest.approx(1.52 + 0.09, abs=0.02)


def test_an_assembled_checkpoint_is_written_and_then_linked_to(
    tmp_path: Path, sdxl: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its outline lies elsewhere, in the folder for temporary files, which says nothing of where its weights will be."""

    def disk_bytes(**changes: Any) -> int:
        options = {"precision": "fp16", "num_steps": (1,), "size_px": 1024, "batch": 1, "backend": "openvino"}
        forecast = plan_memory(
            read_checkpoint(sdxl), compute_dtype="float32", cache_root=tmp_path / "cache", **(options | changes)
        )
        return forecast.disk_bytes

    stat = Path.stat
    elsewhere = {"st_dev": -1}
    monkeypatch.setattr(
        Path, "stat", lambda path, **how: SimpleNamespace(**(vars_of(stat(path, **how)) | (elsewhere if path == sdxl else {})))
    )
    assert disk_bytes() > 6 * GIB
    assert disk_bytes(stored_at=tmp_path / "cache" / "models" / "abc", assembled_bytes=5 * GIB) == 5 * GIB


def vars_of(facts: os.stat_result) -> dict[str, Any]:
    return {name: getattr(facts, name) for name in dir(facts) if name.startswith("st_")}


def test_activations_grow_with_size_and_batch(sdxl: Path) -> None:
    checkpoint = read_checkpoint(sdxl)
    small, large, two = (
        activation_numbers(checkpoint, size_px=size, batch=batch) for size, batch in ((512, 1), (1024, 1), (512, 2))
    )
    assert (
        large["denoise"] == 4 * small["denoise"] and large["decode"] == 4 * small["decode"] and large["text"] == small["text"]
    )
    assert two == {stage: 2 * numbers for stage, numbers in small.items()}


PEAK = "import resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"


@pytest.mark.slow
def test_a_measured_export_is_within_the_plan(tmp_path: Path) -> None:
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from checkpoints import make_tiny_sdxl

    folder = make_tiny_sdxl(tmp_path / "tiny")
    code = (
        f"import sys; from pathlib import Path; from nitro_export import export_checkpoint\n"
        f"export_checkpoint(Path({str(folder)!r}), Path({str(tmp_path / 'graphs')!r}), steps=(1,), precision='fp16')\n{PEAK}"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    forecast = plan_memory(
        read_checkpoint(folder),
        precision="fp16",
        num_steps=(1,),
        size_px=64,
        batch=1,
        backend="openvino",
        compute_dtype="float32",
        cache_root=tmp_path,
    )
    (export,) = (step for step in forecast.steps if step.name == "exporting")
    assert export.peak_bytes / MIB == pytest.approx(int(found.stdout) / 1024, rel=0.15)

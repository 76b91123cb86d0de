from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nitro_engines.models import resolve_model
from nitro_engines.request import BuildRequest
from nitro_export import read_checkpoint
from nitro_rt.errors import ConfigError


def resolved(checkpoint: Path, **options: Any) -> BuildRequest:
    request = BuildRequest(model=str(checkpoint), **options)
    return request.resolved(resolve_model(request.model), read_checkpoint(checkpoint))


def test_defaults() -> None:
    request = BuildRequest()
    assert (request.model, request.steps, request.precision, request.backend) == ("nitro-emoji", (1,), "fp32", "openvino")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": ()}, "--steps must be one or more of 1 to 4, got none"),
        ({"steps": (0,)}, "--steps must be one or more of 1 to 4, got 0"),
        ({"steps": (1, 5)}, "got 1, 5"),
        ({"gate_prompts": 0}, "--gate-prompts must be from 1 to 16, got 0"),
        ({"gate_prompts": 17}, "got 17"),
        ({"precision": "half"}, "--precision 'half' is unknown; available: fp32, fp16"),
        ({"batch": 0}, "--batch must be from 1 to 64, got 0"),
        ({"batch": 65}, "--batch must be from 1 to 64, got 65"),
        ({"sizes_px": (64, 0)}, "--size must be positive"),
        ({"shift": 0}, "--shift must be from 1 to 1000, got 0"),
        ({"shift": 1001}, "--shift must be from 1 to 1000"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BuildRequest(**options)


def test_steps_and_targets_are_kept_once() -> None:
    request = BuildRequest(steps=(4, 1, 1), targets=("sm89", "sm89"))
    assert (request.steps, request.targets) == ((1, 4), ("sm89",))


@pytest.mark.parametrize(("steps", "name"), [((1,), "little-1step"), ((4, 2, 1), "little-1-2-4step")])
def test_what_is_open_is_decided(checkpoint: Path, steps: tuple[int, ...], name: str) -> None:
    request = resolved(checkpoint, steps=steps)
    assert (request.sizes_px, request.shift, request.out) == ((64,), 500, Path("engines") / name)


def test_what_is_said_wins(checkpoint: Path, tmp_path: Path) -> None:
    request = resolved(checkpoint, sizes_px=(96, 64, 96), shift=250, out=tmp_path / "there")
    assert (request.sizes_px, request.shift, request.out) == ((96, 64), 250, tmp_path / "there")


def test_a_size_that_does_not_suit_the_model(checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="--size must be a multiple of 32 pixels for little, got 100"):
        resolved(checkpoint, sizes_px=(64, 100))


@pytest.mark.parametrize("run", [None, {}, {"name": "little"}])
def test_without_a_shift_the_build_is_refused(checkpoint: Path, run: dict[str, str] | None) -> None:
    path = checkpoint / "run.json"
    path.unlink() if run is None else path.write_text(json.dumps(run))
    with pytest.raises(ConfigError, match="lacks shifted_timestep; say --shift"):
        resolved(checkpoint)
    assert resolved(checkpoint, shift=250).shift == 250


@pytest.mark.parametrize("shift", [0, 1001, "500", True, 2.5])
def test_a_wrong_shift_in_the_checkpoint(checkpoint: Path, shift: object) -> None:
    (checkpoint / "run.json").write_text(json.dumps({"shifted_timestep": shift}))
    with pytest.raises(ConfigError, match="it must be from 1 to 1000"):
        resolved(checkpoint)

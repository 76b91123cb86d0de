from __future__ import annotations

import copy

import pytest

from nitro_engines.keys import canonical_json, differences, key_of, nearest

FIELDS = {
    "checkpoint_sha256": "a" * 64,
    "steps": [1, 2],
    "size_px": 128,
    "toolchain": {"openvino": "1", "onnx": "2"},
    "target": {},
}


def test_canonical_json_has_one_spelling() -> None:
    assert canonical_json({"b": (1, 2), "a": "é"}) == '{"a":"é","b":[1,2]}'
    assert key_of({"b": (1, 2), "a": 1}) == key_of({"a": 1, "b": [1, 2]})


def test_not_a_number_is_no_key() -> None:
    with pytest.raises(ValueError):
        key_of({"a": float("nan")})


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("checkpoint_sha256", "b" * 64),
        ("steps", [1]),
        ("size_px", 64),
        ("toolchain.openvino", "1.1"),
        ("toolchain.torch", "3"),
        ("target", {"features": "avx2"}),
    ],
)
def test_every_flipped_field_changes_the_key_and_is_named(path: str, value: object) -> None:
    flipped = copy.deepcopy(FIELDS)
    *parents, name = path.split(".")
    inner = flipped
    for parent in parents:
        inner = inner[parent]  # type: ignore[assignment]
    inner[name] = value  # type: ignore[assignment]
    assert key_of(flipped) != key_of(FIELDS)
    named = [difference.field for difference in differences(flipped, FIELDS)]
    assert any(field == path or field.startswith(f"{path}.") for field in named)


def test_a_difference_reads_well() -> None:
    (difference,) = differences(FIELDS, FIELDS | {"size_px": 64})
    assert str(difference) == "size_px: 128 wanted, 64 cached"
    (difference,) = differences(FIELDS, {name: value for name, value in FIELDS.items() if name != "checkpoint_sha256"})
    assert str(difference) == f"checkpoint_sha256: {'a' * 12} wanted, nothing cached"


def test_nearest_differs_least() -> None:
    near, far = FIELDS | {"size_px": 64}, FIELDS | {"size_px": 64, "steps": [4]}
    assert nearest(FIELDS, {"far": far, "near": near}) == "near"
    assert nearest(FIELDS, {}) is None

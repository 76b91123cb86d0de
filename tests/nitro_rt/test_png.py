"""PNG files are written whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from nitro_rt.errors import ConfigError
from nitro_rt.png import read_png_text, save_png

RED = Image.new("RGB", (4, 4), (255, 0, 0))


def test_text_comes_back(tmp_path: Path) -> None:
    text = {"prompt": "naïve 🍎\nsecond line", "seed": "0"}
    assert read_png_text(save_png(tmp_path / "a.png", RED, text)) == text


def test_an_old_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"old")
    save_png(path, RED, {})
    assert Image.open(path).getpixel((0, 0)) == (255, 0, 0)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.png"]


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"old")

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(ConfigError, match="a.png cannot be written: No space left on device"):
        save_png(path, RED, {})
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize("name", ["a.jpg", "a", "nowhere/a.png"])
def test_places_that_cannot_be(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        save_png(tmp_path / name, RED, {})

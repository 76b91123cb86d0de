from __future__ import annotations

from pathlib import Path

import pytest

from nitro_bench import environment
from nitro_rt.errors import BuildError, ConfigError


def make_distribution(site: Path, name: str, version: str, *, num_bytes: int) -> None:
    """A package of one file in `site`, as pip leaves it."""
    info = site / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (site / f"{name}.py").write_bytes(b"#" * num_bytes)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "RECORD").write_text(f"{name}.py,,\nmissing.py,,\n")


def test_an_installation_counts_packages_and_the_bytes_of_their_files(tmp_path: Path) -> None:
    make_distribution(tmp_path, "one_thing", "1.0", num_bytes=100)
    make_distribution(tmp_path, "other", "2.1", num_bytes=23)
    found = environment.installed_in(tmp_path)
    assert (found.num_packages, found.num_bytes) == (2, 123)
    assert found.versions == {"one-thing": "1.0", "other": "2.1"}


def test_the_closure_follows_dependencies_and_extras() -> None:
    core = environment.closure(["nitro-rt"]).versions
    assert {"nitro-rt", "numpy", "tokenizers", "huggingface-hub"} <= set(core)  # the last one only through tokenizers
    assert not {"torch", "openvino"} & set(core)
    assert "openvino" in environment.closure(["nitro-rt[cpu]"]).versions


def test_the_closure_refuses_what_is_not_installed() -> None:
    with pytest.raises(ConfigError, match=r"no-such-package is not installed here; pip install"):
        environment.closure(["no-such-package"])


def test_pip_failures_say_what_failed(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"pip .* ended with"):
        environment.make_venv(tmp_path / "venv", tmp_path / "absent-1.0-py3-none-any.whl", "cpu")


def test_one_name_per_distribution() -> None:
    assert environment.canonical("Open.CLIP_torch") == environment.canonical("open-clip-torch")

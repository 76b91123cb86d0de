"""Scripts end as the command line does: one line and exit code 1 for what a user can mend."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from nitro_rt.errors import ConfigError
from nitro_training import script


def test_a_nitro_error_becomes_one_line() -> None:
    def fail() -> None:
        raise ConfigError("two\nlines")

    with pytest.raises(SystemExit) as caught:
        script.run(fail)
    assert caught.value.code == "nitro-rt: two lines"


def test_a_bug_keeps_its_traceback() -> None:
    def fail() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        script.run(fail)


def test_the_data_script_names_a_missing_recipe(tmp_path: Path) -> None:
    options = ["--recipe", str(tmp_path / "none.toml"), "--npm", str(tmp_path), "--out", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-m", "nitro_training.emoji", *options], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "no recipe at" in done.stderr and "Traceback" not in done.stderr

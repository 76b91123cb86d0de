"""A report on disk: JSON, Markdown and HTML of one name, each written whole, none replaced unasked."""

from __future__ import annotations

import os
import re
import tempfile
import time
from pathlib import Path

from nitro_bench.bench_html import html
from nitro_bench.bench_markdown import markdown
from nitro_bench.bench_report import BenchReport
from nitro_rt.errors import ConfigError

SUFFIXES = (".json", ".md", ".html")


class ReportFolder:
    """Where reports lie: `<name>_<device>_<yyyymm>` with three suffixes."""

    def __init__(self, folder: Path, *, force: bool) -> None:
        self._folder, self._force = folder, force

    def require_free(self, name: str, device: str) -> None:
        """Before hours of measuring; makes nothing. Raises: ConfigError if a report of this name is there, or none can be."""
        taken = [path for path in self._paths(stem_of(name, device, time.strftime("%Y-%m-%d"))) if path.exists()]
        if taken and not self._force:
            raise ConfigError(f"{taken[0]} is there already; --force replaces it, --name and --report choose another place")
        _require_writable(next(folder for folder in (self._folder, *self._folder.parents) if folder.exists()))

    def publish(self, report: BenchReport) -> tuple[Path, ...]:
        """Write the three files; returns them. Raises: ConfigError as `require_free`."""
        self.require_free(report.name, report.device)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise ConfigError(f"the report folder {self._folder} cannot be made: {exc.strerror}; choose another") from exc
        texts = (report.to_json(), markdown(report) + "\n", html(report))
        paths = self._paths(stem_of(report.name, report.device, report.date))
        for path, text in zip(paths, texts, strict=True):
            write_text(path, text)
        return paths

    def _paths(self, stem: str) -> tuple[Path, ...]:
        return tuple(self._folder / f"{stem}{suffix}" for suffix in SUFFIXES)


def stem_of(name: str, device: str, date: str) -> str:
    """nitro-emoji_cpu_202611; whatever is no letter, digit, + or - becomes -."""
    parts = (re.sub(r"[^a-zA-Z0-9+-]+", "-", part).strip("-") for part in (name, device))
    return "_".join((*parts, f"{date[:4]}{date[5:7]}"))


def require_place(path: Path) -> None:
    """Before hours of measuring. Raises: ConfigError if `write_text` could not write `path`."""
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; name a file in it, such as {path / 'bench.json'}")
    _require_writable(path.parent)


def _require_writable(folder: Path) -> None:
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as exc:
        raise ConfigError(f"nothing can be written into {folder}: {exc.strerror}; make that folder or choose another") from exc


def write_text(path: Path, text: str) -> None:
    """Whole or not at all. Raises: ConfigError if it cannot be written."""
    try:
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False, encoding="utf-8") as file:
            try:
                file.write(text)
                file.flush()
                os.chmod(file.name, 0o644)
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise
    except OSError as exc:
        raise ConfigError(f"{path} cannot be written: {exc.strerror}; choose another place") from exc

"""What an installation holds: distributions, their size on disk, and the closure that a set of them needs."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from nitro_rt.errors import BuildError, ConfigError


@dataclass(frozen=True, kw_only=True)
class Installation:
    """Distributions as installed."""

    versions: dict[str, str]
    """Canonical name -> version."""
    num_bytes: int
    """Of every file that their RECORDs name, bytecode included."""

    @property
    def num_packages(self) -> int:
        return len(self.versions)


def installation(distributions: Iterable[metadata.Distribution]) -> Installation:
    """The sum over `distributions`; one found twice on the path counts once."""
    by_name = {canonical(found.metadata["Name"]): found for found in reversed(list(distributions))}
    files = {Path(str(file.locate())) for found in by_name.values() for file in found.files or ()}
    return Installation(
        versions={name: by_name[name].version for name in sorted(by_name)},
        num_bytes=sum(path.stat().st_size for path in files if path.is_file()),
    )


def installed_in(site_packages: Path) -> Installation:
    """Everything in one site-packages folder."""
    return installation(metadata.distributions(path=[str(site_packages)]))


def closure(requirements: Iterable[str]) -> Installation:
    """What of this interpreter's packages `requirements` ("diffusers[torch]") need, all the way down.

    Raises: ConfigError if one is not installed.
    """
    found: dict[str, metadata.Distribution] = {}
    seen: set[tuple[str, str]] = set()
    pending = [Requirement(text) for text in requirements]
    while pending:
        requirement = pending.pop()
        name = canonical(requirement.name)
        try:
            found[name] = metadata.distribution(requirement.name)
        except metadata.PackageNotFoundError as exc:
            raise ConfigError(f"{requirement.name} is not installed here; pip install 'nitro-rt[bench]'") from exc
        for extra in ("", *sorted(requirement.extras)):
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            needed = map(Requirement, found[name].requires or ())
            pending += [need for need in needed if need.marker is None or need.marker.evaluate({"extra": extra})]
    return installation(found.values())


def build_wheel(folder: Path) -> Path:
    """The wheel of the repository that this file lies in.

    Raises: ConfigError where nitro_bench is itself installed from a wheel; BuildError if the build fails.
    """
    root = Path(__file__).resolve().parents[2]
    if not (root / "pyproject.toml").is_file():
        raise ConfigError("nitro_bench is not run from its repository, so there is nothing to build; name one with --wheel")
    _run(_PIP, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(root))
    return next(folder.glob("nitro_rt-*.whl"))


def make_venv(folder: Path, wheel: Path, extra: str) -> Path:
    """A virtual environment with nothing but `wheel[extra]`, at the versions that this interpreter has.

    Returns: its python.
    Raises: BuildError if pip fails.
    """
    # Without pip inside, so that all it holds is what nitro-rt needs.
    _run([sys.executable, "-m", "venv"], "--without-pip", str(folder))
    python = folder / "bin" / "python"
    pins = folder / "constraints.txt"
    versions = {canonical(found.metadata["Name"]): found.version for found in metadata.distributions()}
    versions.pop("nitro-rt", None)
    pins.write_text("".join(f"{name}=={version}\n" for name, version in sorted(versions.items())), encoding="utf-8")
    _run(_PIP, "--python", str(python), "install", "--quiet", "--constraint", str(pins), f"{wheel}[{extra}]")
    return python


def site_packages(python: Path) -> Path:
    script = "import sysconfig; print(sysconfig.get_path('purelib'))"
    return Path(_run([str(python), "-I", "-c", script]).strip())


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


_PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]


def _run(command: list[str], *arguments: str) -> str:
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["no output"]
        raise BuildError(f"{' '.join([*command[1:], *arguments])} ended with {done.returncode}: {last[0]}")
    return done.stdout

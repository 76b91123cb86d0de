"""`make test-gpu`: the tests that need a GPU, with the real modules, and a report of what they said on this machine.

    python -m nitro_bench.gpu --report benchmarks/reports [--tests tests]

The report is written also where tests fail; the exit code is pytest's. Without a GPU nothing is run.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from nitro_bench.machine import commit, machine
from nitro_rt.device import find_driver
from nitro_rt.doctor import examine
from nitro_rt.errors import BackendUnavailable, NitroError

TIMEOUT_S = 3600


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """One test."""

    name: str
    outcome: str
    """passed, failed, error or skipped."""
    seconds: float
    message: str
    """Why it failed or was skipped; empty where it passed."""


def run_tests(tests: Path) -> tuple[int, list[Outcome]]:
    """pytest's exit code, and every test marked `gpu`."""
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.xml"
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "--slow", f"--junitxml={results}", str(tests)]
        status = subprocess.run(command, check=False, timeout=TIMEOUT_S).returncode
        return status, outcomes(results.read_text(encoding="utf-8")) if results.is_file() else []


def outcomes(junit_xml: str) -> list[Outcome]:
    """From pytest's JUnit file."""
    found = []
    for case in ElementTree.fromstring(junit_xml).iter("testcase"):
        said = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        kind = {"failure": "failed", "error": "error", "skipped": "skipped"}[said.tag] if said is not None else "passed"
        message = " ".join((said.get("message") or "").split())[:300] if said is not None else ""
        name = f"{case.get('classname', '').replace('.', '/')}::{case.get('name')}"
        found.append(Outcome(name=name, outcome=kind, seconds=float(case.get("time", 0)), message=message))
    return found


def report(found: list[Outcome]) -> tuple[dict[str, Any], str]:
    """The same as JSON and as Markdown."""
    examination = dataclasses.asdict(examine())
    gpus = examination["driver"]["gpus"]
    counts = {kind: sum(test.outcome == kind for test in found) for kind in ("passed", "failed", "error", "skipped")}
    facts = {
        "command": "make test-gpu",
        "commit": commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": machine(),
        "driver": examination["driver"],
        "versions": examination["versions"],
        "counts": counts,
        "tests": [dataclasses.asdict(test) for test in found],
    }
    lines = [
        f"# Tests on {', '.join(gpu['name'] for gpu in gpus)}, {facts['date']}",
        "",
        f"`make test-gpu` at commit {facts['commit']}: "
        + ", ".join(f"{number} {kind}" for kind, number in counts.items())
        + ".",
        "",
        "| test | outcome | s | |",
        "|---|---|---|---|",
        *(f"| {t.name} | {t.outcome} | {t.seconds:.2f} | {t.message.replace('|', '/')} |" for t in found),
        "",
        "| | |",
        "|---|---|",
        f"| driver | {examination['driver']['version']}, CUDA {examination['driver']['cuda_version']} |",
        *(f"| {name} | {version} |" for name, version in examination["versions"].items() if version),
        *(f"| {name} | {value} |" for name, value in facts["machine"].items()),
        "",
    ]
    return facts, "\n".join(lines)


def write_report(folder: Path, facts: dict[str, Any], markdown: str) -> Path:
    """`gpu-tests_<device>_<yyyymm>.md` with its JSON beside it, each whole or absent. Returns: the Markdown's path."""
    device = re.sub(r"[^a-z0-9]+", "-", facts["driver"]["gpus"][0]["name"].lower()).strip("-")
    stem = folder / f"gpu-tests_{device}_{facts['date'].replace('-', '')[:6]}"
    folder.mkdir(parents=True, exist_ok=True)
    for path, content in ((stem.with_suffix(".json"), json.dumps(facts, indent=2) + "\n"), (stem.with_suffix(".md"), markdown)):
        prepared = path.with_name(f".{path.name}.new")
        prepared.write_text(content, encoding="utf-8")
        os.replace(prepared, path)
    return stem.with_suffix(".md")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m nitro_bench.gpu", description=__doc__)
    parser.add_argument("--report", type=Path, required=True)
    parser.add_argument("--tests", type=Path, default=Path("tests"))
    options = parser.parse_args(arguments)
    try:
        driver = find_driver()
        if driver.reason:
            raise BackendUnavailable(f"make test-gpu needs an NVIDIA GPU: {driver.reason}; make test runs the rest anywhere")
        status, found = run_tests(options.tests)
        print(write_report(options.report, *report(found)))
    except NitroError as exc:
        print(f"nitro_bench.gpu: {exc}", file=sys.stderr)
        return 1
    return status


if __name__ == "__main__":
    sys.exit(main())

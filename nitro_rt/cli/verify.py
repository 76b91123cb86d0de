"""`nitro-rt verify`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click

from nitro_rt.cli.output import json_option, print_json
from nitro_rt.errors import NitroError


@click.command(name="verify")
@click.argument("bundle", type=click.Path(path_type=Path))
@json_option
def command(bundle: Path, as_json: bool) -> None:
    """Check the bundle at BUNDLE: every digest, extra files, the schedule's constants, and an image if it runs here."""
    from nitro_rt.verify import Check, verify_bundle

    checks: list[Check] = []
    error: str | None = "the check did not finish"  # what an interruption or a bug leaves
    try:
        for check in verify_bundle(bundle):
            checks.append(check)
            if not as_json:
                click.echo(f"{check.status:<8}{check.name}: {check.detail}")
        error = None
    except NitroError as exc:
        error = str(exc)
        raise
    finally:
        if as_json:
            facts = {"ok": error is None, "error": error}
            print_json(facts | {"bundle": str(bundle), "checks": [dataclasses.asdict(check) for check in checks]})

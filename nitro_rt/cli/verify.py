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
    error: NitroError | None = None
    try:
        for check in verify_bundle(bundle):
            checks.append(check)
            if not as_json:
                click.echo(f"{check.status:<8}{check.name}: {check.detail}")
    except NitroError as exc:
        error = exc
        raise
    finally:
        if as_json:
            facts = {"ok": error is None, "error": None if error is None else str(error)}
            print_json(facts | {"bundle": str(bundle), "checks": [dataclasses.asdict(check) for check in checks]})

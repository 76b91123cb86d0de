"""The command line. Commands parse, call the library and print; each is imported only when it runs.

Exit codes: 0 done, 1 a NitroError in one line on stderr, 2 wrong usage, 130 interrupted. A bug keeps its traceback.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence

import click

from nitro_rt.errors import NitroError

COMMANDS = {
    "bench": "Time bundles, alone and beside peers.",
    "bench-compare": "Say whether one benchmark is slower than another.",
    "build": "Build an engine bundle from a checkpoint.",
    "cache": "List what is cached, or prune it.",
    "doctor": "Say what this machine can build and run.",
    "evaluate": "Score a checkpoint per step count.",
    "extract-lora": "Write a student's UNet as a LoRA for checkpoints of its base.",
    "generate": "Draw images with a bundle.",
    "inspect": "Show what is in a bundle.",
    "train": "Train a model from a recipe.",
    "transfer": "Give another checkpoint of the same base one-to-four-step drawing.",
    "verify": "Check a bundle: digests, schedule, a smoke image.",
}
"""Command -> what it does; the code is in `nitro_rt.cli.<command>` (- becomes _), as a function named `command`."""


class LazyGroup(click.Group):
    """Imports a command when it is used, so that `nitro-rt --help` loads none."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command = importlib.import_module(f"nitro_rt.cli.{cmd_name.replace('-', '_')}").command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="nitro-rt", message="%(prog)s %(version)s")
def cli() -> None:
    """One-to-four-step text-to-image: build an engine bundle from a checkpoint, draw from plain Python."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    try:
        status = cli.main(args=arguments, prog_name="nitro-rt", standalone_mode=False)
    except click.ClickException as exc:
        exc.show()
        return exc.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("nitro-rt: interrupted", err=True)
        return 130
    except NitroError as exc:
        click.echo(f"nitro-rt: {' '.join(str(exc).split())}", err=True)
        return 1
    return status if isinstance(status, int) else 0

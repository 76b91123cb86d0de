"""The edge of the scripts that `python -m nitro_training.<module>` runs."""

from __future__ import annotations

import sys
from collections.abc import Callable

from nitro_rt.errors import NitroError


def run(main: Callable[[], None]) -> None:
    """Run a script's `main`; a NitroError becomes one line on stderr and exit code 1, a bug keeps its traceback."""
    try:
        main()
    except NitroError as exc:
        sys.exit(f"nitro-rt: {' '.join(str(exc).split())}")

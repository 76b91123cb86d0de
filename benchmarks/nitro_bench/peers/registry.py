"""The peers that there are: name, adapter, interpreter, options."""

from __future__ import annotations

import sys
from pathlib import Path

from nitro_bench.peer import Peer

FOLDER = Path(__file__).resolve().parent

PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer(
            name="diffusers",
            title="diffusers, eager, float32",
            adapter=FOLDER / "diffusers_eager.py",
            python=Path(sys.executable),
            options={"dtype": "float32"},
            needs=("diffusers[torch]", "transformers"),
        ),
    )
}
"""Name, as `--peers` takes it -> peer."""

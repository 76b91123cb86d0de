"""What a side takes on disk: its packages, as installed."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from nitro_bench.peer import Peer
from nitro_rt.errors import BuildError, ConfigError

EXTRAS = {"openvino": "cpu", "onnxruntime": "cpu", "tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt-rtx"}
"""Backend -> the extra of nitro-rt that draws with it."""
NOTE = "the closure of nitro-rt[{}] in this environment; an editable nitro-rt's own files are not in it"


def installed_bytes(backends: Iterable[str], *, on_gpu: bool) -> tuple[int | None, str]:
    """Bytes of what drawing with these backends needs, and what is counted, or why nothing is."""
    known = EXTRAS | ({"onnxruntime": "cuda"} if on_gpu else {})
    extras = sorted({known[backend] for backend in backends if backend in known})
    try:
        from nitro_bench import environment

        return environment.closure([f"nitro-rt[{','.join(extras)}]"]).num_bytes, NOTE.format(",".join(extras))
    except ModuleNotFoundError as exc:
        return None, f"needs the package {exc.name}; pip install 'nitro-rt[bench]'"
    except ConfigError as exc:
        return None, str(exc)


def peer_bytes(peer: Peer) -> int | None:
    """Bytes of a peer's packages; None where they cannot be told."""
    try:
        from nitro_bench import environment

        if peer.needs:
            return environment.closure(peer.needs).num_bytes
        if str(peer.python) == sys.executable:
            return None  # it shares this environment and does not say what of it is its own
        return environment.installed_in(environment.site_packages(peer.python)).num_bytes
    except (ModuleNotFoundError, ConfigError, BuildError):
        return None

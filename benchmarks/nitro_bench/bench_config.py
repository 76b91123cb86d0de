"""What a benchmark is asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from nitro_bench import samples
from nitro_bench.cards import card_of
from nitro_bench.peer import COMMAND_TIMEOUT_S, Peer
from nitro_bench.peers.catalogue import PEERS
from nitro_rt.errors import ConfigError

Report = Callable[[str], None]

MAX_IMAGES, MIN_IMAGES = 100, samples.NEEDED_FOR_INTERVAL
IMAGE_SECONDS = 300.0
"""Where --images is not given: as many as fit into this, between the two numbers above."""
MAX_PROCESSES = 5
START_SECONDS = 100.0
"""Where --processes is not given: as many as start in this, at least one."""
MAX_PAIRS = 20
PAIR_SECONDS = 300.0
"""Per subject and peer."""


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """One benchmark."""

    bundles: tuple[Path, ...]
    peers: tuple[str, ...] = ()
    """Names of `nitro_bench.peers.catalogue.PEERS`."""
    size: int | None = None
    """Edge in pixels, of those each bundle has; None takes its first."""
    steps: tuple[int, ...] = ()
    """Step counts, of those each bundle has; empty takes all of them."""
    batch: int | None = None
    """Images per call, at most the bundle's; None takes the bundle's."""
    images: int | None = None
    """Calls that are timed per subject; None takes 100, or fewer where they would take more than five minutes."""
    processes: int | None = None
    """Fresh processes per subject; None takes 5, or fewer where starting them takes long."""
    concurrency: tuple[int, ...] = (1, 2, 4)
    """Numbers of threads that call one pipeline."""
    checkpoint: Path | None = None
    """The diffusers folder that the bundles were built from, for peers; None finds the shipped model's."""
    predict: tuple[str, ...] = ()
    """Cards of `nitro_bench.cards.CARDS`."""
    timeout_s: float = COMMAND_TIMEOUT_S
    """For one command to a process: load, draw a block of images."""
    name: str = ""
    """Of the report; empty: the model's name."""
    command: str = ""
    """What was typed, without paths of this machine, for the report."""
    registry: dict[str, Peer] = field(default_factory=lambda: dict(PEERS))
    """Name -> peer; tests put fakes here."""

    def __post_init__(self) -> None:
        numbers = {"--batch": self.batch, "--images": self.images, "--processes": self.processes}
        numbers |= {"--concurrency": min(self.concurrency, default=1), "--steps": min(self.steps, default=1)}
        for option, value in numbers.items():
            if value is not None and value < 1:
                raise ConfigError(f"{option} must be 1 or more, got {value}")
        if not self.bundles:
            raise ConfigError("name at least one bundle: nitro-rt bench BUNDLE")
        if not self.timeout_s > 0:
            raise ConfigError(f"--timeout must be more than 0 seconds, got {self.timeout_s:g}")
        for name in self.peers:
            if name not in self.registry:
                raise ConfigError(f"there is no peer {name!r}; available: {', '.join(sorted(self.registry)) or 'none'}")
        for card in self.predict:
            card_of(card)

    def images_for(self, image_ms: float) -> int:
        """How many calls are timed, where one takes about so long."""
        return self.images or max(MIN_IMAGES, min(MAX_IMAGES, int(1e3 * IMAGE_SECONDS / image_ms)))

    def processes_for(self, start_s: float, num_images: int) -> int:
        """How many processes draw `num_images`, where a start takes about so long."""
        wanted = self.processes or max(1, min(MAX_PROCESSES, int(START_SECONDS / start_s)))
        return min(wanted, num_images)

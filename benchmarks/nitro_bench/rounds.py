"""The counted rounds of one subject: our fresh processes, each followed by its turns with every peer.

A peer whose process does not fit into memory beside ours has its turn when ours is closed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from nitro_bench import pairing, samples, timing
from nitro_bench.bench_config import MAX_PAIRS, PAIR_SECONDS, BenchConfig, Report
from nitro_bench.bench_report import ENGINE_STAGES, GRAPH_STAGE, PeerRun, Process, Throughput
from nitro_bench.checking import Checked
from nitro_bench.checkpoints import folder_bytes
from nitro_bench.footprint import peer_bytes
from nitro_bench.peer import Memory, PeerFailed
from nitro_bench.samples import Summary
from nitro_bench.subject import OURS
from nitro_bench.telemetry import MachineState, read_state
from nitro_engines.host import available_bytes


@dataclass(kw_only=True)
class Timed:
    """What the processes of one subject measured."""

    processes: list[Process]
    throughput: tuple[Throughput, ...]
    memory: Memory
    states: list[MachineState]
    """The machine right after the timed images of each process, while a GPU is still warm."""
    launched_alone: dict[str, Summary]
    """Stages that a CUDA graph holds together, in milliseconds, launched one by one; empty where the processes told them."""


class Rounds:
    """Runs them."""

    def __init__(self, checked: Checked, config: BenchConfig, report: Report) -> None:
        self._checked, self._config, self._report = checked, config, report
        self._num_images = config.images_for(checked.image_ms)
        self._num_processes = config.processes_for(checked.start_s, self._num_images)
        self._pairs: dict[str, list[pairing.Pairs]] = {tried.peer.name: [] for tried in checked.tried}
        self._starts: dict[str, list[timing.Started]] = {tried.peer.name: [] for tried in checked.tried}
        self._memory: dict[str, Memory] = {}
        self._failed: dict[str, str] = {}
        # Once, while no side runs: a peer is timed in one way in all rounds.
        peaks = {tried.peer.name: tried.peak_rss_bytes for tried in checked.tried}
        available = available_bytes()
        self._why_apart = {name: pairing.why_apart(checked.peak_rss_bytes, peak, available) for name, peak in peaks.items()}

    def run(self) -> tuple[Timed, list[PeerRun]]:
        """Raises: PeerFailed if our own process fails."""
        case, config = self._checked.case, self._config
        load, draw = case.load_request(case.bundle.folder, OURS), case.draw_request()
        processes: list[Process] = []
        states: list[MachineState] = []
        throughput: tuple[Throughput, ...] = ()
        for number in range(self._num_processes):
            started = timing.start(OURS, load, draw, config.timeout_s)
            with started.process as process:
                processes.append(timing.time_images(started, draw, self._share(number)))
                states.append(read_state())
                self._report(f"{case.id}: process {number + 1} of {self._num_processes}: {_process_sentence(processes[-1])}")
                memory = process.memory()
                for tried in self._tried(apart=False):
                    self._time_peer(tried, partial(self._take_turns, started, tried))
                if number == self._num_processes - 1:
                    throughput = timing.throughput(process, draw, config.concurrency, self._checked.image_ms, processes)
            for tried in self._tried(apart=True):
                self._time_peer(tried, partial(self._take_turn_apart, processes[-1], tried))
        timed = Timed(
            processes=processes,
            throughput=throughput,
            memory=memory,
            states=states,
            launched_alone=self._launched_alone() if GRAPH_STAGE in processes[0].stages_ms else {},
        )
        return timed, self._peer_runs()

    def _launched_alone(self) -> dict[str, Summary]:
        """Of one process more, without CUDA graphs."""
        case = self._checked.case
        load = case.load_request(case.bundle.folder, OURS)
        load = dataclasses.replace(load, options=load.options | {"cuda_graphs": "off"})
        started = timing.start(OURS, load, case.draw_request(), self._config.timeout_s)
        with started.process:
            alone = timing.time_images(started, case.draw_request(), self._share(0))
        return {stage: samples.summary_of(values) for stage, values in alone.stages_ms.items() if stage in ENGINE_STAGES}

    def _share(self, number: int) -> int:
        """Images of one process; the first take what does not divide."""
        each, rest = divmod(self._num_images, self._num_processes)
        return each + (number < rest)

    def _tried(self, *, apart: bool) -> list[pairing.Tried]:
        """The peers that are timed in this way and have not failed."""
        names = {name for name, why in self._why_apart.items() if bool(why) == apart and name not in self._failed}
        return [tried for tried in self._checked.tried if tried.peer.name in names]

    def _take_turns(self, ours: timing.Started, tried: pairing.Tried, theirs: timing.Started) -> pairing.Pairs:
        image_ms, draw = (self._checked.image_ms, tried.image_ms), self._checked.case.draw_request()
        most = pairing.pairs_within(PAIR_SECONDS, *image_ms, MAX_PAIRS, self._num_images)
        count, length = math.ceil(most / self._num_processes), pairing.turn_length(*image_ms)
        return pairing.pairs_of(pairing.take_turns(ours.process, theirs.process, (draw, draw), count, length))

    def _take_turn_apart(self, ours: Process, tried: pairing.Tried, theirs: timing.Started) -> pairing.Pairs:
        return pairing.apart(ours, theirs, self._checked.case.draw_request(), tried.image_ms)

    def _time_peer(self, tried: pairing.Tried, measure: Callable[[timing.Started], pairing.Pairs]) -> None:
        """One process of a peer. What fails is listed, and not tried again."""
        peer, checked, draw = tried.peer, self._checked, self._checked.case.draw_request()
        assert checked.checkpoint is not None
        try:
            theirs = timing.start(peer, checked.case.load_request(checked.checkpoint, peer), draw, self._config.timeout_s)
            with theirs.process as process:
                pairing.warm_images(theirs, draw)
                pairs = measure(theirs)
                self._memory[peer.name] = process.memory()
        except PeerFailed as exc:
            if exc.name == OURS.name:
                raise
            self._failed[peer.name] = exc.reason
            self._report(f"{checked.case.id}: {peer.name} is left out: {exc.reason}")
            return
        self._pairs[peer.name].append(pairs)
        self._starts[peer.name].append(theirs)
        found = samples.ratio_of(pairs.ours_ms, pairs.theirs_ms)
        where = "apart from" if self._why_apart[peer.name] else "beside"
        pairs_told = "1 pair" if found.num_pairs == 1 else f"{found.num_pairs} pairs"
        self._report(f"{checked.case.id}: {where} {peer.name}: {found.median:.3f} of its time over {pairs_told}")

    def _peer_runs(self) -> list[PeerRun]:
        checked, runs = self._checked, list(self._checked.failed)
        for tried in checked.tried:
            name = tried.peer.name
            if name in self._failed:
                runs.append(pairing.failed(checked.case.id, tried.peer, self._failed[name]))
                continue
            assert checked.checkpoint is not None
            starts = [started.cold_start for started in self._starts[name]]
            needs = peer_bytes(tried.peer)
            size = folder_bytes(checked.checkpoint)
            pairs, memory, why = self._pairs[name], self._memory[name], self._why_apart[name]
            runs.append(pairing.timed(checked.case.id, tried, pairs, starts, memory, needs, size, why))
        return runs


def _process_sentence(process: Process) -> str:
    median = samples.summary_of(process.total_ms).p50
    state = "stable" if process.warm_up.stable else f"not stable (last change {process.warm_up.last_change:.0%})"
    return f"first image after {process.cold_start.total_ms / 1e3:.2f} s, {state}, median {median:.2f} ms"

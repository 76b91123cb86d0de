"""`nitro-rt bench`: verifies what bundles draw, then times it, alone and beside peers.

Everything that is timed runs in fresh processes of its own (`peer`), ours too. A first round, which is not counted, checks each
side's picture and warms the file cache. Then, for each step count of each bundle: several processes one after another, each
from its start over warm-up to its share of the images, each followed by turns with every peer.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from nitro_bench import ceilings, pairing, roofline, samples, timing, warmup
from nitro_bench.bench_markdown import ceiling
from nitro_bench.bench_report import KIND, SCHEMA_VERSION, BenchReport, PeerRun, Process, Protocol, Quality, Run, Throughput
from nitro_bench.cards import card_of
from nitro_bench.checkpoints import checkpoint_of, folder_bytes
from nitro_bench.flops import Work
from nitro_bench.footprint import installed_bytes, peer_bytes
from nitro_bench.machine import commit, machine
from nitro_bench.peer import COMMAND_TIMEOUT_S, Loaded, Memory, Peer, PeerFailed
from nitro_bench.peers.registry import PEERS
from nitro_bench.subject import OURS, Case, subject_of, verified
from nitro_bench.telemetry import PACKAGE, MachineState, read_state
from nitro_rt.bundle import open_bundle
from nitro_rt.errors import ConfigError, EngineMismatch
from nitro_rt.quality import Images

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
    """Names of `nitro_bench.peers.registry.PEERS`."""
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


def measure(
    config: BenchConfig, report: Report = print, before_timing: Callable[[str, str], None] | None = None
) -> BenchReport:
    """Verify, then time.

    Args:
        before_timing: is told the report's name and device before anything is run; it may raise.

    Raises: ModelNotFound, BundleError (a bundle that is damaged or misses its quality limits: nothing is timed), EngineMismatch
        for steps, sizes or a batch that a bundle lacks, ConfigError; PeerFailed only if our own process fails.
    """
    before, place = read_state(), machine()
    with tempfile.TemporaryDirectory(prefix="nitro-bench-") as scratch:
        cases = open_cases(config, Path(scratch))
        name = config.name or "+".join(dict.fromkeys(case.bundle.manifest.source.name for case in cases))
        device = _device(cases, before)
        if before_timing is not None:
            before_timing(name, device)
        checked = [check(case, config, report) for case in cases]
        dtypes = _needed_dtypes(checked)
        rates = ceilings.measure_ceilings(dtypes)
        results = [_Timing(found, config, report).run() for found in checked]
        rates = ceilings.better_of(rates, ceilings.measure_ceilings(dtypes))
        report("ceilings: " + "; ".join(map(ceiling, rates)))
    runs = tuple(_run(found, result, rates, config, report) for found, (result, _) in zip(checked, results, strict=True))
    ours_bytes, ours_note = installed_bytes({run.subject.backend for run in runs})
    return BenchReport(
        schema_version=SCHEMA_VERSION,
        kind=KIND,
        name=name,
        device=device,
        date=time.strftime("%Y-%m-%d"),
        command=config.command,
        commit=commit(),
        machine=place,
        state_before=before,
        state_after=read_state(),
        versions=checked[0].loaded.versions | {"nitro-rt": metadata.version("nitro-rt")},
        protocol=_protocol(config, runs),
        installed_bytes=ours_bytes,
        installed_note=ours_note,
        ceilings=rates,
        runs=runs,
        peers=tuple(peer for _, peers in results for peer in peers),
    )


def open_cases(config: BenchConfig, scratch: Path) -> list[Case]:
    """Every subject, its files checked. Raises: as `measure`."""
    cases: list[Case] = []
    for folder in config.bundles:
        whole = open_bundle(folder)
        whole.verify()
        bundle = whole.at_size(config.size or whole.manifest.sizes_px[0])
        batch = config.batch or bundle.manifest.batch
        if batch > bundle.manifest.batch:
            raise EngineMismatch(
                f"{folder} was built for batch {bundle.manifest.batch}, not {batch}; build with --batch {batch}"
            )
        for num_steps in config.steps or bundle.built_steps:
            if num_steps not in bundle.built_steps:
                built = ", ".join(map(str, bundle.built_steps))
                raise EngineMismatch(f"{folder} was built for {built} steps, not {num_steps}; build with --steps {num_steps}")
            work = scratch / f"{len(cases)}"
            work.mkdir()
            cases.append(Case(bundle=bundle, num_steps=num_steps, batch=batch, work=work))
    _require_distinct(cases)
    return cases


@dataclass(frozen=True, kw_only=True)
class Checked:
    """A subject whose pictures are right, and the peers that drew the same."""

    case: Case
    loaded: Loaded
    quality: Quality
    works: dict[str, Work | str]
    start_s: float
    image_ms: float
    tried: tuple[pairing.Tried, ...]
    failed: tuple[PeerRun, ...]
    checkpoint: Path | None


def check(case: Case, config: BenchConfig, report: Report) -> Checked:
    """The round that is not counted: our pictures against the parent's, each peer's against ours."""
    checkpoint = checkpoint_of(case.bundle, config.checkpoint) if config.peers else None
    load, draw = case.load_request(case.bundle.folder, OURS), case.draw_request()
    started = timing.start(OURS, load, draw, config.timeout_s)
    with started.process as process:
        drawn_BHWC, image_ms = pairing.drawn_by(process, draw, case.work / "ours.npy")
        quality = verified(case, process, started.loaded, drawn_BHWC)
    report(f"{case.id}: {_quality_sentence(quality)}; about {image_ms:.1f} ms an image")
    tried: list[pairing.Tried] = []
    failed: list[PeerRun] = []
    for name in config.peers:
        peer = config.registry[name]
        try:
            assert checkpoint is not None
            tried.append(_try_peer(case, peer, checkpoint, started.loaded, drawn_BHWC, config))
            report(f"{case.id}: {name} {_same_picture_sentence(tried[-1])}; about {tried[-1].image_ms:.1f} ms")
        except PeerFailed as exc:
            failed.append(pairing.failed(case.id, peer, exc.reason))
            report(f"{case.id}: {name} is left out: {exc.reason}")
    return Checked(
        case=case,
        loaded=started.loaded,
        quality=quality,
        works=roofline.count_stages(case.bundle, case.num_steps),
        start_s=started.cold_start.total_ms / 1e3,
        image_ms=image_ms,
        tried=tuple(tried),
        failed=tuple(failed),
        checkpoint=checkpoint,
    )


def _try_peer(case: Case, peer: Peer, checkpoint: Path, ours: Loaded, ours_BHWC: Images, config: BenchConfig) -> pairing.Tried:
    started = timing.start(peer, case.load_request(checkpoint, peer), case.draw_request(), config.timeout_s)
    with started.process as process:
        theirs_BHWC, image_ms = pairing.drawn_by(process, case.draw_request(), case.work / f"{peer.name}.npy")
    dtype = started.loaded.compute_dtype
    precisions = subject_of(case, ours).precisions.values()
    needed, found = None, None
    if started.loaded.differs:
        pairing.require_same_shape(peer, theirs_BHWC, ours_BHWC)
    else:
        needed = pairing.needed_psnr_db(precisions, ours.compute_dtypes.values(), dtype)
        found = pairing.require_same_picture(peer, theirs_BHWC, ours_BHWC, needed)
    return pairing.Tried(peer=peer, loaded=started.loaded, psnr_db=found, needed_db=needed, image_ms=image_ms)


def _same_picture_sentence(tried: pairing.Tried) -> str:
    if tried.psnr_db is None:
        return f"is timed and not compared ({tried.loaded.differs})"
    return f"draws the same to {tried.psnr_db:.1f} dB"


@dataclass(kw_only=True)
class _Timed:
    """What the processes of one subject measured."""

    processes: list[Process]
    throughput: tuple[Throughput, ...]
    memory: Memory


class _Timing:
    """The counted rounds of one subject."""

    def __init__(self, checked: Checked, config: BenchConfig, report: Report) -> None:
        self._checked, self._config, self._report = checked, config, report
        self._num_images = config.images or max(MIN_IMAGES, min(MAX_IMAGES, int(1e3 * IMAGE_SECONDS / checked.image_ms)))
        self._num_processes = config.processes or max(1, min(MAX_PROCESSES, int(START_SECONDS / checked.start_s)))
        self._num_processes = min(self._num_processes, self._num_images)
        self._pairs: dict[str, list[pairing.Pairs]] = {tried.peer.name: [] for tried in checked.tried}
        self._starts: dict[str, list[timing.Started]] = {tried.peer.name: [] for tried in checked.tried}
        self._memory: dict[str, Memory] = {}
        self._failed: dict[str, str] = {}

    def run(self) -> tuple[_Timed, list[PeerRun]]:
        case, config = self._checked.case, self._config
        load, draw = case.load_request(case.bundle.folder, OURS), case.draw_request()
        processes: list[Process] = []
        throughput: tuple[Throughput, ...] = ()
        for number in range(self._num_processes):
            started = timing.start(OURS, load, draw, config.timeout_s)
            with started.process as process:
                processes.append(timing.time_images(started, draw, self._share(number)))
                self._report(f"{case.id}: process {number + 1} of {self._num_processes}: {_process_sentence(processes[-1])}")
                memory = process.memory()
                for tried in self._checked.tried:
                    self._take_turns(started, tried)
                if number == self._num_processes - 1:
                    throughput = timing.throughput(process, draw, config.concurrency, self._checked.image_ms)
        return _Timed(processes=processes, throughput=throughput, memory=memory), self._peer_runs()

    def _share(self, number: int) -> int:
        """Images of one process; the first take what does not divide."""
        each, rest = divmod(self._num_images, self._num_processes)
        return each + (number < rest)

    def _take_turns(self, ours: timing.Started, tried: pairing.Tried) -> None:
        """One process of a peer beside one of ours. What fails is listed, and not tried again."""
        peer, checked, draw = tried.peer, self._checked, self._checked.case.draw_request()
        if peer.name in self._failed:
            return
        assert checked.checkpoint is not None
        most = pairing.pairs_within(PAIR_SECONDS, checked.image_ms, tried.image_ms, MAX_PAIRS)
        try:
            theirs = timing.start(peer, checked.case.load_request(checked.checkpoint, peer), draw, self._config.timeout_s)
            with theirs.process as process:
                process.draw(draw, pairing.WARM_UP_IMAGES)
                length = pairing.turn_length(checked.image_ms, tried.image_ms)
                count = math.ceil(most / self._num_processes)
                pairs = pairing.pairs_of(pairing.take_turns(ours.process, process, (draw, draw), count, length))
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
        self._report(f"{checked.case.id}: beside {peer.name}: {found.median:.3f} of its time over {found.num_pairs} pairs")

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
            runs.append(pairing.timed(checked.case.id, tried, self._pairs[name], starts, self._memory[name], needs, size))
        return runs


def _run(checked: Checked, timed: _Timed, rates: Iterable[ceilings.Ceiling], config: BenchConfig, report: Report) -> Run:
    summary = timing.summaries(timed.processes)
    medians = {stage: figures.p50 for stage, figures in summary.items()}
    dtypes = {stage.partition("/")[0]: dtype for stage, dtype in checked.loaded.compute_dtypes.items()}
    num_steps = checked.case.num_steps
    works = roofline.stage_works(checked.works, num_steps, rates, dtypes, medians)
    for line in roofline.sentences(works):
        report(f"{checked.case.id}: {line}")
    return Run(
        subject=subject_of(checked.case, checked.loaded),
        quality=checked.quality,
        processes=tuple(timed.processes),
        summary=summary,
        outside_share=timing.outside_share(timed.processes),
        cold_start=timing.median_cold_start([process.cold_start for process in timed.processes]),
        throughput=timed.throughput,
        peak_rss_bytes=timed.memory.peak_rss_bytes,
        device_peak_bytes=timed.memory.device_peak_bytes if checked.case.on_gpu else None,
        device_memory_note=_device_memory_note(checked.case, timed.memory),
        work=works,
        predictions=tuple(roofline.predict(checked.works, num_steps, card_of(name)) for name in config.predict),
    )


def _protocol(config: BenchConfig, runs: Sequence[Run]) -> Protocol:
    return Protocol(
        rules={
            "verification": "in a process that is not counted, pictures of the bundle's references against those of its "
            "float32 parent (PSNR, SSIM); a peer's picture against ours",
            "clock": "time.perf_counter inside the drawing process; device stages by CUDA events",
            "timed span": "from the prompt as a string to the pictures in host memory; stages are the pipeline's own timings",
            "warm-up": warmup.RULE,
            "statistics": samples.RULE,
            "peers": pairing.RULE,
            "cold start": "fresh processes with warm files; from before the process exists to the first picture",
            "floor": "operations at the measured rate of their type, or weights, inputs and outputs through memory: the larger",
        },
        images=max(run.summary["total"].num_samples for run in runs),
        processes=max(len(run.processes) for run in runs),
        pairs=MAX_PAIRS if config.peers else 0,
        concurrency=config.concurrency,
    )


def _device(cases: Sequence[Case], state: MachineState) -> str:
    """Raises: ConfigError where some bundles run on a GPU and some do not: one report is of one device."""
    places = {case.on_gpu for case in cases}
    if len(places) > 1:
        raise ConfigError(
            "some of these bundles run on a GPU and some on the processor; one report is of one device, time them apart"
        )
    if places == {False}:
        return "cpu"
    return state.gpu.name if state.gpu else "gpu"


def _device_memory_note(case: Case, memory: Memory) -> str:
    if not case.on_gpu:
        return "this backend has no device memory of its own"
    if memory.device_peak_bytes is None:
        return f"it is read through {PACKAGE}, which is not here"
    return ""


def _needed_dtypes(checked: Iterable[Checked]) -> list[str]:
    found: set[str] = set()
    for one in checked:
        dtypes = {stage.partition("/")[0]: dtype for stage, dtype in one.loaded.compute_dtypes.items()}
        found |= roofline.dtypes_of(one.works, dtypes)
    return sorted(found)


def _require_distinct(cases: Sequence[Case]) -> None:
    names = [case.id for case in cases]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"two bundles are called {twice[0]!r} in the report; rename one of the folders")


def _quality_sentence(quality: Quality) -> str:
    if quality.worst_psnr_db is None:
        return quality.note
    return f"verified, {quality.worst_psnr_db:.1f} dB (limit {quality.limit_psnr_db:g}) over {quality.num_images} pictures"


def _process_sentence(process: Process) -> str:
    median = samples.summary_of(process.total_ms).p50
    state = "stable" if process.warm_up.stable else f"not stable (last change {process.warm_up.last_change:.0%})"
    return f"first image after {process.cold_start.total_ms / 1e3:.2f} s, {state}, median {median:.2f} ms"

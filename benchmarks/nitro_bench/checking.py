"""The round that is not counted: bundles are opened, and the pictures of every side looked at before anything is timed."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from nitro_bench import pairing, roofline, timing
from nitro_bench.bench_config import BenchConfig, Report
from nitro_bench.bench_report import PeerRun, Quality
from nitro_bench.checkpoints import checkpoint_of
from nitro_bench.flops import Work
from nitro_bench.peer import Loaded, Peer, PeerFailed
from nitro_bench.subject import OURS, Case, subject_of, verified
from nitro_bench.telemetry import MachineState, read_state
from nitro_rt.arguments import checked_steps
from nitro_rt.bundle import open_bundle
from nitro_rt.device import find_driver
from nitro_rt.errors import ConfigError, EngineMismatch
from nitro_rt.quality import Images
from nitro_rt.references import references_at


def open_cases(config: BenchConfig, scratch: Path) -> list[Case]:
    """Every subject, its files checked. Raises: ModelNotFound, BundleError, EngineMismatch, ConfigError."""
    cases: list[Case] = []
    for folder in config.bundles:
        whole = open_bundle(folder if folder.name not in ("", "..") else folder.resolve())  # its name stands in the report
        whole.verify()
        bundle = whole.at_size(config.size or whole.manifest.sizes_px[0])
        batch = config.batch or bundle.manifest.batch
        if batch > bundle.manifest.batch:
            raise EngineMismatch(
                f"{folder} was built for batch {bundle.manifest.batch}, not {batch}; build with --batch {batch}"
            )
        for num_steps in dict.fromkeys(config.steps) or bundle.built_steps:
            checked_steps(num_steps, bundle)
            work = scratch / f"{len(cases)}"
            work.mkdir()
            cases.append(Case(bundle=bundle, num_steps=num_steps, batch=batch, work=work))
    _require_distinct(cases)
    return cases


def name_of(config: BenchConfig, cases: Sequence[Case]) -> str:
    """Of the report."""
    return config.name or "+".join(dict.fromkeys(case.bundle.manifest.source.name for case in cases))


def device_of(cases: Sequence[Case], state: MachineState) -> str:
    """Raises: ConfigError where some bundles run on a GPU and some do not: one report is of one device."""
    places = {case.on_gpu for case in cases}
    if len(places) > 1:
        raise ConfigError(
            "some of these bundles run on a GPU and some on the processor; one report is of one device, time them apart"
        )
    if places == {False}:
        return "cpu"
    if state.gpu is not None:
        return state.gpu.name
    return next((gpu.name for gpu in find_driver().gpus), "gpu")


def plan(config: BenchConfig, before_timing: Callable[[str, str], None] | None = None) -> Iterator[str]:
    """What would be timed beside what, one line each; nothing is drawn.

    Args:
        before_timing: as of `nitro_bench.bench.measure`.
    Raises: as `open_cases`; ConfigError for bundles of two devices.
    """
    with tempfile.TemporaryDirectory(prefix="nitro-bench-") as scratch:
        cases = open_cases(config, Path(scratch))
    device = device_of(cases, read_state())
    if before_timing is not None:
        before_timing(name_of(config, cases), device)
    for case in cases:
        pictures = len(references_at(case.bundle, case.num_steps))
        yield f"{case.id}: {case.bundle.backend}, batch {case.batch}, verified by {pictures} pictures of its parent"
        if config.peers:
            yield f"{case.id}: peers draw with {checkpoint_of(case.bundle, config.checkpoint)}"
    for name in config.peers:
        peer = config.registry[name]
        state = "its environment is here" if peer.python.is_file() else f"its environment is not made: {peer.how_to_make}"
        yield f"{name}: {peer.title}, {state}"
    yield f"images: {config.images or 'up to 100, what fits into 5 minutes'}, in {config.processes or 'up to 5'} processes each"


@dataclass(frozen=True, kw_only=True)
class Checked:
    """A subject whose pictures are right, and the peers that drew the same."""

    case: Case
    loaded: Loaded
    quality: Quality
    works: dict[str, Work | str]
    start_s: float
    image_ms: float
    peak_rss_bytes: int | None
    tried: tuple[pairing.Tried, ...]
    failed: tuple[PeerRun, ...]
    checkpoint: Path | None
    """What peers draw with; None where there are none."""

    @property
    def compute_dtypes(self) -> dict[str, str]:
        """text, denoise, decode -> what the stage computes in here."""
        return {stage.partition("/")[0]: dtype for stage, dtype in self.loaded.compute_dtypes.items()}


def check(case: Case, config: BenchConfig, report: Report) -> Checked:
    """Our pictures against the parent's, each peer's against ours.

    Raises: BundleError if ours miss their limits; PeerFailed if our own process fails, but not for a peer.
    """
    checkpoint = checkpoint_of(case.bundle, config.checkpoint) if config.peers else None
    load, draw = case.load_request(case.bundle.folder, OURS), case.draw_request()
    started = timing.start(OURS, load, draw, config.timeout_s)
    with started.process as process:
        drawn_BHWC, image_ms = pairing.drawn_by(started, draw, case.work / "ours.npy")
        quality = verified(case, process, started.loaded, drawn_BHWC)
        memory = process.memory()
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
        peak_rss_bytes=memory.peak_rss_bytes,
        tried=tuple(tried),
        failed=tuple(failed),
        checkpoint=checkpoint,
    )


def _try_peer(case: Case, peer: Peer, checkpoint: Path, ours: Loaded, ours_BHWC: Images, config: BenchConfig) -> pairing.Tried:
    started = timing.start(peer, case.load_request(checkpoint, peer), case.draw_request(), config.timeout_s)
    with started.process as process:
        theirs_BHWC, image_ms = pairing.drawn_by(started, case.draw_request(), case.work / f"{peer.name}.npy")
        peak_rss_bytes = process.memory().peak_rss_bytes
    dtype = started.loaded.compute_dtype
    precisions = subject_of(case, ours).precisions.values()
    needed, found = None, None
    if started.loaded.differs:
        pairing.require_same_shape(peer, theirs_BHWC, ours_BHWC)
    else:
        needed = pairing.needed_psnr_db(precisions, ours.compute_dtypes.values(), dtype)
        found = pairing.require_same_picture(peer, theirs_BHWC, ours_BHWC, needed)
    return pairing.Tried(
        peer=peer,
        loaded=started.loaded,
        psnr_db=found,
        needed_db=needed,
        image_ms=image_ms,
        peak_rss_bytes=peak_rss_bytes,
    )


def _same_picture_sentence(tried: pairing.Tried) -> str:
    if tried.psnr_db is None:
        return f"is timed and not compared ({tried.loaded.differs})"
    return f"draws the same to {tried.psnr_db:.1f} dB"


def _require_distinct(cases: Sequence[Case]) -> None:
    names = [case.id for case in cases]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"two bundles are called {twice[0]!r} in the report; rename one of the folders")


def _quality_sentence(quality: Quality) -> str:
    if quality.worst_psnr_db is None:
        return quality.note
    return f"verified, {quality.worst_psnr_db:.1f} dB (limit {quality.limit_psnr_db:g}) over {quality.num_images} pictures"

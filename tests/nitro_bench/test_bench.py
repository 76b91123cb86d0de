from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import bench_reports
import fake_peer
import numpy as np
import pytest

from nitro_bench import checking, timing
from nitro_bench.bench import measure
from nitro_bench.bench_config import BenchConfig
from nitro_bench.bench_html import html
from nitro_bench.bench_markdown import markdown
from nitro_bench.bench_report import ENGINE_STAGES, BenchReport
from nitro_bench.checking import open_cases
from nitro_bench.peer import Drawn, LoadRequest, Peer, PeerProcess
from nitro_bench.peers.catalogue import PEERS
from nitro_rt.bundle import open_bundle
from nitro_rt.device import Driver, Gpu
from nitro_rt.errors import BundleError, ConfigError, EngineMismatch, ModelNotFound
from nitro_rt.noise import draw_noise
from nitro_rt.pipeline import Pipeline

FAKE = Peer(name="fake", title="Fake", adapter=Path(fake_peer.__file__), python=Path(sys.executable))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not looked at here is measured in a moment."""
    monkeypatch.setattr("nitro_bench.ceilings.COPY_BYTES", 1 << 20)
    monkeypatch.setattr("nitro_bench.ceilings.MAX_SECONDS", 0.01)
    monkeypatch.setattr("nitro_bench.timing.THROUGHPUT_MS", 5.0)
    monkeypatch.setattr("nitro_bench.yardstick.NUM_BYTES", 1 << 10)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As far as fakes look: a file's name."""
    folder = tmp_path_factory.mktemp("checkpoint")
    (folder / "model_index.json").write_text("{}")
    return folder


@pytest.fixture(scope="session")
def picture(little_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the bundle draws in one step, for a peer that agrees."""
    path = tmp_path_factory.mktemp("picture") / "picture.npy"
    with Pipeline.load(little_bundle) as pipe:
        np.save(path, np.stack([np.asarray(image) for image in pipe(["a red apple"], seed=20_000, steps=1).images]))
    return path


def config_of(bundle: Path, **changes: Any) -> BenchConfig:
    values: dict[str, Any] = {"steps": (1,), "batch": 1, "images": 8, "processes": 2, "concurrency": (1, 2)}
    return BenchConfig(bundles=(bundle,), **(values | changes))


def test_a_bundle_is_verified_timed_and_counted(little_bundle: Path) -> None:
    lines: list[str] = []
    report = measure(config_of(little_bundle), lines.append)
    (run,) = report.runs
    assert run.subject.id == "little, 1 step, 32 px" and run.subject.digest == open_bundle(little_bundle).digest
    assert run.quality.worst_psnr_db == 100.0 and run.quality.num_images == 1
    assert [len(process.total_ms) for process in run.processes] == [4, 4]
    total = run.summary["total"]
    assert total.num_samples == 8 and total.p95 is None and total.reasons["p95"] == "needs 20 samples, there are 8"
    assert set(run.summary) >= {"tokenize", "noise", "text", "denoise", "decode", "queue", "images", "outside_engines", "cpu"}
    assert 0 < run.outside_share < 1
    for process in run.processes:
        start = process.cold_start
        parts = start.start_ms + start.import_ms + start.load_ms + start.first_image_ms
        assert start.capture_ms is None and parts <= start.total_ms < parts + 5000
        assert len(process.yardstick_ms) == len(process.yardstick_cpu_ms) >= 1
    assert [level.num_threads for level in run.throughput] == [1, 2] and run.throughput[0].images_per_s > 0
    assert (run.peak_rss_bytes or 0) > 10 << 20 and run.device_peak_bytes is None
    assert [work.note.partition(",")[0] for work in run.work] == ["the engine is a reference plan (.json)"] * 3
    assert report.peers == () and report.device == "cpu" and report.name == "tiny"
    assert lines[0].startswith("little, 1 step, 32 px: verified, 100.0 dB")
    assert json.loads(report.to_json())["schema_version"] == 1


def test_images_per_second_count_the_batch(little_bundle: Path) -> None:
    report = measure(config_of(little_bundle, batch=2, processes=1, concurrency=(1,)), lambda line: None)
    (level,) = report.runs[0].throughput
    assert level.images_per_s == pytest.approx(2 * level.num_calls / level.seconds)
    assert report.runs[0].subject.batch == 2


def test_a_bundle_that_draws_another_picture_is_not_timed(spoilt_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nitro_bench.timing.time_images", lambda *a: pytest.fail("it was timed"))
    with pytest.raises(BundleError, match="misses its quality limits: PSNR .* nothing was timed"):
        measure(config_of(spoilt_bundle), lambda line: None)


def test_a_damaged_bundle_is_not_started(little_bundle: Path, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "damaged"
    shutil.copytree(little_bundle, folder)
    bundle = open_bundle(folder)
    bundle.path(bundle.manifest.decode.files[0]).write_bytes(b"x")
    with pytest.raises(BundleError, match="cut or changed"):
        measure(config_of(folder), lambda line: None)


def peers_of(picture: Path) -> dict[str, Peer]:
    def fake(name: str, **options: str) -> Peer:
        return dataclasses.replace(FAKE, name=name, title=f"The {name} peer", options={"picture": str(picture)} | options)

    peers = [fake("same"), fake("other", picture=""), fake("crash", mode="crash"), fake("cannot", mode="cannot")]
    peers += [fake("late", mode="late"), dataclasses.replace(FAKE, name="absent", title="Absent", python=picture)]
    return {peer.name: peer for peer in peers}


@pytest.fixture(scope="module")
def with_peers(little_bundle: Path, checkpoint: Path, picture: Path) -> BenchReport:
    patch = pytest.MonkeyPatch()
    patch.setattr("nitro_bench.ceilings.COPY_BYTES", 1 << 20)
    patch.setattr("nitro_bench.ceilings.MAX_SECONDS", 0.01)
    patch.setattr("nitro_bench.rounds.MAX_PAIRS", 7)
    registry = peers_of(picture)
    config = config_of(
        little_bundle, peers=tuple(registry), registry=registry, checkpoint=checkpoint, processes=1, images=6, concurrency=(1,)
    )
    with patch.context():
        return measure(config, lambda line: None)


def test_a_peer_that_draws_the_same_is_timed_in_turns(with_peers: BenchReport) -> None:
    (peer,) = with_peers.timed_peers("little, 1 step, 32 px")
    assert peer.name == "same" and peer.psnr_db == 100.0 and peer.psnr_needed_db == pytest.approx(48.98, abs=0.01)
    assert len(peer.ours_ms) == len(peer.theirs_ms) == 7 and peer.ratio is not None and peer.ratio.num_pairs == 7
    assert peer.ratio.median == pytest.approx(float(np.median(np.divide(peer.ours_ms, peer.theirs_ms))))
    assert peer.ratio.low is not None and peer.ratio.low <= peer.ratio.median
    assert peer.summary is not None and peer.summary.min >= 2.0 and peer.summary.num_samples == 7 * peer.images_per_turn
    assert peer.device_peak_bytes == 12345 and len(peer.cold_starts) == 1


def test_a_peer_that_cannot_draw_the_same_says_why_and_is_timed(
    little_bundle: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nitro_bench.rounds.MAX_PAIRS", 6)
    registry = {"fake": dataclasses.replace(FAKE, options={"differs": "another schedule"})}
    lines: list[str] = []
    config = config_of(little_bundle, peers=("fake",), registry=registry, checkpoint=checkpoint, processes=1, concurrency=(1,))
    (peer,) = measure(config, lines.append).peers
    assert peer.status == "timed" and peer.psnr_db is None and peer.psnr_needed_db is None
    assert peer.notes[0] == "another schedule" and len(peer.theirs_ms) == 6
    assert any("fake is timed and not compared (another schedule)" in line for line in lines)


def measure_alone(bundle: Path, checkpoint: Path, **changes: Any) -> BenchReport:
    """Beside a peer that refuses to load while a process of ours is alive."""
    registry = {"fake": dataclasses.replace(FAKE, options={"mode": "alone", "differs": "another schedule"})}
    config = config_of(bundle, peers=("fake",), registry=registry, checkpoint=checkpoint, concurrency=(1,), **changes)
    return measure(config, lambda line: None)


def test_a_peer_that_does_not_fit_beside_ours_is_timed_when_ours_is_closed(
    little_bundle: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nitro_bench.rounds.available_bytes", lambda: 32 << 20)
    report = measure_alone(little_bundle, checkpoint, images=7)
    (peer,), (run,) = report.peers, report.runs
    assert peer.status == "timed", peer.reason
    # A pair for each process; the peer drew as often as we did.
    assert peer.ours_ms == tuple(float(np.median(process.total_ms)) for process in run.processes)
    assert len(peer.theirs_ms) == len(peer.cold_starts) == 2 and peer.images_per_turn == 4
    assert peer.summary is not None and peer.summary.num_samples == 7 and peer.ratio is not None
    assert peer.ratio.num_pairs == 2 and peer.ratio.low is None
    note = peer.notes[1]
    assert note.startswith("little, 1 step, 32 px: timed apart, not in turns: our process takes 0.") and "0.0 GiB are" in note
    assert note in report.to_json() and note in markdown(report) and note in html(report)


def test_a_peer_that_fits_beside_ours_is_timed_beside_it(
    little_bundle: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nitro_bench.rounds.available_bytes", lambda: 1 << 40)
    (peer,) = measure_alone(little_bundle, checkpoint, processes=1).peers
    assert peer.reason == "cannot run here: ours is alive"


def test_peers_that_fail_are_listed_with_their_reason(with_peers: BenchReport) -> None:
    reasons = {peer.name: peer.reason for peer in with_peers.peers if peer.status == "failed"}
    assert set(reasons) == {"other", "crash", "cannot", "late", "absent"}
    assert reasons["other"].startswith("draws another picture")
    assert "SIGSEGV during load" in reasons["crash"]
    assert reasons["cannot"] == "cannot run here: needs a device of another kind"
    assert "ended with exit code 4 during draw" in reasons["late"]  # in the middle of its turns
    assert reasons["absent"] == "its interpreter does not start: Permission denied; make peers"


def test_an_unknown_peer_names_those_there_are(little_bundle: Path) -> None:
    with pytest.raises(ConfigError, match=f"no peer 'nobody'; available: .*{sorted(PEERS)[0]}"):
        config_of(little_bundle, peers=("nobody",))


def test_peers_need_the_checkpoint(little_bundle: Path, tmp_path: Path) -> None:
    registry = {"fake": FAKE}
    with pytest.raises(ConfigError, match="name it: --checkpoint DIR"):
        measure(config_of(little_bundle, peers=("fake",), registry=registry), lambda line: None)
    with pytest.raises(ModelNotFound, match=r"holds no model_index\.json"):
        measure(config_of(little_bundle, peers=("fake",), registry=registry, checkpoint=tmp_path), lambda line: None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": (4,)}, "not built for 4 steps; built: 1, 2; use one of these, or build with --steps 4"),
        ({"size": 64}, "not built for 64 pixels"),
        ({"batch": 3}, "built for batch 2, not 3; build with --batch 3"),
    ],
)
def test_what_a_bundle_was_not_built_for_is_refused(little_bundle: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(EngineMismatch, match=message):
        measure(config_of(little_bundle, **changes), lambda line: None)


@pytest.mark.parametrize("changes", [{"images": 0}, {"processes": 0}, {"batch": 0}, {"concurrency": (0,)}, {"timeout_s": 0.0}])
def test_numbers_below_one_are_refused(little_bundle: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="must be"):
        config_of(little_bundle, **changes)


def test_two_bundles_of_one_name_are_refused(little_bundle: Path) -> None:
    with pytest.raises(ConfigError, match="two bundles are called 'little, 1 step, 32 px'"):
        measure(dataclasses.replace(config_of(little_bundle), bundles=(little_bundle, little_bundle)), lambda line: None)


def test_every_side_gets_the_noise_of_its_seed(little_bundle: Path, tmp_path: Path) -> None:
    (case,) = open_cases(config_of(little_bundle, steps=(2,)), tmp_path)
    drawing = case.draw_request()
    assert drawing.prompts == ("a red apple",) and drawing.seed == 20_000
    assert np.array_equal(np.load(drawing.noise), draw_noise(20_000, 2, 1, 1, (4, 4, 4)))


def test_one_report_is_of_one_device(little_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = open_cases(config_of(little_bundle, steps=(1, 2)), tmp_path)
    assert checking.device_of(cases, bench_reports.STATE) == "cpu"
    monkeypatch.setattr("nitro_bench.subject.DEVICE_BACKENDS", ("reference",))
    driver = Driver(found=True, cuda_version="13.0", gpus=(Gpu(name="NVIDIA L4", target="sm89"),), reason="")
    monkeypatch.setattr(checking, "find_driver", lambda: driver)
    assert checking.device_of(cases, bench_reports.STATE) == "NVIDIA L4"
    monkeypatch.setattr(type(cases[0]), "on_gpu", property(lambda case: case.num_steps == 1))
    with pytest.raises(ConfigError, match="some on the processor; one report is of one device"):
        checking.device_of(cases, bench_reports.STATE)


def test_a_step_count_named_twice_and_a_folder_named_by_a_dot(
    little_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(little_bundle)
    cases = open_cases(config_of(Path("."), steps=(1, 1)), tmp_path)
    assert [case.id for case in cases] == ["little, 1 step, 32 px"]


def test_stages_in_one_cuda_graph_are_timed_alone_too(little_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process whose engines run as one tells `device`; one more without graphs tells the stages."""
    draw, options = PeerProcess.draw, []
    start = timing.start

    def started(peer: Peer, load: LoadRequest, *rest: Any) -> timing.Started:
        options.append(load.options)
        return start(peer, dataclasses.replace(load, options={}), *rest)

    def drawn(self: PeerProcess, request: Any, num_images: int = 1, save: Path | None = None) -> Drawn:
        found = draw(self, request, num_images, save)
        if options[-1] == {"cuda_graphs": "off"}:
            return found
        times = [{name: ms for name, ms in told.items() if name not in ENGINE_STAGES} for told in found.timings_ms]
        return dataclasses.replace(found, timings_ms=tuple(told | {"device": 0.5} for told in times))

    monkeypatch.setattr(timing, "start", started)
    monkeypatch.setattr(PeerProcess, "draw", drawn)
    (run,) = measure(config_of(little_bundle, processes=1, concurrency=(1,)), lambda line: None).runs
    assert options == [{}, {}, {"cuda_graphs": "off"}]
    assert run.summary["device"].p50 == 0.5 and all(run.summary[stage].num_samples == 8 for stage in ENGINE_STAGES)
    assert "denoise" not in run.processes[0].stages_ms

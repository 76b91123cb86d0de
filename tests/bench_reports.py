"""Reports of benchmarks that nobody ran: simulated samples in the real dataclasses."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nitro_bench import roofline, samples, timing, warmup
from nitro_bench.bench_report import (
    KIND,
    SCHEMA_VERSION,
    BenchReport,
    ColdStart,
    PeerRun,
    Process,
    Protocol,
    Quality,
    Run,
    Subject,
    Throughput,
)
from nitro_bench.cards import CARDS
from nitro_bench.ceilings import Ceiling
from nitro_bench.flops import Operator, Work
from nitro_bench.pairing import failed
from nitro_bench.peer import Peer
from nitro_bench.subject import OURS, data_uri
from nitro_bench.telemetry import MachineState

CEILINGS = (
    Ceiling(kind="float32", per_s=9e10, by="OpenVINO"),
    Ceiling(kind="int8", per_s=1.5e11, by="OpenVINO"),
    Ceiling(kind="bfloat16", per_s=None, by="", note="this processor multiplies bfloat16 in f32"),
    Ceiling(kind="copy", per_s=2e10, by="NumPy"),
)
MACHINE = {
    "cpu": "Simulated 9000",
    "cores": "8",
    "memory_gib": "64.0",
    "system": "Linux 6",
    "python": "3.11",
    "cpu_features": "avx2",
}
STATE = MachineState(load_average=0.1, cpu_mhz=2400.0, stolen_s=None, gpu=None, reasons={"gpu": "none", "stolen_s": "not told"})


def process(rng: np.random.Generator, scale: float, num_images: int, noise: float = 0.03, yardstick: float = 1.0) -> Process:
    """One process whose image takes about 34 ms times `scale` on a machine whose yardstick takes 3 ms times `yardstick`.

    Its own speed differs by a third of `noise` from other processes', and its images by `noise`, with a long tail.
    """
    own = scale * np.exp(rng.normal(0, noise / 3))
    parts = {"tokenize": 0.05, "noise": 0.1, "text": 2.0, "denoise": 12.0, "decode": 19.0, "queue": 0.1, "images": 0.2}
    stages = {
        name: tuple(
            float(v)
            for v in own * ms * np.exp(np.abs(rng.normal(0, noise, num_images)) + rng.exponential(noise / 2, num_images))
        )
        for name, ms in parts.items()
    }
    total = tuple(sum(values) + 0.4 for values in zip(*stages.values(), strict=True))
    num_blocks = -(-num_images // 4)
    sticks = tuple(float(v) for v in 3.0 * yardstick * np.exp(np.abs(rng.normal(0, noise / 2, num_blocks))))
    return Process(
        cold_start=ColdStart(
            start_ms=30.0,
            import_ms=90.0,
            load_ms=900.0 * scale,
            capture_ms=None,
            first_image_ms=60.0 * scale,
            total_ms=1100.0 * scale + 20,
            peak_rss_bytes=200 << 20,
        ),
        warm_up=warmup.WarmUp(num_images=10, stable=True, last_change=0.01, last_ms=34.0),
        total_ms=total,
        cpu_ms=tuple(2 * value for value in total),
        stages_ms=stages,
        yardstick_ms=sticks,
        yardstick_cpu_ms=sticks,
        images_per_block=4,
    )


def run(
    rng: np.random.Generator,
    name: str = "emoji-1step",
    scale: float = 1.0,
    *,
    psnr_db: float = 88.0,
    num_processes: int = 5,
    num_images: int = 100,
    precision: str = "fp32",
    noise: float = 0.03,
    yardstick: float = 1.0,
) -> Run:
    each = [process(rng, scale, num_images // num_processes, noise, yardstick) for _ in range(num_processes)]
    summary = timing.summaries(each)
    dtype = "int8" if precision == "int8" else "float32"
    works: dict[str, Work | str] = {
        stage: Work(
            operators=(Operator(kind="Conv", dtype=dtype, flops=flops, num_bytes=size),), io_bytes=size, weight_bytes=size
        )
        for stage, flops, size in (
            ("text", 118 << 20, 6 << 20),
            ("denoise", 1278 << 20, 59 << 20),
            ("decode", 2776 << 20, 7 << 20),
        )
    }
    medians = {stage: figures.p50 for stage, figures in summary.items()}
    dtypes = {"text": "float32", "denoise": "float32", "decode": "float32"}
    picture_HW3 = rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)
    return Run(
        subject=Subject(
            id=f"{name}, 1 step, 128 px",
            bundle=name,
            digest="0" * 64,
            model="nitro-emoji",
            checkpoint_sha256="1" * 64,
            backend="openvino",
            precisions={"text": precision, "denoise": precision, "decode": precision},
            compute_dtypes=dtypes,
            steps=1,
            size_px=128,
            batch=1,
            num_bytes=70 << 20,
            toolchain={"openvino": "2026.4.1"},
        ),
        quality=Quality(
            num_images=4,
            worst_psnr_db=psnr_db,
            mean_psnr_db=psnr_db + 1,
            worst_ssim=0.99,
            limit_psnr_db=22.0,
            limit_ssim=0.88,
            note="",
            picture_prompt="a red apple",
            picture_seed=7,
            picture_png=data_uri(picture_HW3),
        ),
        processes=tuple(each),
        summary=summary,
        outside_share=timing.outside_share(each),
        cold_start=timing.median_cold_start([one.cold_start for one in each]),
        throughput=tuple(Throughput(num_threads=n, num_calls=60, seconds=2.0, images_per_s=30.0 / scale) for n in (1, 2, 4)),
        peak_rss_bytes=220 << 20,
        device_peak_bytes=None,
        device_memory_note="this backend has no device memory, or does not tell",
        work=roofline.stage_works(works, 1, CEILINGS, dtypes, medians),
        predictions=(roofline.predict(works, 1, CARDS["h100"]),),
    )


def peer(rng: np.random.Generator, of: Run, title: str, factor: float) -> PeerRun:
    ours = [float(v) for v in of.summary["total"].p50 * np.exp(rng.normal(0, 0.03, 20))]
    theirs = [factor * value * float(np.exp(rng.normal(0, 0.02))) for value in ours]
    start = ColdStart(
        start_ms=30, import_ms=3500, load_ms=1200, capture_ms=None, first_image_ms=400, total_ms=5200, peak_rss_bytes=900 << 20
    )
    return PeerRun(
        subject=of.subject.id,
        name=title,
        title=title,
        status="timed",
        reason="",
        compute_dtype="float32",
        versions={"diffusers": "0.42.1"},
        notes=(),
        psnr_db=88.0,
        psnr_needed_db=49.0,
        ours_ms=tuple(ours),
        theirs_ms=tuple(theirs),
        images_per_turn=3,
        ratio=samples.ratio_of(ours, theirs),
        summary=samples.summary_of(theirs),
        cold_starts=(start,),
        cold_start=start,
        peak_rss_bytes=950 << 20,
        device_peak_bytes=None,
        installed_bytes=1400 << 20,
        model_bytes=70 << 20,
    )


def report(runs: Sequence[Run], peers: Sequence[PeerRun] = (), *, name: str = "nitro-emoji") -> BenchReport:
    return BenchReport(
        schema_version=SCHEMA_VERSION,
        kind=KIND,
        name=name,
        device="cpu",
        date="2026-11-25",
        command="nitro-rt bench emoji-1step",
        commit="0123456789ab",
        machine=MACHINE,
        state_before=STATE,
        state_after=STATE,
        versions={"nitro-rt": "0.1.0", "openvino": "2026.4.1"},
        protocol=Protocol(rules={"warm-up": warmup.RULE}, images=100, processes=5, pairs=20, concurrency=(1, 2, 4)),
        installed_bytes=400 << 20,
        installed_note="the closure of nitro-rt[cpu]",
        ceilings=CEILINGS,
        runs=tuple(runs),
        peers=tuple(peers),
    )


def crashed(of: Run) -> PeerRun:
    crashing = Peer(name="crashing", title="A peer that crashes", adapter=OURS.adapter, python=OURS.python)
    return failed(of.subject.id, crashing, "its process ended by signal SIGSEGV during load: it printed nothing")

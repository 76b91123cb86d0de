from __future__ import annotations

from pathlib import Path

import pytest

from nitro_bench.cards import CARDS, card_of, ceilings_of_gpu
from nitro_bench.ceilings import Ceiling, better_of, measure_ceilings
from nitro_bench.flops import Operator, Work
from nitro_bench.roofline import count_stages, predict, sentences, stage_works
from nitro_rt.bundle import open_bundle
from nitro_rt.errors import ConfigError

CEILINGS = (
    Ceiling(kind="float32", per_s=1e9, by="x"),
    Ceiling(kind="int8", per_s=4e9, by="x"),
    Ceiling(kind="copy", per_s=1e8, by="x"),
)


def work(flops: int, num_bytes: int, dtype: str = "float32") -> Work:
    return Work(
        operators=(Operator(kind="Conv", dtype=dtype, flops=flops, num_bytes=num_bytes),), io_bytes=num_bytes, weight_bytes=0
    )


def test_the_floor_is_the_larger_of_compute_and_memory() -> None:
    works = {"text": work(1_000_000, 1_000), "decode": work(1_000, 1_000_000)}
    found = {one.stage: one for one in stage_works(works, 1, CEILINGS, {}, {"text": 2.0, "decode": 40.0})}
    assert (found["text"].floor_ms, found["text"].bound, found["text"].achieved_share) == (1.0, "compute", 0.5)
    assert (found["decode"].floor_ms, found["decode"].bound, found["decode"].achieved_share) == (10.0, "memory", 0.25)


def test_the_denoiser_runs_once_per_step() -> None:
    (found,) = stage_works({"denoise": work(1_000_000, 10)}, 4, CEILINGS, {}, {"denoise": 8.0})
    assert (found.runs, found.flops, found.floor_ms, found.achieved_share) == (4, 4_000_000, 4.0, 0.5)


def test_operator_by_operator_adds_the_larger_of_each() -> None:
    both = Work(operators=(*work(1_000_000, 10).operators, *work(10, 100_000).operators), io_bytes=20, weight_bytes=0)
    (found,) = stage_works({"text": both}, 1, CEILINGS, {}, {"text": 5.0})
    assert found.floor_ms == pytest.approx(1.00001) and found.operator_floor_ms == pytest.approx(2.0)


def test_quantised_operators_keep_their_type_and_the_rest_takes_the_machine_s() -> None:
    mixed = Work(
        operators=(*work(4_000_000, 1, "int8").operators, *work(1_000_000, 1, "float16").operators), io_bytes=1, weight_bytes=0
    )
    (found,) = stage_works({"decode": mixed}, 1, CEILINGS, {"decode": "float32"}, {"decode": 4.0})
    assert found.flops_by_dtype == {"int8": 4_000_000, "float32": 1_000_000}
    assert found.floor_ms == pytest.approx(2.0)


def test_no_floor_without_a_ceiling_or_a_count_and_it_is_said() -> None:
    unknown, uncounted = stage_works(
        {"text": work(1, 1, "fp8"), "decode": "a plan"}, 1, CEILINGS, {}, {"text": 1.0, "decode": 1.0}
    )
    assert unknown.floor_ms is None and unknown.note == "no ceiling is known for fp8"
    assert uncounted.flops is None and uncounted.note == "a plan"
    assert list(sentences([uncounted])) == ["decode: measured 1.00 ms; no floor: a plan"]


def test_a_device_that_times_the_whole_is_judged_by_the_whole() -> None:
    works = {"text": work(1_000_000, 10), "denoise": work(1_000_000, 10), "decode": work(2_000_000, 10)}
    *parts, whole = stage_works(works, 2, CEILINGS, {}, {"device": 10.0})
    assert [part.measured_ms for part in parts] == [None] * 3 and [part.achieved_share for part in parts] == [None] * 3
    assert (whole.stage, whole.flops, whole.floor_ms, whole.achieved_share) == ("device", 5_000_000, 5.0, 0.5)
    *_, unknown = stage_works(works | {"text": "a plan"}, 2, CEILINGS, {}, {"device": 10.0})
    assert unknown.flops is None and unknown.floor_ms is None and unknown.note == "a plan"
    assert list(sentences(parts))[0] == "text: 0.00 GFLOP, floor 1.00 ms (compute), not timed alone"


def test_a_gpu_at_hand_is_known_by_its_driver_s_name() -> None:
    found = {rate.kind: rate for rate in ceilings_of_gpu("NVIDIA H100 80GB HBM3")}
    assert found["float16"].per_s == 989.4e12 and found["copy"].per_s == 3350e9 and "H100 SXM5" in found["copy"].by
    assert ceilings_of_gpu("NVIDIA L4")[0].by.endswith("NVIDIA L4") and ceilings_of_gpu("NVIDIA L40S")[0].by.endswith("L40S")
    assert ceilings_of_gpu("NVIDIA GeForce RTX 4090")[0].by.endswith("RTX 4090")
    assert ceilings_of_gpu("NVIDIA GeForce GTX 750") == ()


def test_a_card_s_floor_of_the_full_size_decoder() -> None:
    """10.47 TFLOP in float16 at 989.4 T/s: the 10.6 ms of the H100 that is quoted for SDXL's decoder at 1024 pixels."""
    found = predict({"decode": work(10_470_000_000_000, 100_000_000, "float16")}, 1, CARDS["h100"])
    assert found.total_ms == pytest.approx(10.58, abs=0.01)
    assert "data sheet" in found.source
    assert predict({"decode": work(1, 1, "fp8")}, 1, CARDS["a100"]).note == "no ceiling is known for fp8"


def test_cards_are_dense_and_plausible() -> None:
    with pytest.raises(ConfigError, match=r"'h1000' is not known; available: h100, .*rtx4090"):
        card_of("h1000")
    for card in CARDS.values():
        assert card.tera_per_s["float32"] < card.tera_per_s["float16"] == card.tera_per_s["bfloat16"] < card.tera_per_s["int8"]
        assert 300 <= card.gigabytes_per_s <= 4800 and card.source


def test_ceilings_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nitro_bench.ceilings.EDGES", (128, 256))
    monkeypatch.setattr("nitro_bench.ceilings.COPY_BYTES", 4 << 20)
    monkeypatch.setattr("nitro_bench.ceilings.MAX_SECONDS", 0.02)
    found = {rate.kind: rate for rate in measure_ceilings(["float32", "int8", "fp8"])}
    assert (found["float32"].per_s or 0) > 1e8 and (found["copy"].per_s or 0) > 1e7
    assert found["int8"].per_s or "int8 in" in found["int8"].note
    assert found["fp8"].per_s is None and "no arithmetic in fp8" in found["fp8"].note


def test_the_better_of_two_measurements_counts() -> None:
    slow = (Ceiling(kind="copy", per_s=1.0, by="a"), Ceiling(kind="fp8", per_s=None, by=""))
    fast = (Ceiling(kind="copy", per_s=2.0, by="b"), Ceiling(kind="fp8", per_s=None, by=""))
    assert better_of(slow, fast) == better_of(fast, slow) == fast


def test_engines_that_are_no_onnx_cannot_be_counted(little_bundle: Path) -> None:
    found = count_stages(open_bundle(little_bundle), 1)
    assert set(found) == {"text", "denoise", "decode"}
    assert all(isinstance(why, str) and "the graph it was made from is not in the bundle" in why for why in found.values())

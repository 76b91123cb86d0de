from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest

from nitro_bench.pairing import (
    MAX_TURN,
    MIN_PAIRS,
    needed_psnr_db,
    pairs_within,
    require_same_picture,
    turn_length,
    why_apart,
)
from nitro_bench.peer import Peer, PeerFailed

PEER = Peer(name="p", title="P", adapter=Path("a.py"), python=Path(sys.executable))


def test_errors_of_two_sides_add_up() -> None:
    # Both float32: each may be 55 dB from the truth, so they may be 6 dB more apart.
    assert needed_psnr_db(["fp32"], ["float32"], "float32") == pytest.approx(55 - 20 * math.log10(2))
    # The worse side decides: INT8 may be at 22 dB, and float32's share of the difference is small.
    assert needed_psnr_db(["int8", "fp32"], ["float32"], "float32") == pytest.approx(21.81, abs=0.01)
    assert needed_psnr_db(["fp32"], ["float32"], "bfloat16") < 32


def test_another_picture_is_no_peer() -> None:
    ours = np.random.default_rng(0).integers(0, 255, (1, 16, 16, 3), dtype=np.uint8)
    assert require_same_picture(PEER, ours, ours, 49.0) == 100.0
    with pytest.raises(
        PeerFailed, match=r"p: draws another picture: 4\d?\.\d dB|p: draws another picture: \d+\.\d dB from ours, 49\.0"
    ):
        require_same_picture(PEER, 255 - ours, ours, 49.0)
    with pytest.raises(PeerFailed, match=r"draws \[1, 8, 8, 3\], ours is \[1, 16, 16, 3\]"):
        require_same_picture(PEER, ours[:, :8, :8], ours, 49.0)


@pytest.mark.parametrize(
    ("ours", "theirs", "length"), [(1.0, 1.0, MAX_TURN), (30.0, 300.0, 1), (100.0, 120.0, 2), (9e4, 9e4, 1)]
)
def test_turns_are_short_and_never_empty(ours: float, theirs: float, length: int) -> None:
    assert turn_length(ours, theirs) == turn_length(theirs, ours) == length


def test_slow_sides_take_fewer_pairs_but_enough() -> None:
    assert pairs_within(300, 30, 300, 20, 100) == 20
    assert pairs_within(300, 10_000, 20_000, 20, 4) == 10
    assert pairs_within(300, 90_000, 200_000, 20, 100) == MIN_PAIRS


def test_very_slow_sides_take_no_more_pairs_than_images() -> None:
    assert pairs_within(300, 90_000, 200_000, 20, 4) == 4
    assert pairs_within(300, 15_000, 21_000, 20, 2) == 2
    assert pairs_within(300, 15_000, 21_000, 20, 100) == 8
    assert pairs_within(300, 15_000, 19_000, 20, 2) == 9


def test_sides_are_apart_where_both_do_not_fit() -> None:
    gib = 2**30
    assert why_apart(9 * gib, 9 * gib, 20 * gib) == ""  # a tenth is left
    found = why_apart(11 * gib, 15 * gib, 22 * gib)
    assert "our process takes 11.0 GiB and theirs 15.0 GiB, 22.0 GiB are available, of which 10% stays free" in found
    assert why_apart(9 * gib, 9 * gib + 2**20, 20 * gib)
    # What is not known is no reason.
    assert why_apart(None, 9 * gib, gib) == why_apart(9 * gib, None, gib) == why_apart(9 * gib, 9 * gib, 0) == ""

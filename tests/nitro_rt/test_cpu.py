"""What the system tells of the CPU, and what follows from it."""

from __future__ import annotations

from pathlib import Path

import pytest

from nitro_rt.cpu import cpu_name, cpu_target, has_dot_products, saturates

CPUINFO = """processor\t: 0
model name\t: A Processor
flags\t\t: fpu sse2 avx2 avx512f

processor\t: 1
flags\t\t: fpu sse2 avx2 avx512f avx512_vnni
"""


def test_the_first_processor_is_read(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(CPUINFO)
    assert cpu_target(tmp_path / "cpuinfo")["features"] == "avx2 avx512f" and cpu_name(tmp_path / "cpuinfo") == "A Processor"
    assert cpu_target(tmp_path / "absent")["features"] == "" and cpu_name(tmp_path / "absent")


@pytest.mark.parametrize(
    ("features", "dot_products", "saturating"),
    [
        ("avx2", False, True),
        ("avx2 avx512_vnni", True, False),
        ("asimd asimdhp", True, False),
        ("", False, False),  # not told: nothing is claimed
    ],
)
def test_dot_products_are_read_from_the_features(features: str, dot_products: bool, saturating: bool) -> None:
    target = {"features": features}
    assert (has_dot_products(target), saturates(target)) == (dot_products, saturating)

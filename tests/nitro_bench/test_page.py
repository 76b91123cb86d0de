"""The report for people: Markdown and one HTML page."""

from __future__ import annotations

import dataclasses
from html.parser import HTMLParser
from pathlib import Path

import bench_reports
import numpy as np
import pytest

from nitro_bench.bench_html import html
from nitro_bench.bench_markdown import markdown, ms
from nitro_bench.bench_report import BenchReport
from nitro_bench.publish import SUFFIXES, ReportFolder, stem_of, write_text
from nitro_bench.svg import Axis, number
from nitro_rt.errors import ConfigError

VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Collects what a page has, and what is not closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.headings: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


def parsed(text: str) -> Page:
    page = Page()
    page.feed(text)
    page.close()
    assert page.open == []
    return page


@pytest.fixture(scope="module")
def full() -> BenchReport:
    rng = np.random.default_rng(11)
    runs = [
        bench_reports.run(rng, "emoji"),
        bench_reports.run(rng, "emoji-int8", 0.6, psnr_db=25.0, precision="int8"),
        bench_reports.run(rng, "few", 9.0, num_processes=1, num_images=5),
    ]
    peers = [bench_reports.peer(rng, runs[0], "diffusers <eager> & co", 9.0), bench_reports.crashed(runs[1])]
    return bench_reports.report(runs, peers)


def test_the_page_is_whole_and_needs_nothing_from_elsewhere(full: BenchReport) -> None:
    text = html(full)
    page = parsed(text)
    assert "script" not in page.tags and "link" not in page.tags
    assert page.links and all(link.startswith("data:image/png;base64,") for link in page.links)
    assert "http" not in text and "url(" not in text
    assert 'name="viewport"' in text and "prefers-color-scheme: dark" in text
    assert page.tags.count("svg") >= 10


def test_the_page_has_every_section(full: BenchReport) -> None:
    assert parsed(html(full)).headings == [
        "Latency",
        "Where the time goes",
        "Quality against latency",
        "Beside peers",
        "From nothing to the first picture",
        "Footprint",
        "Throughput",
        "Roofline",
        "Predicted floors",
        "All figures",
        "How it was measured",
    ]


def test_sections_without_content_are_left_out(full: BenchReport) -> None:
    run = dataclasses.replace(full.runs[0], predictions=(), throughput=(), work=())
    assert not {"Beside peers", "Throughput", "Roofline", "Predicted floors"} & set(
        parsed(html(bench_reports.report([run]))).headings
    )


def test_names_are_escaped(full: BenchReport) -> None:
    text = html(full)
    assert "diffusers &lt;eager&gt; &amp; co" in text and "<eager>" not in text


def test_both_tell_what_is_missing_and_why(full: BenchReport) -> None:
    for text in (html(full), markdown(full)):
        assert "p99 needs 100 samples, there are 5" in text
        assert "its process ended by signal SIGSEGV during load" in text
        assert "Predictions, not measurements" in text
        assert "bfloat16: this processor multiplies bfloat16 in f32" in text
        assert "was busy" not in text


def test_a_busy_machine_is_told_first(full: BenchReport) -> None:
    busy = dataclasses.replace(full, state_before=dataclasses.replace(bench_reports.STATE, load_average=9.5))
    assert "The machine was busy (load 9.5 on 8 cores" in html(busy)
    assert markdown(busy).splitlines()[2].startswith("**The machine was busy** (load 9.5 on 8 cores")


def test_a_ceiling_that_was_passed_is_doubted(full: BenchReport) -> None:
    def with_share(share: float) -> BenchReport:
        works = tuple(dataclasses.replace(work, achieved_share=share) for work in full.runs[0].work)
        return bench_reports.report([dataclasses.replace(full.runs[0], work=works)])

    for write in (html, markdown):
        assert "A share above 100 % says that the machine was busier" in write(with_share(1.2))
        assert "A share above 100 %" not in write(with_share(0.9))


def test_markdown_tables_are_whole(full: BenchReport) -> None:
    lines = markdown(full).splitlines()
    assert lines[0] == "# Benchmark: nitro-emoji, cpu, 2026-11-25"
    widths: list[int] = []
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if line.startswith("|"):
            widths.append(line.count("|"))
            if not following.startswith("|"):
                assert len(set(widths)) == 1, line
                widths = []
    assert "| emoji-int8, 1 step, 128 px | 25.0 | 22 |" in "\n".join(lines)


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "-"), (0.01234, "0.0123"), (3.14159, "3.14"), (99.96, "100"), (12345.6, "12,346")],
)
def test_milliseconds_are_short(value: float | None, shown: str) -> None:
    assert ms(value) == shown


def test_a_report_makes_three_files_of_one_name(full: BenchReport, tmp_path: Path) -> None:
    paths = ReportFolder(tmp_path / "new" / "reports", force=False).publish(full)
    assert [path.name for path in paths] == [f"nitro-emoji_cpu_202611{suffix}" for suffix in SUFFIXES]
    assert sorted(path.name for path in paths[0].parent.iterdir()) == sorted(
        path.name for path in paths
    )  # nothing half-written
    assert paths[0].read_text(encoding="utf-8") == full.to_json()


def test_a_report_is_not_replaced_unasked(full: BenchReport, tmp_path: Path) -> None:
    import time

    taken = tmp_path / f"nitro-emoji_cpu_{time.strftime('%Y%m')}.md"
    taken.write_text("mine")
    with pytest.raises(ConfigError, match=r"\.md is there already; --force replaces it"):
        ReportFolder(tmp_path, force=False).require_free("nitro-emoji", "cpu")
    ReportFolder(tmp_path, force=False).require_free("other", "cpu")
    ReportFolder(tmp_path, force=True).require_free("nitro-emoji", "cpu")
    assert taken.read_text() == "mine"


def test_places_that_cannot_be_written_are_refused(full: BenchReport, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        ConfigError, match="nothing can be written into .*file: Not a directory; make that folder or choose another"
    ):
        ReportFolder(tmp_path / "file", force=False).require_free("a", "cpu")
    with pytest.raises(ConfigError, match="cannot be written"):
        write_text(tmp_path / "absent" / "a.json", "{}")


def test_names_of_files_are_plain() -> None:
    assert stem_of("a/b + ü", "NVIDIA H100 80GB HBM3", "2026-11-25") == "a-b-+_NVIDIA-H100-80GB-HBM3_202611"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.0, "0"),
        (0.00012, "0.00012"),
        (33.25, "33.2"),
        (999.0, "999"),
        (35_295.0, "35,295"),
        (181_265.0, "181,265"),
        (2e9, "2e9"),
    ],
)
def test_labels_tell_slow_images_apart(value: float, expected: str) -> None:
    assert number(value) == expected


@pytest.mark.parametrize("ends", [(30_000.0, 36_000.0), (50.0, 80.0), (1.0, 1000.0)])
def test_a_logarithmic_axis_has_marks_within_a_decade_too(ends: tuple[float, float]) -> None:
    marks = Axis(*ends, 0.0, 100.0, log=True).ticks()
    assert len(marks) > 1 and all(ends[0] <= mark <= ends[1] for mark in marks)

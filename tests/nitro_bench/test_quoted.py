"""What a page quotes is what the report says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nitro_bench.quoted import QUOTE, checked, figure, main
from nitro_rt.errors import ConfigError

ROOT = Path(__file__).parents[2]
PAGE = "So <!-- from r.json: rows/1/ratio .2f -->{}<!-- end --> times, {} as a share."
SHARE = "<!-- from r.json: share .0% -->{}<!-- end -->"


@pytest.fixture
def report(tmp_path: Path) -> Path:
    path = tmp_path / "r.json"
    path.write_text(json.dumps({"rows": [{"ratio": 1}, {"ratio": 0.4249}], "share": 0.031, "name": "x"}))
    return path


def test_what_differs_is_said_and_mended(report: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = report.with_name("page.md")
    page.write_text(PAGE.format("0.42", SHARE.format("3%")))
    assert main([str(page)]) == 0
    page.write_text(PAGE.format("0.40", SHARE.format("")))
    assert main([str(page)]) == 1
    said = capsys.readouterr().err
    assert "rows/1/ratio is 0.42, the page says 0.40" in said and "share is 3%, the page says nothing" in said
    assert main([str(page), "--write"]) == 0 and main([str(page)]) == 0
    assert page.read_text() == PAGE.format("0.42", SHARE.format("3%"))


@pytest.mark.parametrize(
    ("place", "form", "message"),
    [
        ("rows/2/ratio", ".2f", "no rows/2/ratio: at '2' there is 2 entries"),
        ("absent", ".2f", "no absent: at 'absent' there is rows, share, name"),
        ("share/deeper", ".2f", "at 'deeper' there is 0.031"),
        ("name", ".2f", "cannot be written as '.2f'"),
    ],
)
def test_a_place_that_is_not_there(place: str, form: str, message: str, report: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        figure(report, place, form)


def test_a_report_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="absent.json cannot be read"):
        checked("<!-- from absent.json: a .2f -->1<!-- end -->", tmp_path)


def test_the_readme_quotes_its_reports() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert QUOTE.search(text) is not None
    assert checked(text, ROOT)[1] == []

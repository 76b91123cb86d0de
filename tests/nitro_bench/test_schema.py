from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bench_reports
import numpy as np
import pytest

from nitro_bench import schema
from nitro_bench.bench_report import SCHEMA_VERSION, BenchReport
from nitro_bench.schema import Misfit

FOLDER = Path(__file__).parents[2] / "benchmarks/reports/schema"
PUBLISHED = FOLDER / f"bench-{SCHEMA_VERSION}.json"


@pytest.fixture(scope="module")
def data() -> Any:
    rng = np.random.default_rng(3)
    runs = [bench_reports.run(rng), bench_reports.run(rng, "few", num_processes=1, num_images=5)]
    peers = [bench_reports.peer(rng, runs[0], "diffusers", 9.0), bench_reports.crashed(runs[0])]
    return json.loads(bench_reports.report(runs, peers).to_json())


def test_the_published_schema_is_that_of_the_code() -> None:
    found = schema.schema_of(BenchReport, "A report of nitro-rt bench", SCHEMA_VERSION)
    assert json.loads(PUBLISHED.read_text(encoding="utf-8")) == found, "write it anew: python -m nitro_bench.schema"


def test_a_report_fits_the_published_schema(data: Any) -> None:
    published = json.loads(PUBLISHED.read_text(encoding="utf-8"))
    assert list(problems(data, published, published["$defs"], "report")) == []


def test_committed_reports_fit_their_schema() -> None:
    for path in FOLDER.parent.glob("*.json"):
        report = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(report, dict) and report.get("kind") == "nitro-rt bench":
            published = json.loads((FOLDER / f"bench-{report['schema_version']}.json").read_text(encoding="utf-8"))
            assert list(problems(report, published, published["$defs"], path.name)) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("commit"), "report lacks the field 'commit'"),
        (lambda d: d.update(extra=1), "report has the unknown field 'extra'"),
        (lambda d: d["runs"][0]["subject"].update(steps="1"), r"report\.runs\[0\]\.subject\.steps must be integer, found '1'"),
        (lambda d: d["runs"][0]["summary"]["total"].update(p99=True), r"summary\.total\.p99 must be number"),
        (lambda d: d.update(runs={}), "report.runs must be a list"),
    ],
)
def test_what_does_not_fit_is_named_by_both(data: Any, change: Any, message: str) -> None:
    broken = json.loads(json.dumps(data))
    change(broken)
    with pytest.raises(Misfit, match=message):
        schema.read(BenchReport, broken, "report")
    published = json.loads(PUBLISHED.read_text(encoding="utf-8"))
    assert list(problems(broken, published, published["$defs"], "report"))


def test_reading_gives_back_what_was_written(data: Any) -> None:
    assert json.loads(schema.read(BenchReport, data, "report").to_json()) == data


def problems(value: Any, rule: dict[str, Any], definitions: dict[str, Any], place: str) -> list[str]:
    """Where `value` breaks `rule`: the part of JSON Schema that ours uses, so that no library is needed."""
    if "$ref" in rule:
        rule = definitions[rule["$ref"].rpartition("/")[2]]
    if "anyOf" in rule:
        tries = [problems(value, option, definitions, place) for option in rule["anyOf"]]
        return [] if any(not found for found in tries) else tries[0]
    if "const" in rule:
        return [] if value == rule["const"] else [f"{place} is not {rule['const']}"]
    kinds = {
        "object": dict,
        "array": list,
        "string": str,
        "boolean": bool,
        "null": type(None),
        "integer": int,
        "number": (int, float),
    }
    is_bool_as_number = isinstance(value, bool) and rule["type"] in ("integer", "number")
    if not isinstance(value, kinds[rule["type"]]) or is_bool_as_number:  # type: ignore[arg-type]
        return [f"{place} is no {rule['type']}"]
    found = []
    if rule["type"] == "array":
        for index, item in enumerate(value):
            found += problems(item, rule["items"], definitions, f"{place}[{index}]")
    if rule["type"] == "object":
        properties, rest = rule.get("properties", {}), rule["additionalProperties"]
        found += [f"{place} lacks {name}" for name in rule.get("required", ()) if name not in value]
        for name, item in value.items():
            if name in properties:
                found += problems(item, properties[name], definitions, f"{place}.{name}")
            elif rest is False:
                found.append(f"{place} has the unknown field {name}")
            else:
                found += problems(item, rest, definitions, f"{place}.{name}")
    return found

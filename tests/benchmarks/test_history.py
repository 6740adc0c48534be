"""A history: appended, read, and what it refuses."""

from dataclasses import replace
from pathlib import Path

import pytest

from onnx_lathe.benchmarks import history
from onnx_lathe.benchmarks.report.history import changes, history_document, history_plots
from onnx_lathe.benchmarks.report.history import history as sections
from onnx_lathe.benchmarks.report.render import render_page
from onnx_lathe.benchmarks.result import Interval
from onnx_lathe.runtime.errors import InputError
from tests.benchmarks.suites import MACHINE, rebuilt, suite

DAYS = [f"2026-01-0{day}T00:00:00+00:00" for day in range(1, 6)]


def test_results_are_appended_and_come_back_in_order(tmp_path: Path):
    file = tmp_path / "h.jsonl"
    wanted = [suite(day, {"m": 0.001}) for day in DAYS[:3]]
    for result in wanted:
        history.append(file, result)
    assert list(history.read(file)) == wanted


def test_a_corrupted_line_is_named_and_never_appended_to(tmp_path: Path):
    file = tmp_path / "h.jsonl"
    history.append(file, suite(DAYS[0], {"m": 0.001}))
    with file.open("a") as stream:
        stream.write('{"schema": "onnx-la')
    with pytest.raises(InputError, match=r"h\.jsonl, line 2: got no JSON"):
        history.read(file)
    before = file.read_bytes()
    with pytest.raises(InputError, match=r"h\.jsonl, last line: got a line that was cut short"):
        history.append(file, suite(DAYS[1], {"m": 0.001}))
    assert file.read_bytes() == before


def test_an_older_schema_is_named(tmp_path: Path):
    file = tmp_path / "h.jsonl"
    file.write_text('{"schema": "onnx-lathe/bench/1"}\n')
    with pytest.raises(InputError, match="line 1: got schema 'onnx-lathe/bench/1', expected JSON of schema"):
        history.read(file)


def test_what_is_missing_empty_or_no_file_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match=r"no\.jsonl: got No such file or directory, expected results as"):
        history.read(tmp_path / "no.jsonl")
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(InputError, match="got no result, expected at least one"):
        history.read(tmp_path / "empty.jsonl")
    with pytest.raises(InputError, match="Is a directory, expected a file to append to"):
        history.append(tmp_path, suite(DAYS[0], {"m": 0.001}))


def test_each_result_is_held_against_the_one_before():
    results = [
        suite(DAYS[0], {"m": 0.001}),
        suite(DAYS[1], {"m": 0.001}),
        rebuilt(suite(DAYS[2], {"m": 0.0012})),
        suite(DAYS[3], {"m": 0.002}, environment={**MACHINE, "cpu": "another CPU"}),
        suite(DAYS[4], {"m": 0.002}, environment={**MACHINE, "cpu": "another CPU"}, canary=(0.02,) * 9),
    ]
    points = history.series(results)[0].points
    assert [point.verdict for point in points] == ["first", "no difference", "slower", "not compared", "inconclusive"]
    assert [point.reason for point in points[:4]] == ["", "same file", "changed file", "cpu: a CPU, another CPU"]
    assert [change["taken"] for change in changes(results)] == [DAYS[2]]


def test_the_page_tells_the_changes_and_draws_a_line_for_each_model():
    results = [suite(day, {"<m>": 0.001 + 0.0005 * number, "n": 0.002}) for number, day in enumerate(DAYS[:3])]
    page = render_page(history_document("h.jsonl", results), history_plots(results))
    assert "slower 2 times" in page
    assert "<m>" not in page
    figure = history_plots(results)["history"][0].figure
    assert [line["name"] for line in figure["data"]] == ["&lt;m&gt;", "n"]
    assert figure["data"][0]["y"] == pytest.approx([1.0, 1.5, 2.0])
    rows = sections(results)[0].tables[0].rows
    assert [row.cells[3].value for row in rows][:3] == ["—", "+50.0 %", "+33.3 %"]


def test_medians_of_processes_are_all_that_a_history_needs():
    before, now = suite(DAYS[0], {"m": 0.001}), suite(DAYS[1], {"m": 0.0012})
    small = [
        replace(result, cases=(replace(case, measurement=history.medians_only(case.measurement)),))
        for result in (before, now)
        for case in result.cases
    ]
    assert history.series(small) == history.series([before, now])
    assert {len(process) for process in small[0].cases[0].measurement.timings[0].blocks} == {1}


def test_accuracy_stands_beside_the_latency_where_it_was_judged():
    plain = suite(DAYS[0], {"m": 0.001, "n": 0.001})
    m, n = plain.models
    judged = replace(plain, models=(replace(m, accuracy=Interval(0.9, 0.8, 0.95), metric="f1_macro"), n))
    assert [column.name for column in sections([plain])[0].tables[0].columns] == [
        *("model", "taken", "p50", "change", "verdict", "why")
    ]
    table = sections([judged])[0].tables[0]
    assert [column.name for column in table.columns][3:5] == ["change", "accuracy"]
    assert [row.cells[4].text for row in table.rows] == ["90.0 % [80.0, 95.0] (f1_macro)", "—"]

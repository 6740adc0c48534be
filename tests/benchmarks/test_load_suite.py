"""Results under load: they come back from JSON and from a history, are judged together, and are shown."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from onnx_lathe.benchmarks import history
from onnx_lathe.benchmarks.load_suite import LoadSuite, judged_together
from onnx_lathe.benchmarks.report.history import history as sections
from onnx_lathe.benchmarks.report.history import history_document, history_plots
from onnx_lathe.benchmarks.report.load import bounds_missed, under_load
from onnx_lathe.benchmarks.report.render import render_page
from onnx_lathe.benchmarks.scenarios import OfflineResult, ServerResult
from onnx_lathe.runtime.errors import InputError
from tests.benchmarks.suites import highest_rates, offline, server, suite, under

TAKEN = "2026-01-01T00:00:00+00:00"


@pytest.mark.parametrize("result", [offline(), server(), highest_rates()])
def test_a_result_comes_back_whole_with_its_raw_times_and_environment(
    result: OfflineResult | ServerResult, tmp_path: Path
) -> None:
    wanted = under(TAKEN, result)
    text = wanted.to_json()
    assert "\n" not in text
    assert json.loads(text)["schema"] == "onnx-lathe/load/1"
    assert LoadSuite.from_json(text) == wanted
    history.append(tmp_path / "h.jsonl", suite(TAKEN, {"a": 0.001}))
    history.append(tmp_path / "h.jsonl", wanted)
    assert history.read(tmp_path / "h.jsonl") == (suite(TAKEN, {"a": 0.001}), wanted)


def test_what_is_no_result_under_load_is_refused() -> None:
    with pytest.raises(InputError, match=r"old\.json: got schema 'onnx-lathe/load/0', expected JSON of schema 'onnx-"):
        LoadSuite.from_json('{"schema": "onnx-lathe/load/0"}', "old.json")


def test_cases_are_judged_together() -> None:
    alone, among = under(TAKEN, offline(), server()).cases, under(TAKEN, *[offline(0.98), server()] * 40).cases
    offline_alone, server_alone = (case.result for case in judged_together(alone))
    assert isinstance(offline_alone, OfflineResult)
    assert isinstance(server_alone, ServerResult)
    assert [each.verdict for each in (*offline_alone.comparisons, *server_alone.comparisons)] == ["faster"] * 3
    (many, *_) = (case.result for case in judged_together(among))
    assert isinstance(many, OfflineResult)
    assert many.comparisons[0].verdict == "inconclusive"
    assert "for so many subjects" in many.comparisons[0].reason
    rates = under(TAKEN, highest_rates()).cases
    assert judged_together(rates) == rates


def test_each_scenario_has_its_tables() -> None:
    throughput, latency, rate = (under_load(case) for case in under(TAKEN, offline(), server(), highest_rates()).cases)
    assert throughput.tables[0].caption == "offline, batch 8, 1 thread, cpu, 2 streams"
    assert [row.cells[0].value for row in latency.tables[1].rows] == ["b", "b"]
    assert [row.cells[2].value for row in latency.tables[1].rows] == ["p50", "p95"]
    assert [row.cells[4].value for row in latency.tables[1].rows] == ["faster", "faster"]
    assert rate.tables[0].rows[0].cells[1].value == "none"
    assert bounds_missed(highest_rates()) == ["a: no rate keeps the bound"]
    assert bounds_missed(offline()) == []


def test_a_page_shows_results_alone_and_under_load() -> None:
    results = [under(TAKEN, offline(), server()), under("2026-01-02T00:00:00+00:00", offline())]
    only = history_document("h.jsonl", results)
    assert (only.status, [section.key for section in only.sections]) == ("under load", ["load"])
    assert [table.caption.partition(": ")[0] for table in only.sections[0].tables] == [TAKEN] * 3 + [results[1].taken]
    both = (*results, suite(TAKEN, {"<m>": 0.001}))
    assert [section.key for section in sections(both)] == ["history", "load"]
    page = render_page(history_document("h.jsonl", both), history_plots(both))
    assert "Latency under the same arrivals" in page
    assert "<m>" not in page


def test_without_a_comparison_there_is_no_table_of_them() -> None:
    alone = replace(server(), comparisons=())
    assert len(under_load(under(TAKEN, alone).cases[0]).tables) == 1

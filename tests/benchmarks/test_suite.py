"""Results of several cases: they come back from JSON, and their verdicts are adjusted together."""

import json
from dataclasses import replace

import numpy as np
import pytest

from onnx_lathe.benchmarks.result import Interval, Timing
from onnx_lathe.benchmarks.suite import Suite, judged_together
from onnx_lathe.benchmarks.verdict import compare_all
from onnx_lathe.runtime.errors import InputError
from tests.benchmarks.suites import STEADY, roofline, suite


def test_a_result_comes_back_whole_with_its_raw_samples_and_environment():
    wanted = suite("2026-01-01T00:00:00+00:00", {"a": 0.001, "b": 0.002}, rooflines=(roofline("a", Conv=0.001),))
    text = wanted.to_json()
    assert "\n" not in text
    assert Suite.from_json(text) == wanted
    assert json.loads(text)["schema"] == "onnx-lathe/bench/2"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"schema": "onnx-lathe/bench/1"}', r"got schema 'onnx-lathe/bench/1', expected JSON of schema 'onnx-lathe/b"),
        ("{", r"old\.json: got no JSON"),
        ("[]", "got schema None"),
        ('{"schema": "onnx-lathe/bench/2"}', "got taken: Field required"),
    ],
)
def test_what_is_no_result_of_this_schema_is_refused(text: str, message: str):
    with pytest.raises(InputError, match=message):
        Suite.from_json(text, "old.json")


def test_a_case_is_called_by_its_conditions():
    assert suite("", {"a": 0.001}).cases[0].title == "batch 8, 1 thread, cpu"
    assert suite("", {"a": 0.001}, threads=2).cases[0].title == "batch 8, 2 threads, cpu"


def test_a_difference_that_holds_alone_is_inconclusive_among_many_cases():
    rng = np.random.default_rng(3)

    def timing(name: str, ratio: float) -> Timing:
        medians = np.exp(rng.normal(0.0, 0.002, (1, 12))) * ratio
        blocks = tuple(tuple((float(value),) * 3 for value in process) for process in medians)
        return Timing(name, blocks, Interval(1.0, 1.0, 1.0), None, 0, 0.0)

    run = ([timing("a", 1.0), timing("b", 1 / 1.02)], STEADY)
    alone = compare_all([run])[0][0]
    among = compare_all([run] * 300)[0][0]
    assert alone.verdict == "faster"
    assert (among.verdict, among.reason[:17]) == ("inconclusive", "too few processes")


def test_cases_are_judged_together():
    case = suite("", {"a": 0.001, "b": 0.002}).cases[0]
    bare = replace(case, measurement=replace(case.measurement, comparisons=()))
    assert judged_together([bare, bare])[1].measurement.comparisons == case.measurement.comparisons

"""The gate of a baseline: what passes, what does not, and what cannot be told."""

import math
from dataclasses import replace

import pytest
from scipy import stats as scipy_stats

from onnx_lathe.benchmarks.gate import check_covers, gate_measured, gate_recorded
from onnx_lathe.benchmarks.result import Interval
from onnx_lathe.benchmarks.stats import shift
from onnx_lathe.benchmarks.suite import Suite
from onnx_lathe.runtime.errors import InputError
from tests.benchmarks.suites import MACHINE, roofline, suite

THEN, NOW = "2026-01-01T00:00:00+00:00", "2026-01-02T00:00:00+00:00"


@pytest.mark.parametrize(
    ("seconds", "outcome", "reason"),
    [
        (0.00102, "kept", "at most 2.0% slower, with 95 % confidence"),
        (0.0009, "kept", "at least 10.0% faster, with 95 % confidence"),
        (0.00108, "regressed", "at least 8.0% slower, with 95 % confidence"),
    ],
)
def test_a_model_is_held_against_its_record(seconds: float, outcome: str, reason: str):
    found = gate_recorded(suite(THEN, {"m": 0.001}), suite(NOW, {"m": seconds}), 0.05)[0]
    assert (found.outcome, found.reason) == (outcome, reason)
    assert found.slowdown.value == pytest.approx(seconds / 0.001 - 1, abs=1e-3)
    assert found.baseline == f"m of {THEN}"


def test_an_interval_that_holds_the_limit_does_not_pass():
    found = gate_recorded(suite(THEN, {"m": 0.001}), suite(NOW, {"m": 0.00105}, spread=0.06), 0.05)[0]
    assert found.outcome == "inconclusive"
    assert found.reason.endswith("which holds the limit: measure longer")


def test_a_machine_that_changed_midway_is_inconclusive():
    drifting = (0.01,) * 5 + (0.012,) * 4
    found = gate_recorded(suite(THEN, {"m": 0.001}), suite(NOW, {"m": 0.001}, canary=drifting), 0.05)[0]
    assert (found.outcome, found.reason) == ("inconclusive", "the machine drifted by 20.0% during this run")


def test_a_machine_in_another_state_than_at_the_baseline_is_inconclusive():
    found = gate_recorded(suite(THEN, {"m": 0.001}), suite(NOW, {"m": 0.0011}, canary=(0.011,) * 9), 0.05)[0]
    assert found.outcome == "inconclusive"
    assert found.reason == (
        "a fixed kernel takes 1.10 times what it took in the baseline: the machine is not in that state"
    )


def test_the_first_model_of_the_same_run_is_a_baseline():
    result = suite(NOW, {"old": 0.001, "new": 0.0012}, rooflines=(roofline("old", Conv=1.0), roofline("new", Conv=3.0)))
    found = gate_measured(result, 0.05)[0]
    assert (found.model, found.baseline, found.outcome) == ("new", "old", "regressed")
    assert found.slowdown.value == pytest.approx(0.2, abs=1e-3)
    assert [(change.op_type, change.before, change.now) for change in found.operators] == [("Conv", 1.0, 3.0)]


def test_operators_are_listed_by_their_change():
    before = suite(THEN, {"m": 0.001}, rooflines=(roofline("m", Conv=1.0, Add=0.5, Mul=0.1),))
    now = suite(NOW, {"m": 0.002}, rooflines=(roofline("m", Conv=1.1, Add=2.0),))
    found = gate_recorded(before, now, 0.05)[0]
    assert [change.op_type for change in found.operators] == ["Add", "Conv", "Mul"]
    assert found.operators[2].now == 0.0


def test_unlike_environments_are_refused_unless_told_to():
    there = suite(THEN, {"m": 0.001}, environment={**MACHINE, "cpu": "another CPU"})
    here = suite(NOW, {"m": 0.001}, environment={**MACHINE, "load": 7.0})
    with pytest.raises(InputError, match=r"another environment \(cpu: another CPU, a CPU\), expected the one of this"):
        gate_recorded(there, here, 0.05)
    assert gate_recorded(there, here, 0.05, anywhere=True)[0].outcome == "kept"


def test_a_baseline_without_the_model_or_the_case_is_refused():
    with pytest.raises(InputError, match="got results of x, y, expected also of m"):
        gate_recorded(suite(THEN, {"x": 0.001, "y": 0.001}), suite(NOW, {"m": 0.001}), 0.05)
    with pytest.raises(InputError, match="got cases batch 8, 1 thread, cpu, expected batch 8, 2 threads, cpu"):
        gate_recorded(suite(THEN, {"m": 0.001}), suite(NOW, {"m": 0.001}, threads=2), 0.05)


def test_what_a_baseline_lacks_is_known_before_anything_is_measured():
    baseline = suite(THEN, {"m": 0.001, "n": 0.002})
    conditions = baseline.cases[0].conditions
    check_covers(baseline, ["m"], [conditions])
    with pytest.raises(InputError, match="got results of m, n, expected also of x"):
        check_covers(baseline, ["x"], [conditions])
    with pytest.raises(InputError, match="got cases batch 8, 1 thread, cpu, expected batch 2, 1 thread, cpu"):
        check_covers(baseline, ["m"], [conditions, replace(conditions, dims={"batch": 2})])


def test_a_single_model_may_have_been_renamed():
    assert gate_recorded(suite(THEN, {"old": 0.001}), suite(NOW, {"new": 0.001}), 0.05)[0].model == "new"


def test_the_shift_of_two_samples_is_exact_where_it_can_be():
    low, high = [1.0, 2.0, 3.0, 4.0, 5.0], [11.0, 12.0, 13.0, 14.0, 15.0]
    found = shift(high, low)
    # Of 252 rankings 5 have U of at most 2, and 9 of at most 3 (2.5 % of 252 is 6.3): the third difference ends it.
    assert (found.value, found.low, found.high) == (10.0, 7.0, 13.0)
    few = shift([2.0, 3.0], [1.0, 2.5])
    welch = scipy_stats.ttest_ind([2.0, 3.0], [1.0, 2.5], equal_var=False).confidence_interval(0.95)
    assert (few.low, few.value, few.high) == pytest.approx((welch.low, 0.75, welch.high))


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([3.0], [1.0], Interval(2.0, -math.inf, math.inf)),
        ([1.0], [1.0], Interval(0.0, -math.inf, math.inf)),
        ([3.0], [1.0, 2.0], Interval(1.5, -math.inf, math.inf)),
        ([3.0, 3.0], [1.0], Interval(2.0, -math.inf, math.inf)),
        # The mean of three 0.1 is none of them, so their variance is not quite zero.
        ([0.1, 0.1, 0.1], [0.3, 0.3], Interval(-0.2, -math.inf, math.inf)),
        ([0.1, 0.1, 0.1], [0.1, 0.1, 0.1], Interval(0.0, 0.0, 0.0)),
    ],
)
def test_a_shift_is_unbounded_where_no_spread_was_seen(a: list[float], b: list[float], expected: Interval):
    found = shift(a, b)
    assert (found.low, found.high) == (expected.low, expected.high)
    assert found.value == pytest.approx(expected.value)


def test_one_sample_without_spread_leaves_that_of_the_other():
    found = shift([3.0, 3.0, 3.0], [1.0, 2.0, 1.5])
    assert found.value == 1.5
    # Student's with 2 degrees of freedom: 1.5 -+ 4.3027 * 0.5 / sqrt(3).
    assert (found.low, found.high) == pytest.approx((0.25793, 2.74207), abs=1e-5)


def test_a_single_process_decides_nothing():
    then, now = (suite(when, {"m": seconds}) for when, seconds in ((THEN, 0.001), (NOW, 0.002)))
    found = gate_recorded(_of_one_process(then), _of_one_process(now), 0.05)[0]
    assert found.outcome == "inconclusive"
    assert found.slowdown.value == pytest.approx(1.0, abs=1e-2)


def _of_one_process(result: Suite) -> Suite:
    (case,) = result.cases
    timings = tuple(replace(timing, blocks=timing.blocks[:1]) for timing in case.measurement.timings)
    return replace(result, cases=(replace(case, measurement=replace(case.measurement, timings=timings)),))

"""Offline and server: raw times in, figures and refusals out; the chain through workers. No timing is asserted."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import psutil
import pytest

from onnx_lathe.benchmarks import load, scenarios
from onnx_lathe.benchmarks.measure import Effort
from onnx_lathe.benchmarks.queueing import LatencyBound, Responses, Run, respond, run_percentile
from onnx_lathe.benchmarks.scenarios import Traffic, max_rate, measure_offline, measure_server
from onnx_lathe.benchmarks.stats import percentile
from onnx_lathe.benchmarks.subject import Subject
from onnx_lathe.runtime.errors import InputError, MeasurementError

QUICK = Effort(processes=1, rounds=6, block_seconds=0.003, time_budget=1.0)
FEW = Traffic(queries=20, runs=2)


@pytest.fixture
def _subjects_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent)


on_path = pytest.mark.usefixtures("_subjects_on_path")


def sleeper(name: str, seconds: float = 0.001) -> Subject:
    return Subject(name, "subjects:sleep", {"seconds": seconds})


def run_of(rate: float, service: float, queries: int, seed: str, streams: int = 1, lateness: float = 0.0) -> Run:
    """A run whose server takes ``service`` seconds for each query."""
    arrivals = [at / 1e9 for at in load.schedule(rate, queries, seed)]
    latencies = load.simulate(arrivals, [service] * queries, streams)
    ends = tuple(arrival + latency for arrival, latency in zip(arrivals, latencies, strict=True))
    return Run(tuple(arrivals), tuple(end - service for end in ends), ends, (lateness,) * 5, 1 << 20, 0.1)


def judge(rate: float, service: float, bound: LatencyBound | None = None, queries: int = 500) -> Responses:
    return respond("a", [run_of(rate, service, queries, f"0/{run}") for run in range(5)], 1, bound=bound)


def test_percentiles_are_those_of_the_queue_and_the_deepest_is_refused():
    found = judge(50.0, 0.01)
    values = [value for run in found.runs for value in run.latencies]
    shown = {each.quantile: each for each in found.percentiles}
    for quantile in (0.5, 0.9, 0.95, 0.99):
        interval = shown[quantile].value
        assert interval
        assert interval.value == np.quantile(values, quantile)
        assert interval.low <= interval.value <= interval.high
    assert shown[0.999].value is None
    assert shown[0.999].reason == "got 2500 values, expected at least 6636"
    assert found.overloaded == ""
    assert found.load == pytest.approx(0.5, rel=0.05)
    assert found.achieved == pytest.approx(50.0, rel=0.05)
    assert found.notes == ()


def test_intervals_over_runs_cover_where_queries_depend_on_each_other():
    # M/D/1 at 70 %: the truth is the p90 of many runs of the same length.
    runs = [run_of(0.7, 1.0, 400, str(seed)).latencies for seed in range(1600)]
    truth = float(np.quantile(runs, 0.9))
    groups = [runs[first : first + 8] for first in range(0, 1600, 8)]
    over_runs = [run_percentile(group, 0.9) for group in groups]
    as_if_independent = [percentile(np.concatenate(group), 0.9) for group in groups]
    assert np.mean([each.low <= truth <= each.high for each in over_runs]) >= 0.9
    assert np.mean([each.low <= truth <= each.high for each in as_if_independent]) < 0.7


def test_runs_that_differ_too_much_give_no_percentile():
    with pytest.raises(MeasurementError, match="runs so unlike that its interval has no upper end"):
        run_percentile([[1.0] * 400, [1.0] * 400, [1.0] * 200 + [2.0 + 0.001 * number for number in range(200)]], 0.9)


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ([run_of(110.0, 0.01, 500, "0")], "overloaded (1.03 seconds of work arrived for each second of a stream)"),
        ([Run((0.1, 0.2), (0.1,), (0.5,), (), 0, 0.0)], "overloaded (1 queries were not begun in twice the time"),
        # Quick on average, but not at the end.
        (
            [Run((1.0, 2.0, 3.0, 4.0), (1.0, 2.0, 4.5, 4.6), (1.1, 2.1, 4.6, 4.7), (), 0, 0.0)],
            "overloaded (the queue grew: the last query waited 15% of the time in which queries arrived)",
        ),
    ],
)
def test_an_overloaded_server_has_no_percentiles(runs: list[Run], message: str):
    found = respond("a", runs, 1, bound=LatencyBound(1e9))
    assert found.overloaded.startswith(message)
    assert [each.value for each in found.percentiles] == [None] * 5
    assert found.percentiles[0].reason.endswith("latencies grow with the time measured")
    assert found.bound
    assert found.bound.verdict == "missed"


@pytest.mark.parametrize(
    ("seconds", "verdict", "reason"),
    [
        (0.1, "met", "0 of 2500 latencies are over it"),
        (0.001, "missed", "the whole interval lies over the bound"),
    ],
)
def test_a_bound_is_met_or_missed(seconds: float, verdict: str, reason: str):
    found = judge(50.0, 0.01, LatencyBound(seconds)).bound
    assert found
    assert (found.verdict, found.reason) == (verdict, reason)


def test_a_bound_within_the_interval_is_not_shown_to_be_met():
    p99 = judge(50.0, 0.01).percentiles[3].value
    assert p99
    found = judge(50.0, 0.01, LatencyBound((p99.value + p99.high) / 2.0)).bound
    assert found
    assert (found.verdict, found.reason) == ("not shown", "the interval holds the bound")
    few = judge(50.0, 0.01, LatencyBound(0.1), queries=50).bound
    assert few
    assert (few.verdict, few.reason) == ("not shown", "got 250 values, expected at least 662")


def test_a_late_load_generator_a_single_run_and_an_unsteady_machine_are_told():
    found = respond("a", [run_of(50.0, 0.01, 100, "0", lateness=0.002)], 1, drift=0.06)
    late, one, unsteady = found.notes
    assert late.startswith("the load generator was late: p99 2 ms, over 10% of the median latency")
    assert one.startswith("one run: the intervals take latencies for independent")
    assert unsteady == "the machine was not steady: a fixed kernel drifted 6.0%"
    assert found.lateness == 0.002


@on_path
def test_offline_holds_every_block_of_every_subject():
    found = measure_offline([sleeper("a"), sleeper("b")], QUICK, streams=2, samples_per_query=8)
    assert [each.name for each in found.subjects] == ["a", "b"]
    for each in found.subjects:
        (process,) = each.blocks
        assert len(process) == 12
        assert all(queries >= 1 and seconds > 0.0 for queries, seconds in process)
        # Two threads that sleep a millisecond a query of eight samples
        assert each.throughput.value <= 2 * 8 / 0.001
        assert each.throughput.low <= each.throughput.value <= each.throughput.high
        assert each.peak_memory > 0
    assert [(each.name, each.against) for each in found.comparisons] == [("b", "a")]
    assert len(found.canary) == 13


@on_path
def test_server_subjects_meet_the_same_arrivals_and_each_run_others():
    found = measure_server([sleeper("a"), sleeper("b")], 200.0, FEW, LatencyBound(0.5, 0.5))
    a, b = found.subjects
    assert [run.arrivals for run in a.runs] == [run.arrivals for run in b.runs]
    # There and back under each schedule.
    assert a.runs[0].arrivals == a.runs[1].arrivals != a.runs[2].arrivals == a.runs[3].arrivals
    assert all(latency >= 0.001 for run in (*a.runs, *b.runs) for latency in run.latencies)
    assert len(found.canary) == 8
    assert found.environment["threads"] >= 1
    assert found.comparisons == ()


@on_path
def test_an_error_under_load_reaches_the_parent():
    failing = Subject("bad", "subjects:fail_in_threads")
    message = (
        r"bad: got a worker that died \(exit status 1\): RuntimeError: not here, expected a subject that can serve"
    )
    with pytest.raises(MeasurementError, match=message):
        measure_server([failing], 100.0, FEW)
    with pytest.raises(MeasurementError, match=message):
        measure_offline([failing], QUICK)
    assert psutil.Process().children() == []


@pytest.mark.parametrize("name", ["queries", "streams", "runs"])
def test_numbers_under_one_are_refused(name: str):
    with pytest.raises(InputError, match=f"{name}: got 0, expected at least 1"):
        Traffic(**{name: 0})


def test_other_values_out_of_range_are_refused():
    for rate in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match=r"rate: got .*, expected queries per second, above 0"):
            measure_server([sleeper("a")], rate, FEW)
    with pytest.raises(InputError, match="streams: got 0"):
        measure_offline([sleeper("a")], QUICK, streams=0)
    with pytest.raises(InputError, match="samples per query: got 0"):
        measure_offline([sleeper("a")], QUICK, samples_per_query=0)
    with pytest.raises(InputError, match="latency bound: got 0, expected seconds, above 0"):
        LatencyBound(0.0)
    with pytest.raises(InputError, match=r"latency bound: quantile: got 1, expected 0\.5 to below 1"):
        LatencyBound(1.0, 1.0)
    with pytest.raises(MeasurementError, match="got no subject"):
        measure_offline([], QUICK)
    with pytest.raises(InputError, match="two subjects called 'a'"):
        measure_server([sleeper("a"), sleeper("a")], 1.0, FEW)


class Simulated:
    """A worker whose subject takes exactly its ``seconds``; all write down what is asked of them."""

    asked: ClassVar[list[str]] = []

    def __init__(self, subject: Subject, timeout: float) -> None:
        del timeout
        self._name = subject.name
        self._seconds = float(subject.arguments["seconds"])
        self.asked.append(f"start {self._name}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def prepare(self) -> float:
        self.asked.append(f"prepare {self._name}")
        return 0.1

    def warm_up(self) -> float:
        self.asked.append(f"warm up {self._name}")
        return self._seconds

    def peak_memory(self) -> int:
        return 1 << 20

    def offline(self, queries: int, streams: int, limit: float) -> tuple[int, float]:
        served = min(queries, max(1, round(limit * streams / self._seconds)))
        return served, served * self._seconds / streams

    def server(self, arrivals: Sequence[int], streams: int, limit: float) -> Mapping[str, Any]:
        del limit
        service = round(1e9 * self._seconds)
        latencies = load.simulate(arrivals, [service] * len(arrivals), streams)
        ends = [round(arrival + latency) for arrival, latency in zip(arrivals, latencies, strict=True)]
        return {"begins": [end - service for end in ends], "ends": ends, "lateness": []}


@pytest.fixture
def _simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scenarios, "Worker", Simulated)
    monkeypatch.setattr(Simulated, "asked", [])
    monkeypatch.setattr(scenarios.canary, "sing", lambda: 0.01)


@pytest.mark.usefixtures("_simulated")
def test_twice_the_streams_have_twice_the_throughput_and_half_the_time_is_twice_as_fast():
    found = measure_offline([sleeper("a", 0.01), sleeper("b", 0.005)], QUICK, streams=2, samples_per_query=3)
    assert [each.throughput.value for each in found.subjects] == pytest.approx([600.0, 1200.0])
    assert found.comparisons[0].speed.value == pytest.approx(2.0)
    assert found.comparisons[0].verdict == "faster"


@pytest.mark.usefixtures("_simulated")
def test_offline_sessions_start_one_after_the_other():
    measure_offline([sleeper("a", 0.01), sleeper("b", 0.005)], QUICK)
    assert Simulated.asked == ["start a", "prepare a", "start b", "prepare b", "warm up a", "warm up b"]


@pytest.mark.usefixtures("_simulated")
def test_server_subjects_take_turns_there_and_back_and_are_compared():
    found = measure_server([sleeper("a", 0.01), sleeper("b", 0.005)], 50.0, Traffic(queries=70, runs=6))
    started = [line.removeprefix("start ") for line in Simulated.asked if line.startswith("start")]
    assert "".join(started) == "abbabaab" * 3
    assert [(each.name, each.quantile, each.verdict) for each in found.comparisons] == [
        ("b", 0.5, "faster"),
        ("b", 0.9, "faster"),
    ]
    assert measure_server([sleeper("a", 0.01)], 50.0, Traffic(queries=70, runs=6)).comparisons == ()


@pytest.mark.usefixtures("_simulated")
def test_the_highest_rate_within_a_bound_is_found_and_confirmed():
    shares: list[float] = []
    found = max_rate(sleeper("a", 0.01), LatencyBound(0.04), Traffic(), QUICK, lambda what, share: shares.append(share))
    assert found.offline.subjects[0].throughput.value == pytest.approx(100.0)
    assert found.rate
    # With service D, P(wait > 3 D) is 1 % at a load of 0.46 (by the exponential tail of M/D/1); the upper end must keep
    # the bound too, so the rate found lies below.
    assert 30.0 <= found.rate <= 46.0
    assert shares == sorted(shares)
    assert found.not_met > found.rate
    last = found.trials[-1]
    assert last.rate == found.rate
    assert last.traffic.seed == 1
    check = last.subjects[0].bound
    assert check
    assert check.verdict == "met"


@pytest.mark.usefixtures("_simulated")
def test_a_bound_below_the_service_time_is_kept_at_no_rate():
    found = max_rate(sleeper("a", 0.01), LatencyBound(0.009), Traffic(), QUICK)
    assert found.rate is None
    assert found.not_met <= 5.0
    assert len(found.trials) == 5

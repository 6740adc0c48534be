"""Verdicts under load, on simulated queues: what is compared, and when nothing is."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from onnx_lathe.benchmarks import load
from onnx_lathe.benchmarks.load_verdict import compare_loads, compared_quantiles
from onnx_lathe.benchmarks.queueing import Responses, Run, respond

STEADY = (0.01,) * 9
SECONDS = 0.01
"""Of a service; 50 queries a second are half of what one stream can do."""


def responses(
    name: str, service: float = SECONDS, *, seed: int = 0, rate: float = 50.0, runs: int = 8, queries: int = 400
) -> Responses:
    """A subject whose services scatter by 2 %, twice under each schedule."""
    rng = np.random.default_rng(seed)
    met: list[Run] = []
    for number in [number for number in range(runs) for _ in range(2)]:
        arrivals = [at / 1e9 for at in load.schedule(rate, queries, f"0/{number}")]
        services = (service * rng.lognormal(0.0, 0.02, queries)).tolist()
        latencies = load.simulate(arrivals, services, 1)
        ends = [arrival + latency for arrival, latency in zip(arrivals, latencies, strict=True)]
        begins = tuple(end - took for end, took in zip(ends, services, strict=True))
        met.append(Run(tuple(arrivals), begins, tuple(ends), (), 1 << 20, 0.1))
    return respond(name, met, 1)


@pytest.mark.parametrize(
    ("queries", "wanted"), [(10, ()), (20, (0.5,)), (70, (0.5, 0.9)), (400, (0.5, 0.95)), (700, (0.5, 0.99))]
)
def test_the_median_and_the_deepest_percentile_of_a_run_are_compared(queries: int, wanted: tuple[float, ...]) -> None:
    assert compared_quantiles(queries) == wanted


@pytest.mark.parametrize(("share", "verdict"), [(1.05, "slower"), (0.95, "faster")])
def test_a_difference_of_services_is_found_and_grows_in_the_queue(share: float, verdict: str) -> None:
    found = compare_loads([responses("a"), responses("b", share * SECONDS, seed=1)], STEADY)
    assert [(each.name, each.against, each.quantile, each.verdict) for each in found] == [
        ("b", "a", 0.5, verdict),
        ("b", "a", 0.95, verdict),
    ]
    assert "of 8 fresh processes" in found[0].reason
    for each in found:
        assert each.speed.low <= each.speed.value <= each.speed.high
        # Who waits behind a slower service waits longer too.
        assert abs(np.log(each.speed.value)) > abs(np.log(share))


def test_a_subject_is_neither_faster_nor_slower_than_its_like() -> None:
    for seed in range(20):
        pair = [responses("a", seed=2 * seed), responses("b", seed=2 * seed + 1)]
        assert {each.verdict for each in compare_loads(pair, STEADY)} <= {"no difference", "inconclusive"}


def test_an_unsteady_machine_tells_nothing() -> None:
    drifting = (0.01,) * 5 + (0.015,) * 4
    found = compare_loads([responses("a"), responses("b", 1.05 * SECONDS, seed=1)], drifting)
    assert {each.verdict for each in found} == {"inconclusive"}
    assert "the drift of a fixed kernel on this unsteady machine, 50.0%" in found[0].reason


def test_what_was_overloaded_is_not_compared() -> None:
    steady, slow = responses("a"), responses("b", 3 * SECONDS)
    assert slow.overloaded
    assert compare_loads([slow, steady], STEADY) == ()
    assert compare_loads([steady, slow], STEADY) == ()
    third = responses("c", 0.9 * SECONDS)
    assert {each.name for each in compare_loads([steady, slow, third], STEADY)} == {"c"}


def test_few_runs_few_queries_and_a_single_subject_are_not_compared() -> None:
    few = [responses(name, runs=5) for name in "ab"]
    assert compare_loads(few, STEADY) == ()
    assert compare_loads([responses(name, queries=10) for name in "ab"], STEADY) == ()
    assert compare_loads([responses("a")], STEADY) == ()


def test_runs_of_one_schedule_are_one_longer_run_of_it() -> None:
    found = responses("a", runs=1)
    assert found.notes == ("one run: the intervals take latencies for independent, and those of a queue are not",)
    twice = respond("a", (*found.runs, replace(found.runs[0], arrivals=(1e-9, *found.runs[0].arrivals[1:]))), 1)
    assert twice.notes == ()

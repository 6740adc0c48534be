"""Queries from several threads: the queue, the schedule, errors. What is asserted of times no machine can break."""

import gc
import threading
from collections import Counter

import numpy as np
import pytest
from subjects import fail_later, stall_once

from onnx_lathe.benchmarks import load


def test_a_queue_with_one_server_is_followed_exactly():
    # The second waits 1.5 for the first, the third 2.5 for both; the fourth finds the server free.
    assert load.simulate([0.0, 0.5, 1.5, 9.0], [2.0, 2.0, 1.0, 1.0], 1) == [2.0, 3.5, 3.5, 1.0]


def test_a_free_server_takes_the_next_query():
    assert load.simulate([0.0, 0.0, 0.0, 0.0], [3.0, 1.0, 1.0, 1.0], 2) == [3.0, 1.0, 2.0, 3.0]


@pytest.mark.parametrize("utilization", [0.3, 0.6, 0.8])
def test_the_mean_wait_is_that_of_pollaczek_and_khinchine(utilization: float):
    arrivals = [at / 1e9 for at in load.schedule(utilization, 200_000, "0")]
    waits = np.array(load.simulate(arrivals, [1.0] * len(arrivals), 1)) - 1.0
    assert np.mean(waits) == pytest.approx(utilization / (2.0 * (1.0 - utilization)), rel=0.05)


def test_a_schedule_is_fixed_by_its_seed_and_of_its_rate():
    arrivals = load.schedule(200.0, 20_000, "7/0")
    assert arrivals == load.schedule(200.0, 20_000, "7/0")
    assert arrivals != load.schedule(200.0, 20_000, "7/1")
    gaps = np.diff(arrivals) / 1e9
    assert np.mean(gaps) == pytest.approx(1 / 200, rel=0.03)
    assert np.std(gaps) == pytest.approx(1 / 200, rel=0.05)  # of an exponential distribution, as large as the mean
    assert min(gaps) >= 0.0


@pytest.mark.parametrize("streams", [1, 3])
def test_each_query_is_served_once_without_garbage_collection(streams: int):
    calls: list[bool] = []
    found = load.server(lambda: calls.append(gc.isenabled()), list(range(0, 50_000_000, 1_000_000)), streams, 60.0)
    assert len(found["begins"]) == len(found["ends"]) == 50
    assert calls == [False] * (50 + streams * load.LEAD_IN)
    assert gc.isenabled()


def test_no_query_begins_before_it_is_due_and_none_before_an_earlier_one():
    arrivals = load.schedule(2000.0, 100, "0")
    found = load.server(lambda: None, arrivals, 1, 60.0)
    assert all(begin >= arrival for begin, arrival in zip(found["begins"], arrivals, strict=True))
    assert found["begins"] == sorted(found["begins"])
    assert all(late >= 0 for late in found["lateness"])


def test_measured_latencies_are_those_of_the_queue():
    arrivals = load.schedule(1000.0, 50, "1")
    found = load.server(lambda: None, arrivals, 1, 60.0)
    services = [end - begin for begin, end in zip(found["begins"], found["ends"], strict=True)]
    measured = [end - arrival for end, arrival in zip(found["ends"], arrivals, strict=True)]
    ideal = load.simulate(arrivals, services, 1)
    assert all(seen >= least for seen, least in zip(measured, ideal, strict=True))


def test_a_stall_delays_every_query_that_arrives_meanwhile():
    arrivals = [1_000_000 * number for number in range(100)]
    found = load.server(stall_once(0.2, at=load.LEAD_IN + 10), arrivals, 1, 60.0)
    latencies = [(end - arrival) / 1e9 for end, arrival in zip(found["ends"], arrivals, strict=True)]
    # Due in the 89 ms after the stalled query began, they were all begun when it had ended.
    assert all(latency >= 0.2 - 0.001 * late for late, latency in enumerate(latencies[10:]))


def test_after_the_limit_no_query_is_begun():
    found = load.server(stall_once(0.1, at=load.LEAD_IN + 2), [0] * 10, 1, 0.05)
    assert 1 <= len(found["begins"]) <= 3
    assert load.offline(stall_once(0.1, at=load.LEAD_IN + 2), 10, 1, 0.05)["queries"] <= 3
    assert load.offline(lambda: None, 10, 2, 0.0)["queries"] == 2


def test_offline_every_query_is_served_by_so_many_threads():
    meeting = threading.Barrier(3)
    threads: Counter[int] = Counter()

    def call() -> None:
        meeting.wait(60.0)  # passes only where three streams call at a time
        threads[threading.get_ident()] += 1

    found = load.offline(call, 30, 3, 60.0)
    assert found["queries"] == 30
    assert found["nanoseconds"] > 0
    assert list(threads.values()) == [10 + load.LEAD_IN] * 3


@pytest.mark.parametrize("after", [0, 1, 20])
@pytest.mark.parametrize("streams", [1, 4])
def test_an_error_in_a_stream_is_raised(after: int, streams: int):
    with pytest.raises(RuntimeError, match="the kernel failed under load"):
        load.offline(fail_later(after), 1000, streams, 60.0)
    with pytest.raises(RuntimeError, match="the kernel failed under load"):
        load.server(fail_later(after), [1000 * number for number in range(1000)], streams, 60.0)
    assert gc.isenabled()
    assert threading.active_count() < 4

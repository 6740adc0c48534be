"""Queries from several threads, in the process of one subject: the offline and server scenarios of MLPerf Inference.

Reddi et al. 2020, "MLPerf Inference Benchmark" (ISCA, p. 446), section IV. Offline: all queries are there at the
start. Server: they arrive as a Poisson process, and the latency of each counts from the time it was scheduled for,
whatever kept the server. A *stream* is a thread that calls the subject. Only the standard library is imported here, so
that the memory of the process is the subject's.
"""

from __future__ import annotations

import gc
import heapq
import math
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

LEAD_IN = 3
"""Calls of each stream that go before a run and do not count."""
HEAD_START = 10_000_000
"""Nanoseconds from the release of the streams to the start of a schedule: the first query waits for no thread."""
SPIN = 200_000
"""Nanoseconds that a stream watches the clock before a query is due: a sleep ends some 60 microseconds late."""

Call = Callable[[], object]


def schedule(rate: float, queries: int, seed: str) -> list[int]:
    """Return when queries arrive: a Poisson process, the same for a seed on every machine.

    Args:
        rate: Queries per second, above 0.
        queries: How many.
        seed: Fixes the gaps, which are exponential and independent.

    Returns:
        Nanoseconds from the start, ascending.
    """
    rng = random.Random(seed)
    return [math.ceil(1e9 * at) for at in accumulate(rng.expovariate(rate) for _ in range(queries))]


def simulate(arrivals: Sequence[float], services: Sequence[float], streams: int) -> list[float]:
    """Return the latencies of a first-come, first-served queue with several servers.

    Lindley's recursion, for several servers by Kiefer & Wolfowitz 1955 (Trans. AMS 78, p. 1): a query begins when it
    has arrived and the first server is free. `server` follows it with measured services.

    Args:
        arrivals: When each query arrives, ascending.
        services: How long each takes once begun, in the same unit.
        streams: Servers, at least 1.

    Returns:
        End less arrival, by query.
    """
    free = [0.0] * streams
    latencies: list[float] = []
    for arrival, service in zip(arrivals, services, strict=True):
        end = max(arrival, heapq.heappop(free)) + service
        heapq.heappush(free, end)
        latencies.append(end - arrival)
    return latencies


def offline(call: Call, queries: int, streams: int, limit: float) -> dict[str, Any]:
    """Serve queries that are all there at the start, and time the whole.

    Args:
        call: The subject: one query.
        queries: How many.
        streams: Threads that take the next query each as soon as they are free.
        limit: Seconds after which none is begun, after the first of each stream.

    Returns:
        ``queries`` served and the ``nanoseconds`` from the start to the end of the last.
    """
    waiting, ends = deque(range(queries)), [0] * queries
    start = _Start(streams)

    def stream() -> None:
        _lead_in(call)
        until = start.wait() + round(1e9 * limit)
        while (query := _next(waiting)) is not None:
            call()
            ends[query] = time.perf_counter_ns()
            if ends[query] >= until:
                break

    _run_streams(stream, streams, start, waiting)
    return {"queries": queries - len(waiting), "nanoseconds": max(ends) - start.at}


def server(call: Call, arrivals: Sequence[int], streams: int, limit: float) -> dict[str, Any]:
    """Serve queries as they arrive, first come, first served.

    No thread hands out the queries, for it would want a core of its own: a free stream takes the next query and waits
    until it is due. That is the same queue. Where the stream was free in time, its begin less the schedule is the
    lateness of this load generator; it is part of the latency, which so is never too short.

    Args:
        call: The subject: one query.
        arrivals: Nanoseconds from the start, ascending (`schedule`).
        streams: Threads that serve.
        limit: Seconds from the start after which no query is begun.

    Returns:
        ``begins`` and ``ends`` of the queries served (the first ones), in nanoseconds from the start, and the
        ``lateness`` in nanoseconds of those that a stream waited for.
    """
    waiting = deque(range(len(arrivals)))
    begins, ends, lateness = [0] * len(arrivals), [0] * len(arrivals), list[int]()
    start = _Start(streams)

    def stream() -> None:
        _lead_in(call)
        origin = start.wait() + HEAD_START
        until = origin + round(1e9 * limit)
        while time.perf_counter_ns() < until and (query := _next(waiting)) is not None:
            due = origin + arrivals[query]
            waited = _wait_until(due)
            begin = time.perf_counter_ns()
            call()
            ends[query] = time.perf_counter_ns() - origin
            begins[query] = begin - origin
            if waited:
                lateness.append(begin - due)

    _run_streams(stream, streams, start, waiting)
    served = len(arrivals) - len(waiting)
    return {"begins": begins[:served], "ends": ends[:served], "lateness": lateness}


class _Start:
    """Releases all streams at once, and knows when."""

    def __init__(self, streams: int) -> None:
        self.at = 0
        self._barrier = threading.Barrier(streams, self._note)

    def _note(self) -> None:
        self.at = time.perf_counter_ns()

    def wait(self) -> int:
        """Wait for the other streams, and return when they started in ``perf_counter_ns``."""
        self._barrier.wait()
        return self.at

    def call_off(self) -> None:
        """Release the streams that wait, with an error."""
        self._barrier.abort()


def _run_streams(stream: Callable[[], None], streams: int, start: _Start, waiting: deque[int]) -> None:
    """Run ``stream`` in so many threads, garbage collection off, and raise the first error in one."""
    with _no_collections(), ThreadPoolExecutor(streams) as pool:
        futures = [pool.submit(stream) for _ in range(streams)]
        done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        failed = next((future for future in done if future.exception()), None)
        if failed:
            waiting.clear()
            start.call_off()
            failed.result()


@contextmanager
def _no_collections() -> Generator[None, None, None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _lead_in(call: Call) -> None:
    for _ in range(LEAD_IN):
        call()


def _next(waiting: deque[int]) -> int | None:
    try:
        return waiting.popleft()
    except IndexError:
        return None


def _wait_until(due: int) -> bool:
    """Wait for a time in ``perf_counter_ns``, and return whether it was still to come."""
    if time.perf_counter_ns() >= due:
        return False
    while (left := due - time.perf_counter_ns()) > 0:
        # A sleep of 0 lets the other streams have the interpreter's lock while this one watches the clock.
        time.sleep(max(0, left - SPIN) / 1e9)
    return True

"""Offline throughput and latency under load: what MLPerf Inference calls the offline and server scenarios.

The single stream is `onnx_lathe.benchmarks.measure`. As there, subjects take turns in fresh worker processes; what a
worker does, and what a stream is, says `onnx_lathe.benchmarks.load`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnx_lathe.benchmarks import canary, environment
from onnx_lathe.benchmarks.load import schedule
from onnx_lathe.benchmarks.load_verdict import LoadComparison, compare_loads
from onnx_lathe.benchmarks.measure import SCREEN, Effort, OnProgress, check_subjects
from onnx_lathe.benchmarks.process import Worker
from onnx_lathe.benchmarks.queueing import LatencyBound, Responses, Run, respond
from onnx_lathe.benchmarks.result import Comparison, Interval, Timing
from onnx_lathe.benchmarks.stats import mean_interval, percentile
from onnx_lathe.benchmarks.subject import Subject
from onnx_lathe.benchmarks.verdict import compare
from onnx_lathe.runtime.errors import InputError

MOST_QUERIES = 20_000
"""In an offline block, so that a call of microseconds does not fill the memory."""
PATIENCE = 5
"""A disturbed offline block is cut off at so many times its length."""
CUT_OFF = 2
"""A server run begins no query after so many times the length of its schedule: the server is overloaded."""
RESOLUTION = 0.05
"""`max_rate` stops where the bracket is this share of the offline throughput."""


@dataclass(frozen=True)
class Traffic:
    """What a server run consists of, but for its rate.

    Attributes:
        queries: Queries in a run, the same number in each.
        streams: Threads that serve.
        runs: Independent runs, each with arrivals of its own; several subjects meet them twice each, there and back.
        seed: Fixes the arrivals.
        timeout: Seconds that one step of a worker may take, beside the length of a run.

    Raises:
        InputError: A value is out of range.
    """

    queries: int = 400
    streams: int = 1
    runs: int = 8
    seed: int = 0
    timeout: float = 300.0

    def __post_init__(self) -> None:
        for name, got in (("queries", self.queries), ("streams", self.streams), ("runs", self.runs)):
            _check_count(name, got)

    def arrivals(self, rate: float, run: int) -> list[int]:
        """Return when the queries of a run arrive, in nanoseconds from its start."""
        return schedule(rate, self.queries, f"{self.seed}/{run}")


@dataclass(frozen=True)
class Throughput:
    """What was seen of one subject offline.

    Attributes:
        name: The subject.
        blocks: Queries served and the seconds they took, ``blocks[process][block]``.
        throughput: Samples per second: median over blocks; the interval is the wider of that over blocks (order
            statistics) and that over processes (Student's, of their medians).
        peak_memory: Peak resident bytes of the worker process (the largest of its processes).
        start_seconds: Time to prepare the subject in a fresh process, imports excluded (median).
    """

    name: str
    blocks: tuple[tuple[tuple[int, float], ...], ...]
    throughput: Interval
    peak_memory: int
    start_seconds: float

    def timing(self) -> Timing:
        """Return the seconds per query of each block as if each were one latency, to be compared."""
        blocks = tuple(tuple((seconds / queries,) for queries, seconds in process) for process in self.blocks)
        values = [value for process in blocks for (value,) in process]
        return Timing(self.name, blocks, percentile(values, 0.5), None, self.peak_memory, self.start_seconds)


@dataclass(frozen=True)
class OfflineResult:
    """Offline throughput of several subjects, from one interleaved run.

    Attributes:
        streams: Threads that served.
        samples_per_query: Samples in a query.
        subjects: By order of the subjects.
        comparisons: Each subject against the first; ``speed`` is the ratio of throughputs.
        canary: Seconds of a fixed kernel before each half round.
        environment: As in a `Measurement`.
    """

    streams: int
    samples_per_query: int
    subjects: tuple[Throughput, ...]
    comparisons: tuple[Comparison, ...]
    canary: tuple[float, ...]
    environment: Mapping[str, Any]


@dataclass(frozen=True)
class ServerResult:
    """Latencies of several subjects under the same arrivals.

    Attributes:
        rate: Queries per second that arrived, on average.
        traffic: Queries, streams, runs and seed.
        subjects: By order of the subjects.
        comparisons: Each subject against the first; none of those that were overloaded, and none of few runs.
        canary: Seconds of a fixed kernel before each run.
        environment: As in a `Measurement`.
    """

    rate: float
    traffic: Traffic
    subjects: tuple[Responses, ...]
    comparisons: tuple[LoadComparison, ...]
    canary: tuple[float, ...]
    environment: Mapping[str, Any]


@dataclass(frozen=True)
class MaxRate:
    """The highest rate found at which a subject keeps a latency bound.

    Attributes:
        rate: Queries per second, met a second time by other arrivals; None where no rate was.
        not_met: The lowest rate tried above it at which the bound was not shown to be met.
        offline: The throughput from which the search went down.
        trials: Every rate that was tried, in order.
    """

    rate: float | None
    not_met: float
    offline: OfflineResult
    trials: tuple[ServerResult, ...]


def _ignore(what: str, share: float) -> None:
    del what, share


def measure_offline(
    subjects: Sequence[Subject],
    effort: Effort,
    *,
    streams: int = 1,
    samples_per_query: int = 1,
    on_progress: OnProgress = _ignore,
) -> OfflineResult:
    """Measure the throughput of ``subjects`` side by side and compare each with the first.

    A block is as many queries as were served in a block's seconds at first, the same in all blocks of a subject. It
    ends with the last query, so a stream that is idle then counts, as in MLPerf.

    Args:
        subjects: One or more, of different names; the first is the reference.
        effort: `SCREEN`, `FINAL` or another; its time budget is not used.
        streams: Threads that serve.
        samples_per_query: Samples in the batch of each subject.
        on_progress: Told what is being done, and the share done on 0..1.

    Raises:
        MeasurementError: There is no subject, or one could not be started or run: with what its process said last.
        InputError: Two subjects have the same name, or a number is under 1.
    """
    check_subjects(subjects)
    _check_count("streams", streams)
    _check_count("samples per query", samples_per_query)
    described, songs = environment.describe(), list[float]()
    seen = {subject.name: _Offline() for subject in subjects}
    for number in range(effort.processes):
        on_progress(f"process {number + 1} of {effort.processes}", number / effort.processes)
        turn = number % len(subjects)
        _offline_process([*subjects[turn:], *subjects[:turn]], effort, streams, seen, songs)
    on_progress("measured", 1.0)
    rows = tuple(seen[subject.name].row(subject.name, samples_per_query) for subject in subjects)
    comparisons = compare([row.timing() for row in rows], songs)
    return OfflineResult(streams, samples_per_query, rows, comparisons, tuple(songs), described)


def measure_server(
    subjects: Sequence[Subject],
    rate: float,
    traffic: Traffic,
    bound: LatencyBound | None = None,
    on_progress: OnProgress = _ignore,
) -> ServerResult:
    """Measure the latencies of ``subjects`` under Poisson arrivals, each counted from its scheduled time.

    Args:
        subjects: One or more, of different names; all meet the same arrivals, one after the other and back again.
        rate: Queries per second, above 0.
        traffic: Queries, streams, runs and seed.
        bound: What a percentile is held against.
        on_progress: Told what is being done, and the share done on 0..1.

    Raises:
        MeasurementError: There is no subject, or one could not be started or run: with what its process said last.
        InputError: Two subjects have the same name, or ``rate`` is not a number above 0.
    """
    check_subjects(subjects)
    if not 0.0 < rate < float("inf"):
        raise InputError("rate", got=f"{rate:g}", expected="queries per second, above 0", mend="Give a rate.")
    described, songs = environment.describe(), list[float]()
    runs: dict[str, list[Run]] = {subject.name: [] for subject in subjects}
    for number in range(traffic.runs):
        turn = number % len(subjects)
        forth = [*subjects[turn:], *subjects[:turn]]
        for subject in (*forth, *(forth[::-1] if len(forth) > 1 else ())):
            on_progress(f"run {number + 1} of {traffic.runs}: {subject.name}", number / traffic.runs)
            runs[subject.name].append(_server_run(subject, traffic.arrivals(rate, number), traffic, songs))
    on_progress("measured", 1.0)
    drifted = canary.drift(songs) if len(songs) >= 3 else 0.0
    rows = tuple(respond(name, each, traffic.streams, drifted, bound) for name, each in runs.items())
    return ServerResult(rate, traffic, rows, compare_loads(rows, songs), tuple(songs), described)


def max_rate(
    subject: Subject, bound: LatencyBound, traffic: Traffic, effort: Effort = SCREEN, on_progress: OnProgress = _ignore
) -> MaxRate:
    """Search the highest rate at which ``subject`` is shown to keep ``bound``.

    Bisection below the offline throughput, at which a queue has no limit, down to 5 % of it. A rate that once kept
    the bound may have been lucky: the answer is the highest that also keeps it under other arrivals, in fresh
    processes.

    Args:
        subject: What to measure.
        bound: The latency that a percentile's interval must not exceed.
        traffic: Of each trial.
        effort: For the offline throughput.
        on_progress: Told what is being done, and the share done on 0..1 (of the most trials).

    Raises:
        MeasurementError: The subject could not be started or run.
        InputError: A number is out of range.
    """
    offline = measure_offline([subject], effort, streams=traffic.streams)
    capacity = offline.subjects[0].throughput.value
    low, high, trials, met = 0.0, capacity, list[ServerResult](), list[float]()

    def keeps(rate: float, seed: int) -> bool:
        again = Traffic(traffic.queries, traffic.streams, traffic.runs, seed, traffic.timeout)
        on_progress(f"{rate:.4g} queries/s", min(0.9, 0.1 * (1 + len(trials))))
        trials.append(measure_server([subject], rate, again, bound))
        check = trials[-1].subjects[0].bound
        return check is not None and check.verdict == "met"

    while high - low > RESOLUTION * capacity:
        rate = (low + high) / 2.0
        if keeps(rate, traffic.seed):
            low = rate
            met.append(rate)
        else:
            high = rate
    while met and not keeps(met[-1], traffic.seed + 1):
        high = met.pop()
    on_progress("measured", 1.0)
    return MaxRate(met[-1] if met else None, high, offline, tuple(trials))


class _Offline:
    """What is seen of one subject offline, while it is being seen."""

    def __init__(self) -> None:
        self.queries = 0
        self.blocks: list[tuple[tuple[int, float], ...]] = []
        self.peak_memory: list[int] = []
        self.start_seconds: list[float] = []

    def row(self, name: str, samples: int) -> Throughput:
        rates = [[samples * queries / seconds for queries, seconds in process] for process in self.blocks]
        median = percentile([rate for process in rates for rate in process], 0.5)
        low, high = median.low, median.high
        if len(rates) > 1:
            over_processes = mean_interval([float(np.median(process)) for process in rates])
            low, high = max(0.0, min(low, over_processes.low)), max(high, over_processes.high)
        start = float(np.median(self.start_seconds))
        return Throughput(name, tuple(self.blocks), Interval(median.value, low, high), max(self.peak_memory), start)


def _offline_process(
    subjects: Sequence[Subject], effort: Effort, streams: int, seen: Mapping[str, _Offline], songs: list[float]
) -> None:
    """Measure all subjects in one fresh worker each, and add what was seen to ``seen`` and ``songs``."""
    limit = PATIENCE * effort.block_seconds
    with ExitStack() as stack:
        workers: dict[str, Worker] = {}
        for subject in subjects:
            # One after the other, so that none starts in the shadow of another.
            worker = workers[subject.name] = stack.enter_context(Worker(subject, effort.timeout))
            seen[subject.name].start_seconds.append(worker.prepare())
        for name, worker in workers.items():
            worker.warm_up()
            fitting, _ = worker.offline(MOST_QUERIES, streams, effort.block_seconds)
            seen[name].queries = seen[name].queries or max(1, fitting)
        names = list(workers)
        blocks: dict[str, list[tuple[int, float]]] = {name: [] for name in names}
        for number in range(effort.rounds):
            turn = number % len(names)
            forth = [*names[turn:], *names[:turn]]
            for order in (forth, forth[::-1]):
                songs.append(canary.sing())
                for name in order:
                    blocks[name].append(workers[name].offline(seen[name].queries, streams, limit))
        songs.append(canary.sing())
        for name, worker in workers.items():
            seen[name].blocks.append(tuple(blocks[name]))
            seen[name].peak_memory.append(worker.peak_memory())


def _server_run(subject: Subject, arrivals: Sequence[int], traffic: Traffic, songs: list[float]) -> Run:
    """Serve ``arrivals`` once in a fresh process."""
    limit = CUT_OFF * arrivals[-1] / 1e9
    with Worker(subject, traffic.timeout + limit) as worker:
        start_seconds = worker.prepare()
        worker.warm_up()
        songs.append(canary.sing())
        found = worker.server(arrivals, traffic.streams, limit)

        def seconds(values: Sequence[int]) -> tuple[float, ...]:
            return tuple(value / 1e9 for value in values)

        times = (seconds(values) for values in (arrivals, found["begins"], found["ends"], found["lateness"]))
        return Run(*times, peak_memory=worker.peak_memory(), start_seconds=start_seconds)


def _check_count(name: str, got: int) -> None:
    if got < 1:
        raise InputError(name, got=str(got), expected="at least 1", mend="Give a larger number.")

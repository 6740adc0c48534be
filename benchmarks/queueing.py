"""From the times of queries under load to percentiles: what they say, and when they say nothing.

Queries that queue behind each other are not independent, and intervals by order statistics take them to be. So
several independent runs are made, and each percentile has the wider of two intervals (`run_percentile`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.stats import binom

from onnx_lathe.benchmarks.canary import MAX_DRIFT
from onnx_lathe.benchmarks.result import Interval
from onnx_lathe.benchmarks.stats import mean_interval, percentile
from onnx_lathe.runtime.errors import InputError, MeasurementError

QUANTILES = (0.5, 0.9, 0.95, 0.99, 0.999)
LATE = 0.1
"""Lateness of the load generator beyond this share of the median latency is told."""
GROWN = 0.1
"""The queue grew where the last query waits longer than this share of the time in which queries arrived."""
MLPERF_CONFIDENCE = 0.99


@dataclass(frozen=True)
class LatencyBound:
    """A latency in seconds that a percentile must keep.

    Raises:
        InputError: The seconds are not above 0, or the quantile is not on 0.5..1.
    """

    seconds: float
    quantile: float = 0.99

    def __post_init__(self) -> None:
        if not self.seconds > 0.0:
            raise InputError(
                "latency bound", got=f"{self.seconds:g}", expected="seconds, above 0", mend="Give a longer time."
            )
        if not 0.5 <= self.quantile < 1.0:
            raise InputError(
                "latency bound: quantile",
                got=f"{self.quantile:g}",
                expected="0.5 to below 1",
                mend="Give 0.99 for p99.",
            )


@dataclass(frozen=True)
class Run:
    """One run of one subject in a fresh process, in seconds from its start.

    Attributes:
        arrivals: When each query was scheduled.
        begins: When those served were begun: the first ones, all where the server kept up.
        ends: When they ended.
        lateness: Begin less schedule of the queries that a free stream waited for: the load generator's own fault.
        peak_memory: Peak resident bytes of the process.
        start_seconds: Time to prepare the subject, imports excluded.
    """

    arrivals: tuple[float, ...]
    begins: tuple[float, ...]
    ends: tuple[float, ...]
    lateness: tuple[float, ...]
    peak_memory: int
    start_seconds: float

    @property
    def latencies(self) -> tuple[float, ...]:
        """End less schedule of the queries served."""
        return tuple(end - arrival for end, arrival in zip(self.ends, self.arrivals, strict=False))

    @property
    def backlog(self) -> int:
        """How many queries had arrived and were not begun when the last one arrived."""
        return len(self.arrivals) - sum(begin <= self.arrivals[-1] for begin in self.begins)


@dataclass(frozen=True)
class Percentile:
    """A percentile of latencies in seconds, or why there is none."""

    quantile: float
    value: Interval | None
    reason: str


@dataclass(frozen=True)
class BoundCheck:
    """Whether a percentile keeps a bound.

    Attributes:
        bound: The bound.
        over: Latencies over it.
        verdict: "met" where the percentile's interval ends within the bound and MLPerf's rule holds; "missed" where
            it begins beyond, or the server was overloaded; else "not shown".
        reason: Why that verdict.
    """

    bound: LatencyBound
    over: int
    verdict: Literal["met", "missed", "not shown"]
    reason: str


@dataclass(frozen=True)
class Responses:
    """What was seen of one subject under load.

    Attributes:
        name: The subject.
        runs: Raw times of each run.
        percentiles: Of the latencies, p50 to p99.9; none where there are too few or the server was overloaded.
        achieved: Queries ended per second, from the start to the end of the last.
        load: Seconds of work that arrived for each second of a stream: from 1 on, a queue grows without limit.
        backlog: Queries that waited when the last one arrived, the most of all runs.
        overloaded: Why the server did not keep up; empty where it did.
        lateness: p99 of the load generator's own lateness in seconds (None: no query found a free stream).
        bound: What a percentile was held against.
        notes: What to know when reading the figures.
        peak_memory: Peak resident bytes of the worker process (the largest of its processes).
        start_seconds: Time to prepare the subject in a fresh process, imports excluded (median).
    """

    name: str
    runs: tuple[Run, ...]
    percentiles: tuple[Percentile, ...]
    achieved: float
    load: float
    backlog: int
    overloaded: str
    lateness: float | None
    bound: BoundCheck | None
    notes: tuple[str, ...]
    peak_memory: int
    start_seconds: float


def respond(
    name: str, runs: Sequence[Run], streams: int, drift: float = 0.0, bound: LatencyBound | None = None
) -> Responses:
    """Judge the runs of one subject.

    Args:
        name: The subject.
        runs: One or more, of equally many queries. Those that met the same arrivals count as one that is longer.
        streams: Threads that served.
        drift: What the canary drifted, as a share.
        bound: What a percentile is held against.
    """
    load = _load(runs, streams)
    overloaded = _overloaded(runs, load)
    served = _by_arrivals(runs)
    late = [value for run in runs for value in run.lateness]
    lateness = float(np.quantile(late, 0.99)) if late else None
    return Responses(
        name,
        runs=tuple(runs),
        percentiles=tuple(_percentile(served, quantile, overloaded) for quantile in QUANTILES),
        achieved=sum(map(len, served)) / sum(max(run.ends, default=0.0) or run.arrivals[-1] for run in runs),
        load=load,
        backlog=max(run.backlog for run in runs),
        overloaded=overloaded,
        lateness=lateness,
        bound=None if bound is None else _check(served, bound, overloaded),
        notes=_notes(served, lateness, drift),
        peak_memory=max(run.peak_memory for run in runs),
        start_seconds=float(np.median([run.start_seconds for run in runs])),
    )


def run_percentile(runs: Sequence[Sequence[float]], quantile: float) -> Interval:
    """Return a quantile (at least 0.5) over independent runs of dependent values, with its 95 % interval.

    The wider of two: order statistics, as if all values were independent; and Woodruff 1952 (JASA 47, p. 635) with
    runs as clusters: the shares of each run's values up to the quantile have a mean with Student's interval, whose
    ends are quantiles of all values again. Unlike the spread of the runs' own percentiles, the second is not
    biased where a run alone is too short for the percentile. One run has the first alone.

    Args:
        runs: ``float [runs][values]``, equally many in each.
        quantile: On 0.5..1.

    Raises:
        MeasurementError: There are too few values, or the runs differ so much that the interval has no upper end.
    """
    values = np.sort(np.concatenate([np.asarray(run, dtype=np.float64) for run in runs]))
    found = percentile(values, quantile)
    if len(runs) < 2:
        return found
    shares = mean_interval([float(np.mean(np.asarray(run) <= found.value)) for run in runs])
    reach = shares.high - shares.value
    if quantile + reach > 1.0:
        raise MeasurementError(
            f"p{100 * quantile:g}",
            got="runs so unlike that its interval has no upper end",
            expected=f"runs that agree on the share of latencies below it within {1.0 - quantile:.2g}",
            mend="Measure more queries or runs.",
        )
    low = float(np.quantile(values, max(0.0, quantile - reach), method="lower"))
    high = float(np.quantile(values, quantile + reach, method="higher"))
    return Interval(found.value, min(found.low, low), max(found.high, high))


def _by_arrivals(runs: Sequence[Run]) -> list[tuple[float, ...]]:
    """Return the latencies of each schedule: runs of the same one are no independent ones."""
    found: dict[tuple[float, ...], tuple[float, ...]] = {}
    for run in runs:
        found[run.arrivals] = (*found.get(run.arrivals, ()), *run.latencies)
    return list(found.values())


def _percentile(served: Sequence[Sequence[float]], quantile: float, overloaded: str) -> Percentile:
    if overloaded:
        return Percentile(quantile, None, f"{overloaded}: latencies grow with the time measured")
    try:
        return Percentile(quantile, run_percentile(served, quantile), "")
    except MeasurementError as error:
        return Percentile(quantile, None, f"got {error.got}, expected {error.expected}")


def _load(runs: Sequence[Run], streams: int) -> float:
    """Return the work that arrived, by the mean of the services seen, over what the streams can do meanwhile."""
    services = [end - begin for run in runs for begin, end in zip(run.begins, run.ends, strict=True)]
    arrived = sum(len(run.arrivals) for run in runs)
    return arrived * float(np.mean(services or [0.0])) / (streams * sum(run.arrivals[-1] for run in runs))


def _overloaded(runs: Sequence[Run], load: float) -> str:
    """Return why the server did not keep up, or nothing.

    A load of 1 has no steady state (Kleinrock 1975, Queueing Systems I, section 1.3). That the last query waits long
    finds the server that slowed down on the way, and work around a call that its service does not hold.
    """
    unserved = sum(len(run.arrivals) - len(run.ends) for run in runs)
    if unserved:
        return f"overloaded ({unserved} queries were not begun in twice the time in which they arrived)"
    if load >= 1.0:
        return f"overloaded ({load:.3g} seconds of work arrived for each second of a stream)"
    waits = sum(run.begins[-1] - run.arrivals[-1] for run in runs) / sum(run.arrivals[-1] for run in runs)
    # Short runs: the last of a few queries may well wait for the one before.
    if waits > GROWN and max(run.backlog for run in runs) > 1:
        return f"overloaded (the queue grew: the last query waited {waits:.0%} of the time in which queries arrived)"
    return ""


def _check(served: Sequence[Sequence[float]], bound: LatencyBound, overloaded: str) -> BoundCheck:
    """Hold a percentile against its bound.

    MLPerf's rule for the server (LoadGen, ``early_stopping.cc``): so few of n latencies are over the bound that, were
    a share of 1 - quantile over it, this would happen once in a hundred. It takes queries for independent; so
    the interval over runs must end within the bound too.
    """
    values = np.concatenate([np.asarray(run, dtype=np.float64) for run in served])
    over = int(np.sum(values > bound.seconds))
    found = _percentile(served, bound.quantile, overloaded)
    if overloaded:
        return BoundCheck(bound, over, "missed", overloaded)
    if not found.value:
        return BoundCheck(bound, over, "not shown", found.reason)
    if found.value.low > bound.seconds:
        return BoundCheck(bound, over, "missed", "the whole interval lies over the bound")
    if found.value.high > bound.seconds:
        return BoundCheck(bound, over, "not shown", "the interval holds the bound")
    chance = float(binom.cdf(over, len(values), 1.0 - bound.quantile))
    if chance > 1.0 - MLPERF_CONFIDENCE:
        return BoundCheck(
            bound, over, "not shown", f"{over} of {len(values)} latencies over it are too many for MLPerf"
        )
    return BoundCheck(bound, over, "met", f"{over} of {len(values)} latencies are over it")


def _notes(served: Sequence[Sequence[float]], lateness: float | None, drift: float) -> tuple[str, ...]:
    notes: list[str] = []
    median = float(np.median(np.concatenate([np.asarray(run) for run in served]))) if any(served) else 0.0
    if lateness is not None and lateness > LATE * median:
        notes.append(
            f"the load generator was late: p99 {1e3 * lateness:.3g} ms, over {LATE:.0%} of the median latency, which "
            "holds that lateness"
        )
    if len(served) == 1:
        notes.append("one run: the intervals take latencies for independent, and those of a queue are not")
    if drift > MAX_DRIFT:
        notes.append(f"the machine was not steady: a fixed kernel drifted {drift:.1%}")
    return tuple(notes)

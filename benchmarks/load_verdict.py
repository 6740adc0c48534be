"""Is one subject faster than another under load? The rules of `onnx_lathe.benchmarks.verdict`, on runs of a server.

Latencies in a queue depend on each other, so what is compared is one number a run: a percentile of its latencies. Each
run of a subject is a fresh process; all subjects meet the same arrivals there and back (A B B A), so a pair differs in
nothing but the subject, and the reference is held against itself under arrivals that are the same as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from onnx_lathe.benchmarks.queueing import QUANTILES, Responses
from onnx_lathe.benchmarks.result import Comparison, Timing
from onnx_lathe.benchmarks.stats import least_samples, percentile
from onnx_lathe.benchmarks.verdict import compare_all

LEAST_RUNS = 6
"""Of the reference under pairs of equal arrivals: signed ranks give fewer no interval."""

Contest = tuple[Sequence[Timing], Sequence[float]]
"""What `compare_all` judges: the timings of one interleaved run, and its canary."""


@dataclass(frozen=True)
class LoadComparison(Comparison):
    """How a subject is against another under the same arrivals.

    Attributes:
        quantile: Which percentile of a run's latencies was compared, on 0..1.
    """

    quantile: float


def compared_quantiles(queries: int) -> tuple[float, ...]:
    """Return what can be compared in runs of so many queries: the median, and the deepest percentile they give."""
    able = [quantile for quantile in QUANTILES if least_samples(quantile) <= queries]
    return tuple(dict.fromkeys((*able[:1], *able[-1:])))


def contests(subjects: Sequence[Responses], canary: Sequence[float]) -> list[tuple[float, Contest]]:
    """Return what can be compared, by quantile: nothing where the first subject was overloaded, or runs are too few.

    Other subjects that were overloaded are left out: their latencies grow with the time measured.
    """
    able = [each for each in subjects if not each.overloaded]
    first = subjects[0]
    if first.overloaded or len(able) < 2 or len(_by_arrivals(first)) < LEAST_RUNS:
        return []
    quantiles = compared_quantiles(len(first.runs[0].arrivals))
    return [(quantile, ([_timing(each, quantile) for each in able], canary)) for quantile in quantiles]


def compare_loads(subjects: Sequence[Responses], canary: Sequence[float]) -> tuple[LoadComparison, ...]:
    """Compare every subject with the first at each quantile, adjusted for how many they are (`compare_all`)."""
    found = contests(subjects, canary)
    return labelled([quantile for quantile, _ in found], compare_all([contest for _, contest in found]))


def labelled(quantiles: Sequence[float], judged: Sequence[Sequence[Comparison]]) -> tuple[LoadComparison, ...]:
    """Return the comparisons of each quantile with that quantile."""
    return tuple(
        LoadComparison(**vars(comparison), quantile=quantile)
        for quantile, comparisons in zip(quantiles, judged, strict=True)
        for comparison in comparisons
    )


def _by_arrivals(subject: Responses) -> list[list[tuple[float, ...]]]:
    """Return the latencies of the runs that met the same arrivals together."""
    groups: dict[tuple[float, ...], list[tuple[float, ...]]] = {}
    for run in subject.runs:
        groups.setdefault(run.arrivals, []).append(run.latencies)
    return list(groups.values())


def _timing(subject: Responses, quantile: float) -> Timing:
    """Return a percentile of each run as if it were one latency, to be compared."""
    blocks = tuple(
        tuple((float(np.quantile(latencies, quantile)),) for latencies in group) for group in _by_arrivals(subject)
    )
    median = percentile([value for group in blocks for (value,) in group], 0.5)
    return Timing(subject.name, blocks, median, None, subject.peak_memory, subject.start_seconds)

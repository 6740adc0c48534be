"""How other tools time two versions of a program and call one slower, on the same subjects as ours.

Both tools time the one version wholly before the other. They are followed as their sources have it (pytest-benchmark
5.3.1, asv 0.6.6 with asv_runner 0.3.2), but for what favours them: our worker warms up before the rounds of
pytest-benchmark, which does not, and turns garbage collection off.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import mannwhitneyu

from onnx_lathe.benchmarks.process import Worker
from onnx_lathe.benchmarks.subject import Subject

_TIMEOUT = 300.0
_ROUNDS, _ROUND_SECONDS = 5, 1.0
"""pytest-benchmark: at least so many rounds, and as many as fit."""
_PROCESSES, _SAMPLES, _SAMPLE_SECONDS = 2, 5, 0.01
"""asv: fresh processes (its rounds), samples in each, and how long the calls last that make one."""
_SIGNIFICANT = 0.002
"""asv's, of its Mann-Whitney test."""


@dataclass(frozen=True)
class Separate:
    """What one version looks like to the rivals.

    Attributes:
        benchmark: pytest-benchmark's statistics in seconds: ``mean``, ``min``, ``median``.
        asv: The samples of asv in seconds.
    """

    benchmark: Mapping[str, float]
    asv: tuple[float, ...]


def separate(subject: Subject) -> Separate:
    """Time a subject by itself, as each of the rivals does."""
    with Worker(subject, _TIMEOUT) as worker:
        worker.prepare()
        calls = max(_ROUNDS, math.ceil(_ROUND_SECONDS / worker.warm_up()))
        values = worker.block(calls, _TIMEOUT)
    samples: list[float] = []
    for _ in range(_PROCESSES):
        with Worker(subject, _TIMEOUT) as worker:
            worker.prepare()
            number = max(1, math.ceil(_SAMPLE_SECONDS / worker.warm_up()))
            block = worker.block(_SAMPLES * number, _TIMEOUT)
            samples += [float(np.mean(part)) for part in np.array_split(block, _SAMPLES)]
    statistics = {"mean": float(np.mean(values)), "min": min(values), "median": float(np.median(values))}
    return Separate(statistics, tuple(samples))


def pytest_benchmark_slower(a: Mapping[str, float], b: Mapping[str, float], statistic: str, percent: float) -> bool:
    """Return whether ``--benchmark-compare-fail=STATISTIC:PERCENT%`` fails B, compared with A."""
    return b[statistic] / a[statistic] * 100.0 - 100.0 > percent


def asv_verdict(a: Sequence[float], b: Sequence[float], factor: float) -> str:
    """Return what ``asv continuous --factor`` says of B against A: "slower", "faster" or "no difference".

    Beyond the factor by the medians, and different by a Mann-Whitney test at p < 0.002 (``is_different``).
    """
    ratio = float(np.median(b) / np.median(a))
    different = float(mannwhitneyu(a, b, method="exact").pvalue) < _SIGNIFICANT
    if different and ratio > factor:
        return "slower"
    return "faster" if different and ratio < 1.0 / factor else "no difference"

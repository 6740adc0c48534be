"""Statistics of latencies and of paired differences: arrays in, numbers out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from itertools import count
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binom, rankdata, t

from onnx_lathe.benchmarks.result import Interval
from onnx_lathe.runtime.errors import MeasurementError

Vector = NDArray[np.float64]
Statistic = Callable[[NDArray[np.int64]], Vector]
"""Computes some numbers, ``float64 [k]``, over the samples at the given indices."""

RESAMPLES = 1000
_NORMAL = NormalDist()


@cache
def least_samples(quantile: float, confidence: float = 0.99) -> int:
    """Return how many values a quantile of at least 0.5 needs: p50 11, p90 64, p95 130, p99 662, p99.9 6636.

    The smallest n with ``P(Binomial(n, 1 - quantile) <= 1) <= 1 - confidence``: MLPerf Inference's
    early-stopping bound, ``odds(h, t) <= 1 - c`` with one value over the quantile, t = 1 and n = h + t
    (LoadGen, ``early_stopping.cc``).
    """
    return next(n for n in count(2) if quantile**n + n * (1.0 - quantile) * quantile ** (n - 1) <= 1.0 - confidence)


def percentile(values: ArrayLike, quantile: float) -> Interval:
    """Return a quantile (at least 0.5) with its 95 % interval from order statistics.

    ``[X(l), X(u)]`` with l the 2.5 % point of Binomial(n, quantile) and u the 97.5 % point plus one holds the
    quantile of any distribution of independent values (David & Nagaraja, Order Statistics, 2003, section
    7.1).

    Args:
        values: ``float [n]``.
        quantile: On 0.5..1.

    Raises:
        MeasurementError: There are fewer values than `least_samples`.
    """
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    least = least_samples(quantile)
    if len(ordered) < least:
        raise MeasurementError(
            f"p{100 * quantile:g}",
            got=f"{len(ordered)} values",
            expected=f"at least {least}",
            mend="Measure for longer, or report a lower percentile.",
        )
    low = int(binom.ppf(0.025, len(ordered), quantile))
    high = int(binom.ppf(0.975, len(ordered), quantile)) + 1
    return Interval(float(np.quantile(ordered, quantile)), float(ordered[low - 1]), float(ordered[high - 1]))


def centre(differences: ArrayLike) -> float:
    """Return the Hodges-Lehmann estimate alone, of ``float [n]``, n at least 1: the median of the Walsh averages."""
    return float(np.median(_walsh(np.asarray(differences, dtype=np.float64))))


def _walsh(d: Vector) -> Vector:
    rows, columns = np.triu_indices(len(d))
    return np.sort((d[rows] + d[columns]) / 2.0)


def hodges_lehmann(differences: ArrayLike) -> Interval:
    """Return the Hodges-Lehmann estimate of the centre of symmetry and its 95 % interval.

    The median of the Walsh averages ``(d[i] + d[j]) / 2, i <= j``; the interval inverts the exact Wilcoxon
    signed-rank test (Hollander, Wolfe & Chicken, Nonparametric Statistical Methods, 2014, equations 3.23 and
    3.29).

    Args:
        differences: ``float [n]``, n at least 6: fewer cannot give 95 %.
    """
    d = np.asarray(differences, dtype=np.float64)
    if len(d) < 6:
        raise ValueError(f"a 95 % signed-rank interval needs 6 differences, not {len(d)}")
    walsh = _walsh(d)
    below = np.cumsum(_signed_rank_null(len(d)))
    outside = int(np.searchsorted(below, 0.025, side="right"))
    return Interval(float(np.median(walsh)), float(walsh[outside - 1]), float(walsh[len(walsh) - outside]))


def beyond_p_value(differences: ArrayLike, margin: float) -> float:
    """Return the two-sided p-value of the signed-rank test that the centre lies within ``margin`` of zero.

    Args:
        differences: ``float [n]``.
        margin: At least 0.
    """
    d = np.asarray(differences, dtype=np.float64)
    return min(1.0, 2.0 * min(_p_above(d - margin), _p_above(-d - margin)))


def mean_beyond_p_value(values: ArrayLike, margin: float) -> float:
    """Return the two-sided p-value of Student's test that the mean lies within ``margin`` of zero.

    Args:
        values: ``float [n]``, n at least 2.
        margin: At least 0.
    """
    x = np.asarray(values, dtype=np.float64)
    beyond = abs(float(x.mean())) - margin
    error = float(x.std(ddof=1)) / float(np.sqrt(len(x)))
    if error == 0.0:
        return 0.0 if beyond > 0.0 else 1.0
    return min(1.0, 2.0 * float(t.sf(beyond / error, len(x) - 1)))


def _p_above(d: Vector) -> float:
    """Return ``P(T+ >= t+)``, small where ``d`` lies above zero."""
    positive = float(rankdata(np.abs(d))[d > 0].sum())
    return float(_signed_rank_null(len(d))[int(np.ceil(positive)) :].sum())


def shift(a: ArrayLike, b: ArrayLike) -> Interval:
    """Return by how much ``a`` lies above ``b``, two independent samples, with its 95 % interval.

    The Hodges-Lehmann median of all differences with the interval that inverts the exact rank-sum test (Hollander,
    Wolfe & Chicken 2014, equations 4.33 and 4.41); Welch's where there are too few values for that to exist, and
    infinite where they do not tell their spread either.

    Args:
        a: ``float [n]``, n at least 1.
        b: ``float [m]``, m at least 1.
    """
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    differences = np.sort((x[:, None] - y[None, :]).ravel())
    estimate = float(np.median(differences))
    outside = int(np.searchsorted(np.cumsum(_rank_sum_null(len(x), len(y))), 0.025, side="right"))
    if outside > 0:
        return Interval(estimate, float(differences[outside - 1]), float(differences[len(differences) - outside]))
    low, high = _welch(x, y)
    return Interval(estimate, min(estimate, low), max(estimate, high))


def _welch(x: Vector, y: Vector) -> tuple[float, float]:
    """Return Welch's 95 % limits of a difference of means (Welch 1947, Biometrika 34).

    They are infinite where a spread cannot be told: of a single value, and of two samples that differ though neither
    has any. Where all values are equal they meet at zero: nothing was seen to differ.
    """
    constant = np.ptp(x) == np.ptp(y) == 0.0
    if constant and len(x) > 1 < len(y) and x[0] == y[0]:
        return 0.0, 0.0
    if constant or min(len(x), len(y)) < 2:
        return -np.inf, np.inf
    # The mean of equal values may be none of them, and their variance then not quite zero.
    squares = [float(each.var(ddof=1)) / len(each) if np.ptp(each) else 0.0 for each in (x, y)]
    total = sum(squares)
    freedom = 1.0 / sum((part / total) ** 2 / (len(each) - 1) for part, each in zip(squares, (x, y), strict=True))
    centre, reach = float(x.mean() - y.mean()), float(t.ppf(0.975, freedom) * np.sqrt(total))
    return centre - reach, centre + reach


@cache
def _rank_sum_null(n: int, m: int) -> Vector:
    """Return the exact null distribution of the Mann-Whitney U of n and m values over ``0 .. n m``."""
    ways = [np.zeros(n * m + 1) for _ in range(n + 1)]
    ways[0][0] = 1.0
    for rank in range(1, n + m + 1):
        for chosen in range(min(n, rank), 0, -1):
            above = rank - chosen
            if above <= m:
                ways[chosen][above:] += ways[chosen - 1][: n * m + 1 - above]
    return ways[n] / ways[n].sum()


@cache
def _signed_rank_null(n: int) -> Vector:
    """Return the exact null distribution of Wilcoxon's T+ over ``0 .. n (n + 1) / 2``."""
    chances = np.ones(1)
    for rank in range(1, n + 1):
        wider = np.zeros(len(chances) + rank)
        wider[: len(chances)] += chances / 2.0
        wider[rank:] += chances / 2.0
        chances = wider
    return chances


def mean_interval(values: ArrayLike) -> Interval:
    """Return the mean of ``float [n]``, n at least 2, with Student's 95 % interval."""
    x = np.asarray(values, dtype=np.float64)
    reach = float(t.ppf(0.975, len(x) - 1)) * float(x.std(ddof=1)) / float(np.sqrt(len(x)))
    return Interval(float(x.mean()), float(x.mean()) - reach, float(x.mean()) + reach)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the p-values adjusted for being several (Holm 1979, Scand. J. Statistics 6, p. 65)."""
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def studentized_bootstrap(values: Vector, levels: Sequence[float], seed: int = 0) -> Vector:
    """Return the confidence limits of a mean: ``mean - q[1 - level](t*) s / sqrt(n)``.

    Bootstrap-t (Efron & Tibshirani, An Introduction to the Bootstrap, 1993, equation 12.22), which keeps its
    coverage better than BCa where the values are skewed. A limit is infinite where resamples without any
    spread are too common for one to be given.

    Args:
        values: ``float64 [n]``.
        levels: Such as 0.95 for a one-sided upper limit.
        seed: Fixes the resamples.
    """
    rng = np.random.default_rng(seed)
    mean, error = float(values.mean()), float(values.std(ddof=1))
    if np.ptp(values) == 0.0:
        return np.full(len(levels), mean)
    studentized = np.empty(RESAMPLES)
    for index in range(RESAMPLES):
        sample = values[rng.integers(0, len(values), len(values))]
        offset, spread = float(sample.mean()) - mean, float(sample.std(ddof=1))
        studentized[index] = offset / spread if spread > 0.0 else np.copysign(np.inf, offset)
    # Both spreads lack the same factor 1 / sqrt(n). An inverted CDF never interpolates towards an infinity.
    quantiles = np.quantile(studentized, 1.0 - np.asarray(levels), method="inverted_cdf")
    return mean - quantiles * error


def bca_bootstrap(statistic: Statistic, n: int, levels: Sequence[float], seed: int = 0) -> NDArray[np.float64]:
    """Return the bias-corrected and accelerated confidence limits of some statistics of the same samples.

    Efron & Tibshirani 1993, equations 14.9, 14.14 and 14.15; the acceleration from a jackknife over at most
    50 groups.

    Args:
        statistic: Computes ``float64 [k]`` from the samples at some indices.
        n: Number of samples, at least 2.
        levels: Such as 0.95 for a one-sided upper limit.
        seed: Fixes the resamples.

    Returns:
        ``float64 [levels, k]``.
    """
    rng = np.random.default_rng(seed)
    estimate = statistic(np.arange(n))
    replicates = np.stack([statistic(rng.integers(0, n, n)) for _ in range(RESAMPLES)])
    groups = np.array_split(rng.permutation(n), min(n, 50))
    jackknife = np.stack([statistic(np.setdiff1d(np.arange(n), group)) for group in groups])
    limits = [_bca_limits(float(estimate[k]), replicates[:, k], jackknife[:, k], levels) for k in range(len(estimate))]
    return np.stack(limits, axis=1)


def _bca_limits(estimate: float, replicates: Vector, jackknife: Vector, levels: Sequence[float]) -> Vector:
    influence = jackknife.mean() - jackknife
    spread = float(np.square(influence).sum())
    if spread == 0.0:
        return np.full(len(levels), estimate)
    acceleration = float((influence**3).sum()) / (6.0 * spread**1.5)
    # Half of the ties counts as below; kept off 0 and 1, where the normal quantile is infinite.
    below = float((replicates < estimate).mean() + (replicates == estimate).mean() / 2.0)
    least = 1.0 / len(replicates)
    bias = _NORMAL.inv_cdf(min(max(below, least), 1.0 - least))
    shifted = [bias + _NORMAL.inv_cdf(level) for level in levels]
    return np.quantile(replicates, [_NORMAL.cdf(bias + z / (1.0 - acceleration * z)) for z in shifted])

"""How far two explanations of the same answers agree, against how far one agrees with itself: arrays in, figures out.

An explanation gives each feature of a sample (a patch, a token, an entry) a weight. Methods that draw perturbations at
random give other weights under another seed: what one model's explanations lose by that is the noise floor, and only
what two models lose beyond it tells that they answer for other reasons.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from onnx_lathe.benchmarks.result import Interval
from onnx_lathe.benchmarks.stats import Vector, bca_bootstrap

TOP = 5
"""How many features are the top ones; half of them where there are fewer than ten."""
LEAST_FEATURES = 3
"""Ranks of fewer say nothing."""

_LEVELS = (0.025, 0.975)
_LOW_FLOOR = 0.5


@dataclass(frozen=True)
class Agreement:
    """How far the explanations of the same samples agree, as means over samples with bootstrap intervals.

    Attributes:
        rank_correlation: Spearman's, of the weights; 1 where features have the same order.
        top_overlap: Share of the top features, by size of weight, that are top in both ("feature agreement" of Krishna
            et al. 2022, The Disagreement Problem in Explainable Machine Learning).
        sign_agreement: Share of the top features that are top in both and of the same sign (their "sign agreement").
    """

    rank_correlation: Interval
    top_overlap: Interval
    sign_agreement: Interval


@dataclass(frozen=True)
class MethodAgreement:
    """What one method of explaining found.

    Attributes:
        method: Its name.
        random: Whether it draws perturbations at random; else its floor is 1 by definition.
        between: Of the two models under the same seeds.
        floor: Of the original with itself under two seeds.
        shift: ``floor - between`` of the rank correlation, paired by sample.
        by_sample: The rank correlation between the models for each sample.
    """

    method: str
    random: bool
    between: Agreement
    floor: Agreement
    shift: Interval
    by_sample: tuple[float, ...]

    @property
    def differs(self) -> bool:
        """Whether the models differ by more than the noise floor, with 95 % confidence."""
        return self.shift.low > 0.0

    @property
    def sentence(self) -> str:
        """The finding in words."""
        found = self.between.rank_correlation
        figure = f"mean rank correlation {found.value:.3f} [{found.low:.3f}, {found.high:.3f}]"
        if not self.random:
            same = (
                "B's explanations are A's" if found.value == 1.0 else f"B's explanations agree with A's at a {figure}"
            )
            return (
                f"{self.method}: {same}; nothing is random in it, so its noise floor is 1 and every difference is real."
            )
        floor = self.floor.rank_correlation
        more = "by more than" if self.differs else "by no more than"
        low = (
            " That floor is low: with more evaluations the method would be steadier."
            if floor.value < _LOW_FLOOR
            else ""
        )
        return (
            f"{self.method}: B's explanations differ from A's {more} the noise floor: {figure} between the models, "
            f"{floor.value:.3f} [{floor.low:.3f}, {floor.high:.3f}] of A with itself under another seed.{low}"
        )


def agree(
    method: str, original: Sequence[Vector], candidate: Sequence[Vector], again: Sequence[Vector] | None
) -> MethodAgreement:
    """Compare explanations sample by sample.

    Args:
        method: How they were made.
        original: Of the original, ``float64 [features]`` for each of at least two samples.
        candidate: Of the candidate, under the same seeds.
        again: Of the original under other seeds; None for a method without any.
    """
    between = _measures(original, candidate)
    floor = np.ones_like(between) if again is None else _measures(original, again)
    shift = _mean((floor - between)[:, :1])[0]
    ranks = tuple(between[:, 0].tolist())
    return MethodAgreement(
        method, again is not None, Agreement(*_mean(between)), Agreement(*_mean(floor)), shift, ranks
    )


def rank_correlation(one: Vector, other: Vector) -> float:
    """Return Spearman's rank correlation of ``float64 [features]``, ties sharing their mean rank.

    1 where the ranks are the same, even if there is but one; else 0 where one of them does not vary.
    """
    a, b = rankdata(one), rankdata(other)
    if np.array_equal(a, b):
        return 1.0
    if np.ptp(a) == 0.0 or np.ptp(b) == 0.0:
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])


def top_features(weights: Vector) -> NDArray[np.int64]:
    """Return which of ``float64 [features]`` are largest in size, the first ones of equals."""
    count = min(TOP, max(1, len(weights) // 2))
    return np.argsort(-np.abs(weights), kind="stable")[:count]


def top_overlap(one: Vector, other: Vector) -> float:
    """Return the share of the top features that are top in both."""
    top = top_features(one)
    return len(np.intersect1d(top, top_features(other))) / len(top)


def sign_agreement(one: Vector, other: Vector) -> float:
    """Return the share of the top features that are top in both and have the same sign there."""
    top = top_features(one)
    both = np.intersect1d(top, top_features(other))
    return float((np.sign(one[both]) == np.sign(other[both])).sum()) / len(top)


_MEASURES: tuple[Callable[[Vector, Vector], float], ...] = (rank_correlation, top_overlap, sign_agreement)


def _measures(first: Sequence[Vector], second: Sequence[Vector]) -> NDArray[np.float64]:
    """Return ``float64 [samples, measures]``."""
    pairs = zip(first, second, strict=True)
    return np.array([[measure(one, other) for measure in _MEASURES] for one, other in pairs])


def _mean(values: NDArray[np.float64]) -> list[Interval]:
    """Return the mean of each column of ``float64 [samples, k]``."""
    limits = bca_bootstrap(lambda indices: values[indices].mean(axis=0), len(values), _LEVELS)
    means = values.mean(axis=0)
    return [
        Interval(value, min(value, low), max(value, high))
        for value, low, high in zip(means.tolist(), *limits.tolist(), strict=True)
    ]

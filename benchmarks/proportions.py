"""Bounds of shares of samples that are right or wrong."""

from __future__ import annotations

import math
from statistics import NormalDist

from scipy.optimize import brentq
from scipy.stats import beta

from onnx_lathe.benchmarks.result import Interval

_MOST_SAMPLES = 10_000_000
"""Nobody has more: a number beyond it is no advice."""


def wilson(successes: float, n: int) -> Interval:
    """Return a share with its 95 % score interval (Wilson 1927, JASA 22, p. 209)."""
    z = NormalDist().inv_cdf(0.975)
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    reach = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + (z / (2 * n)) ** 2)
    return Interval(share, max(0.0, min(share, centre - reach)), min(1.0, max(share, centre + reach)))


def clopper_pearson_upper(successes: float, n: int, confidence: float = 0.95) -> float:
    """Return the exact one-sided upper bound of a share (Clopper & Pearson 1934, Biometrika 26, p. 404).

    With no success it is ``1 - (1 - confidence)^(1/n)``.
    """
    return 1.0 if successes >= n else float(beta.ppf(confidence, successes + 1, n - successes))


def tango_upper(losses: float, gains: float, n: int, confidence: float = 0.95) -> float:
    """Return the one-sided score bound of ``P(loss) - P(gain)`` over ``n`` pairs.

    Tango 1998, Statistics in Medicine 17, p. 891, equations 10 and 14: the difference at which the score,
    with the chance of a gain at its maximum likelihood under that difference, falls to the normal quantile.

    Args:
        losses: Pairs right before and wrong after.
        gains: Pairs wrong before and right after; ``losses + gains`` is at least 1.
        n: All pairs.
        confidence: One-sided.
    """
    z = NormalDist().inv_cdf(confidence)

    def excess(difference: float) -> float:
        b = (2 * n - losses + gains) * difference - losses - gains
        c = -gains * difference * (1 - difference)
        gain = (math.sqrt(max(0.0, b * b - 8 * n * c)) - b) / (4 * n)
        variance = n * (2 * gain + difference * (1 - difference))
        # At the largest difference possible nothing varies: any evidence against it counts without bound.
        return z + (losses - gains - n * difference) / math.sqrt(variance) if variance > 0 else -math.inf

    estimate = (losses - gains) / n
    if estimate >= 1.0:
        return 1.0
    return float(brentq(excess, estimate + 1e-9, 1.0 - 1e-12))


def drop_upper(losses: float, gains: float, n: int) -> tuple[float, str]:
    """Return the one-sided 95 % bound of a drop of accuracy over paired samples, and how it was found.

    Where nothing was gained the drop is at most the share of losses, whose bound is exact; else the score
    bound, which holds within a point of its level wherever accuracy really falls (simulated for 60 to 5,000
    samples).
    """
    if gains == 0:
        return clopper_pearson_upper(losses, n), "Clopper-Pearson bound of the losses, exact"
    return tango_upper(losses, gains, n), "Tango's score bound of paired proportions"


def paired_change(losses: int, gains: int, n: int) -> Interval:
    """Return the change of a share over ``n`` pairs, ``(gains - losses) / n``, with its 95 % score interval.

    Both ends are bounds as `tango_upper` gives them at 97.5 %, or the exact bound of what none of the pairs showed.
    An approximation: over 60 pairs of which one side is rare it covers 93 % (docs/studies/coverage.md).
    """

    def most(up: int, down: int) -> float:
        return clopper_pearson_upper(up, n, 0.975) if down == 0 else tango_upper(up, down, n, 0.975)

    return Interval((gains - losses) / n, -most(losses, gains), most(gains, losses))


def least_without_loss(max_drop: float) -> int | None:
    """Return how many samples without any loss bring the exact bound within ``max_drop`` (None: none do)."""
    if max_drop <= 0.0:
        return None
    return 1 if max_drop >= 0.95 else math.ceil(math.log(0.05) / math.log1p(-max_drop))


def samples_needed(losses: int, gains: int, n: int, max_drop: float) -> int | None:
    """Return how many samples would certify ``max_drop`` if losses and gains kept their shares.

    None where no number in reach would.
    """
    if (losses - gains) / n >= max_drop:
        return None

    def bound(size: int) -> float:
        return drop_upper(losses * size / n, gains * size / n, size)[0]

    high = 1
    while bound(high) > max_drop:
        high *= 2
        if high > _MOST_SAMPLES:
            return None
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if bound(middle) <= max_drop else (middle, high)
    return high

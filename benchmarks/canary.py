"""A fixed kernel timed all through a run: where it drifts, the machine did."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

MAX_DRIFT = 0.05
"""Clocks step by up to 4 % on idle machines (docs/log.md), which interleaving cancels; another load does far more."""

_PRODUCTS = 1500
# 64 x 64: small enough that no BLAS starts threads for it, and that it needs no cache but the nearest.
_MATRIX = np.random.default_rng(0).random((64, 64), dtype=np.float32)


def sing() -> float:
    """Return the seconds that the kernel takes just now, about 0.01.

    Timed as a whole: where other processes want the core, it is interrupted, as the subjects are.
    """
    begin = time.perf_counter_ns()
    for _ in range(_PRODUCTS):
        np.matmul(_MATRIX, _MATRIX)
    return (time.perf_counter_ns() - begin) / 1e9


def drift(seconds: Sequence[float]) -> float:
    """Return how far the kernel drifted in a run, as a share of its fastest third.

    Compares the medians of the first, middle and last third, so that a single disturbed value does not condemn a run.

    Args:
        seconds: What `sing` returned, in order; at least 3.
    """
    thirds = [float(np.median(third)) for third in np.array_split(np.asarray(seconds), 3)]
    return max(thirds) / min(thirds) - 1.0

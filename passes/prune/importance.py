"""How much each channel matters: pure numpy, arrays in, arrays out."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from onnx_lathe.passes.files import BLOCK, blocks
from onnx_lathe.runtime.samples import Array

Scores = NDArray[np.float64]
"""One number a channel, the larger the more it matters."""


def squared_norms(weight: Array, axis: int) -> Scores:
    """Return ``[weight.shape[axis]]``, the squared L2 norm of each slice of ``weight`` along ``axis``."""
    rest = tuple(other for other in range(weight.ndim) if other != axis)
    rows = max(1, BLOCK * len(weight) // max(weight.size, 1))
    blocks = [
        np.square(weight[start : start + rows].astype(np.float64)).sum(axis=rest)
        for start in range(0, len(weight), rows)
    ]
    return np.concatenate(blocks) if axis == 0 else np.sum(blocks, axis=0)


def deviation(weight: Array) -> float:
    """Return the standard deviation of all entries of ``weight``."""
    total = square = 0.0
    for block in blocks(weight):
        wide = block.astype(np.float64)
        total += float(wide.sum())
        square += float(wide @ wide)
    return math.sqrt(max(square / weight.size - (total / weight.size) ** 2, 0.0))


def by_channel(entries: Scores, channel: NDArray[np.int64], channels: NDArray[np.int64]) -> Scores:
    """Return the sum of ``entries`` over each of ``channels``.

    Args:
        entries: ``[entries]``, one number for each entry along an axis.
        channel: ``[entries]``, the channel that each belongs to.
        channels: The channels to sum for; entries of others are left out.
    """
    order = np.argsort(channels)
    place = np.minimum(np.searchsorted(channels, channel, sorter=order), len(channels) - 1)
    index = order[place]
    belongs = channels[index] == channel
    sums: Scores = np.zeros(len(channels))
    np.add.at(sums, index[belongs], entries[belongs])
    return sums


def mean_of(scores: Iterable[Scores]) -> Scores:
    """Return the mean of several scores of the same channels, each normalized to mean 1 first.

    Over the L2 norms of all weights of a group this is the group importance of DepGraph (Fang et al. 2023,
    arXiv:2301.12900, section 3.3). Over ``Var(X_j) ||W_j||^2`` of its consumers it is the fluctuation metric of FLAP
    (An et al. 2024, arXiv:2312.11983): the energy that is lost when a bias takes the channel's mean.
    """
    normalized = [score / max(float(score.mean()), np.finfo(np.float64).tiny) for score in scores]
    return np.mean(normalized, axis=0)

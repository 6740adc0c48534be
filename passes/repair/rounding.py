"""Learning whether to round up or down, by what a layer computes. Pure numpy.

AdaRound (Nagel et al. 2020, "Up or Down? Adaptive Rounding for Post-Training Quantization", arXiv:2004.10568), eq. 21
to 25: ``W_hat = s clamp(floor(W/s) + h(V))``, ``h = clip(1.2 sigmoid(V) - 0.1, 0, 1)``. Adam moves h to 0 or 1 by the
loss ``|W X - W_hat X|^2 + lambda sum(1 - |2h - 1|^beta)``, beta falling from 20 to 2.

The output error is a quadratic form of the layer's Gram matrix, so that every step sees all rows: with ``d`` the error
of one output's weights, in steps, it is ``d' G d``. Each output is a problem of its own and its error is measured
against that of rounding to nearest, so that lambda means the same for every layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from onnx_lathe.runtime.samples import Array

Single = NDArray[np.float32]
Wide = NDArray[np.float64]
Flags = NDArray[np.bool_]
STRETCH, MARGIN = 1.2, 0.1
"""Zeta - gamma and -gamma of eq. 23: h reaches 0 and 1."""
BETA_FIRST, BETA_LAST = 20.0, 2.0
WARM = 0.2
"""Share of the iterations in which the output error alone decides."""
RATE = 0.03
"""Of Adam (0.01 to 0.1 end within 2 % of each other)."""
WEIGHT = 0.3
"""The output error in units of lambda a weight, where rounding to nearest has this: up to a third, the curvature of the
last beta pushes every h to an end; beyond it many stay between (at 1 one in twenty, and the error is 4 % larger)."""
ON_GRID = 1e-3
"""Steps from a level within which an entry is on it already."""
PIECE = 2**18
"""Entries that are learned together: some ten arrays of this size stay near the core."""


def levels_of(weight: Array, scales: Array, up: Flags, limit: int) -> Array:
    """Return ``clamp(floor(W/s) + up)``; ``scales`` broadcasts against ``weight``."""
    return np.clip(np.floor(weight / scales) + up, -limit, limit)


def gram(rows: Array, groups: int) -> Wide:
    """Return ``X'X`` of each group of columns, ``[groups, columns, columns]``; not finite where ``X`` is not.

    Args:
        rows: ``[rows, groups * columns]``.
        groups: How many there are.
    """
    parts = rows.reshape(len(rows), groups, -1).transpose(1, 0, 2)
    with np.errstate(over="ignore", invalid="ignore"):
        return (parts.transpose(0, 2, 1) @ parts).astype(np.float64)


@dataclass(frozen=True, eq=False)
class Learned:
    """How a weight is rounded, and what that is worth, in squared steps.

    Attributes:
        up: Which entries are rounded up, ``[groups, outputs, columns]``.
        moved: How many of them are not rounded to nearest.
        nearest_error: The output error of each output at nearest, ``[groups, outputs]``.
        error: The same with this rounding: never more.
        energy: The sum of squares of each output.
    """

    up: Flags
    moved: int
    nearest_error: Wide
    error: Wide
    energy: Wide


def round_up(weight: Array, scales: Array, moments: Wide, limit: int, iterations: int) -> Learned:
    """Learn which entries to round up.

    An entry with the largest magnitude of its scale goes to the nearest level, so that the scale stays; and an output
    for which learning found nothing better than nearest is rounded to nearest.

    Args:
        weight: ``[groups, outputs, columns]``.
        scales: ``[groups, outputs, 1]`` or ``[1, 1, 1]``.
        moments: ``X'X`` of each group, ``[groups, columns, columns]``.
        limit: The largest level.
        iterations: Steps of Adam.
    """
    axis = None if scales.size == 1 else 2
    largest = np.maximum(weight.max(axis=axis, keepdims=True), -weight.min(axis=axis, keepdims=True))
    largest, scales = (np.broadcast_to(part, (*weight.shape[:2], 1)) for part in (largest, scales))
    up = np.empty(weight.shape, np.bool_)
    nearest_error, error, energy = (np.empty(weight.shape[:2]) for _ in range(3))
    moved = 0
    for groups, outputs in _pieces(weight.shape):
        at = (groups, outputs)
        exact, gram_of = (weight[at] / scales[at]).astype(np.float32), moments[groups]
        floor, nearest = np.floor(exact), np.rint(exact)
        held = (np.abs(weight[at]) >= largest[at]) | (np.abs(exact) >= limit) | (np.abs(exact - nearest) < ON_GRID)
        energy[at] = errors_of(exact, gram_of)
        nearest_error[at] = errors_of(np.clip(nearest, -limit, limit) - exact, gram_of)
        learned = _learn(exact, held, nearest_error[at], gram_of, limit, iterations)
        error[at] = errors_of(np.clip(floor + learned, -limit, limit) - exact, gram_of)
        better = (error[at] < nearest_error[at])[:, :, None]
        up[at] = np.where(better, learned, nearest > floor)
        moved += int(np.count_nonzero(up[at] != (nearest > floor)))
    return Learned(up, moved, nearest_error, np.minimum(error, nearest_error), energy)


def errors_of(difference: Array, moments: Wide) -> Wide:
    """Return ``d' G d`` of each output, ``[groups, outputs]``, for ``difference [groups, outputs, columns]``."""
    return np.einsum("gok,gok->go", difference @ moments, difference)


def _pieces(shape: tuple[int, ...]) -> Iterator[tuple[slice, slice]]:
    """Yield groups and outputs to learn together, about `PIECE` entries."""
    groups, outputs, columns = shape
    step = max(1, PIECE // (columns if groups == 1 else outputs * columns))
    for start in range(0, outputs if groups == 1 else groups, step):
        piece = slice(start, start + step)
        yield (slice(None), piece) if groups == 1 else (piece, slice(None))


def _learn(exact: Single, held: Flags, before: Wide, moments: Wide, limit: int, iterations: int) -> Flags:
    """Return which entries to round up, ``[groups, outputs, columns]``, by Adam on V."""
    nearest, fraction = np.rint(exact), exact - np.floor(exact)
    # What is held keeps its error, which others make up for.
    fixed = np.clip(nearest, -limit, limit) - exact
    pull = np.divide(2.0 * WEIGHT * exact.shape[2], before, out=np.zeros_like(before), where=before > 0.0)
    pull, matrix = pull.astype(np.float32)[:, :, None], moments.astype(np.float32)
    v = _logit(np.clip((fraction + MARGIN) / STRETCH, 1e-4, 1.0 - 1e-4))
    first, second = np.zeros_like(v), np.zeros_like(v)
    for step in range(1, iterations + 1):
        sigmoid = np.float32(1.0) / (np.float32(1.0) + np.exp(-v))
        h = np.clip(np.float32(STRETCH) * sigmoid - np.float32(MARGIN), np.float32(0.0), np.float32(1.0))
        slope = (np.where(held, fixed, h - fraction) @ matrix) * pull
        slope -= _regularization(h, (step / iterations - WARM) / (1.0 - WARM))
        slope *= sigmoid * (1.0 - sigmoid) * ((h > 0.0) & (h < 1.0))
        first += 0.1 * (slope - first)
        second += 0.001 * (slope * slope - second)
        mean, spread = first / (1.0 - 0.9**step), second / (1.0 - 0.999**step)
        v -= RATE * mean / (np.sqrt(spread) + 1e-12)
    return np.where(held, nearest > np.floor(exact), v >= 0.0)


def _regularization(h: Single, progress: float) -> Single | float:
    """Return the slope of ``sum |2h - 1|^beta``, 0 before the output error alone has had its time."""
    if progress <= 0.0:
        return 0.0
    beta = BETA_LAST + 0.5 * (BETA_FIRST - BETA_LAST) * (1.0 + np.cos(np.pi * progress))
    z = 2.0 * h - 1.0
    return (2.0 * beta * np.abs(z) ** (beta - 1.0) * np.sign(z)).astype(np.float32)


def _logit(share: Single) -> Single:
    return np.log(share / (1.0 - share))

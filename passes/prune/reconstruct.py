"""Least squares after a cut: the channels that stay take over what the removed ones did. Pure numpy and scipy.

For a consumer ``Y = X W`` with inputs ``X [rows, columns]`` let ``G = X'X + 0.01 mean(diag(X'X)) I``. The weights of
the columns that stay which come nearest to ``Y`` are ``W_K = G_KK^-1 (G W)_K`` (ridge regression towards ``W``: where
nothing is cut the answer is ``W``). Where the consumer has a bias, ``X`` is centred first and the bias takes the means.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve

from onnx_lathe.runtime.samples import Array

Matrix = NDArray[np.float64]
RIDGE = 0.01
"""Share of the mean diagonal that is added to the diagonal."""
ROUNDING = 1e-9
"""Share of the mean diagonal of X'X under which a variance is what rounding left of a difference."""


@dataclass
class Moments:
    """First and second moments of the columns of ``X``, streamed over batches.

    Attributes:
        count: Rows so far.
        total: ``[columns]``, their sum.
        gram: ``[columns, columns]``, ``X'X``.
    """

    count: int
    total: Matrix
    gram: Matrix

    @classmethod
    def zeros(cls, columns: int) -> Moments:
        """Return the moments of no rows."""
        return cls(0, np.zeros(columns), np.zeros((columns, columns)))

    def add(self, rows: Array) -> None:
        """Take in ``rows [any, columns]``."""
        wide = rows.astype(np.float64)
        self.count += len(wide)
        self.total += wide.sum(axis=0)
        self.gram += wide.T @ wide


@dataclass(frozen=True)
class Solution:
    """New weights for the columns that stay.

    Attributes:
        weight: ``[kept columns, outputs]``.
        shift: ``[outputs]``, what the bias gains; zeros where there is none.
        cut_error: Squared error of the outputs after the cut alone, once a bias has taken the means: by ``G``, and
            relative to the energy of the outputs.
        error: The same with the new weights: never more.
    """

    weight: Matrix
    shift: Matrix
    cut_error: float
    error: float


def least_squares(moments: Moments, weight: Matrix, kept: NDArray[np.int64], *, has_bias: bool) -> Solution:
    """Fit the columns ``kept`` to the outputs of all.

    Args:
        moments: Of the consumer's inputs.
        weight: ``[columns, outputs]``.
        kept: The columns that stay, ascending.
        has_bias: Whether a bias can take the means.
    """
    mean = moments.total / moments.count if has_bias else np.zeros_like(moments.total)
    gram = moments.gram - moments.count * np.outer(mean, mean)
    # A consumer whose inputs (nearly) never vary still needs a positive definite system, above what rounding left.
    rounding = ROUNDING * float(np.trace(moments.gram))
    ridge = max(RIDGE * float(np.trace(gram)), rounding) / len(gram) or 1.0
    gram[np.diag_indices_from(gram)] += ridge
    target = gram @ weight
    solved = cho_solve(cho_factor(gram[np.ix_(kept, kept)]), target[kept])
    energy = float(np.sum(weight * target))
    cut = weight.copy()
    cut[kept] = 0.0
    fitted = weight.copy()
    fitted[kept] -= solved
    return Solution(
        weight=solved,
        shift=mean @ weight - mean[kept] @ solved,
        cut_error=float(np.sum(cut * (gram @ cut))) / max(energy, np.finfo(np.float64).tiny),
        error=float(np.sum(fitted * (gram @ fitted))) / max(energy, np.finfo(np.float64).tiny),
    )


def patches(
    images: Array,
    kernel: Sequence[int],
    strides: Sequence[int],
    pads: Sequence[int],
    dilations: Sequence[int],
    limit: int,
    generator: np.random.Generator,
) -> Array:
    """Return what a Conv sees at ``limit`` random places (all, where there are fewer), as rows (im2col).

    Args:
        images: ``[batch, channels, *space]``.
        kernel: Sizes of the kernel.
        strides: Steps of the kernel.
        pads: Zeros before each axis of space, then after each.
        dilations: Steps inside the kernel.
        limit: The most rows.
        generator: Draws the places.

    Returns:
        ``[rows, channels * prod(kernel)]``, columns in the order of a Conv's weight.
    """
    space = len(kernel)
    last = np.moveaxis(images, 1, -1)
    padded = np.pad(last, [(0, 0), *zip(pads[:space], pads[space:], strict=True), (0, 0)])
    reach = [step * (size - 1) + 1 for size, step in zip(kernel, dilations, strict=True)]
    places = [
        (length - span) // stride + 1 for length, span, stride in zip(padded.shape[1:-1], reach, strides, strict=True)
    ]
    total = len(images) * int(np.prod(places))
    chosen = np.arange(total) if total <= limit else generator.choice(total, limit, replace=False)
    image, *corner = np.unravel_index(chosen, (len(images), *places))
    starts = [index * stride for index, stride in zip(corner, strides, strict=True)]
    seen = [
        padded[(image, *(start + offset * step for start, offset, step in zip(starts, at, dilations, strict=True)))]
        for at in np.ndindex(*kernel)
    ]
    return np.stack(seen, axis=-1).reshape(len(chosen), -1)

"""GPTQ: each column of a weight is rounded in turn, and those to come make up for its error. Pure numpy and scipy.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers" (2023), algorithm 1.
For inputs ``X`` with ``H = 2 X'X`` and ``U`` the upper triangle with ``H^-1 = U'U``: ``e = (w - w_hat) / U_ii``, then
``W[i:] -= U[i, i:] e``. A weight is ``[inputs, outputs]`` here, so that what is rounded in turn lies together.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import lapack

from onnx_lathe.passes.quantize.blockwise import BlockScheme, Floats, dequantize, levels, nearest_grid

DAMPING = 0.01
"""Share of the mean diagonal that is added to the diagonal; ten times as much where that has no factors yet."""
COLUMNS = 128
"""Inputs that are rounded before the others hear of it (the paper's B): products of matrices instead of vectors."""


@dataclass(frozen=True)
class Order:
    """What the inputs of a layer say about the order and the weight of errors.

    Attributes:
        inputs: ``int64 [inputs]``, in the order in which they are rounded.
        upper: ``float32 [inputs, inputs]``, ``U`` in that order.
        is_sorted: Whether that order is another than that of the weight.
    """

    inputs: NDArray[np.int64]
    upper: Floats
    is_sorted: bool


def order_of(gram: Floats, *, by_activation: bool) -> Order:
    """Return the order of the inputs with moments ``gram = X'X``, ``float32 [inputs, inputs]``, and its ``U``.

    A factor on ``gram`` changes nothing. An input that is always 0 is rounded by itself.

    Args:
        gram: Summed over all rows of inputs; finite.
        by_activation: Whether inputs of large energy are rounded first, while most others can still make up for it
            (the authors' ``act_order``), instead of in the order of the weight.
    """
    count = len(gram)
    energy = np.diagonal(gram)
    inputs = np.argsort(-energy, kind="stable") if by_activation else np.arange(count)
    # H = (J L J)(J L J)' with L of the reversed matrix: its inverse is U, without inverting H first.
    inverse, _ = lapack.dtrtri(_cholesky(gram, inputs[::-1]), lower=1, overwrite_c=1)
    return Order(inputs, inverse[::-1, ::-1].astype(np.float32), by_activation)


def _cholesky(gram: Floats, order: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the lower factor of ``gram`` in another order and damped.

    Sums in float32 of inputs that nearly depend on each other may have no factors: the damping grows until there are.
    """
    added = DAMPING * float(np.diagonal(gram).mean(dtype=np.float64)) or 1.0
    while True:
        assert np.isfinite(added), "moments are finite"
        matrix = gram[np.ix_(order, order)].astype(np.float64, order="F")
        matrix[np.diag_indices(len(gram))] += added
        lower, failed_at = lapack.dpotrf(matrix, lower=1, clean=1, overwrite_a=1)
        if not failed_at:
            return lower
        added *= 10.0


def solve(weight: Floats, order: Order, scheme: BlockScheme) -> tuple[NDArray[np.uint8], Floats, Floats]:
    """Return levels ``[inputs, outputs]``, scales and zero points ``[blocks, outputs]`` of a weight.

    In the order of the weight a block's grid is fitted as its first input comes up, to what the weights then are;
    sorted, inputs of all blocks mix, and the grids are those of the weight as it was.

    Args:
        weight: ``[inputs, outputs]``; some of the outputs of a layer at a time will do. It is not changed.
        order: From the layer's inputs.
        scheme: How weights are rounded.
    """
    count, outputs = weight.shape
    rest = weight[order.inputs]
    found = np.empty((count, outputs), np.uint8)
    scales = np.empty((scheme.blocks(count), outputs), np.float32)
    zeros = np.empty_like(scales)

    def fit(source: Floats, block: int) -> None:
        values = source[None, block * scheme.size : (block + 1) * scheme.size]
        scales[block], zeros[block] = (each[0, 0] for each in nearest_grid(values, 1, scheme))

    if order.is_sorted:
        for block in range(len(scales)):
            fit(weight, block)
    # A block's grid is fitted to inputs that have heard of all before: it must not reach beyond those that wait.
    step = max(COLUMNS, scheme.size)
    for start in range(0, count, step):
        stop = min(start + step, count)
        errors = np.empty((stop - start, outputs), np.float32)
        for row in range(start, stop):
            place = int(order.inputs[row])
            block = place // scheme.size
            if not order.is_sorted and place % scheme.size == 0:
                fit(rest, block)
            grid = scales[block], zeros[block]
            nearest = levels(rest[row], grid, scheme.top)
            found[place] = nearest
            errors[row - start] = (rest[row] - dequantize(nearest, grid)) / order.upper[row, row]
            rest[row + 1 : stop] -= np.outer(order.upper[row, row + 1 : stop], errors[row - start])
        rest[stop:] -= order.upper[start:stop, stop:].T @ errors
    return found, scales, zeros

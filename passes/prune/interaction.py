"""The interaction score: what the results of a layer owe to each of its inputs.

For a layer ``y_i = sum_j w_ij x_j + b_i`` the score of input ``j`` is ``I_j = sum_i |E[y_i w_ij x_j]|`` over the
calibration data: the interaction ``E[x_i w_ij x_j]`` of the idea (docs/from-the-idea.md) with the layer's result,
before its activation, for ``x_i``. As ``E[y_i^2] = sum_j E[y_i w_ij x_j] + b_i E[y_i]``, it shares out the energy of
each result among the inputs. For a Conv, ``w_ij x_j`` is the sum over the kernel. It needs the products ``E[x_j y_i]``
for every weight: as much memory as the weight in float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnx_lathe.passes import files
from onnx_lathe.passes.edit import Refusal
from onnx_lathe.passes.prune.groups import Consumer, tensor_of
from onnx_lathe.passes.prune.importance import Scores
from onnx_lathe.passes.prune.refit import bias_of, form_obstacle, matrix_of, portions, refused, stream
from onnx_lathe.runtime.samples import Array, Samples

MAX_WEIGHTS = 2**26
"""Larger layers are not looked at: their products alone would take more than half a gigabyte."""
_BLOCK = 256
"""Results whose products are added at once, to bound the temporary array."""


def interactions(
    model: ir.Model, consumers: Sequence[Consumer], samples: Samples
) -> tuple[dict[Consumer, Scores], list[Refusal]]:
    """Return ``I_j`` for each entry of the input of each consumer, and the consumers left out with the reason.

    Args:
        model: The graph.
        consumers: Nodes that sum over channels.
        samples: What to run.

    Raises:
        SamplesError: ``samples`` do not fit the model.
    """
    scores: dict[Consumer, Scores] = {}
    able: list[Consumer] = []
    left: list[Refusal] = []
    for consumer in consumers:
        reason = form_obstacle(consumer) or _size_obstacle(consumer)
        if reason is None:
            able.append(consumer)
        else:
            left.append(refused(consumer, f"no interaction {reason}"))
    for part in portions(able, lambda consumer: 8 * _size(consumer)):
        products = {consumer: _Products.of(consumer) for consumer in part}
        for consumer, rows in stream(model, part, samples):
            products[consumer].add(rows)
        scores |= {consumer: product.scores() for consumer, product in products.items()}
    return scores, left


class _Products:
    """``sum x_c y_i`` over rows, for every weight of a layer.

    Args:
        matrix: ``[columns, outputs]``, the weight.
        bias: ``[outputs]`` or a scalar.
        channels: Of the input; each has as many columns as the kernel has places.
    """

    def __init__(self, matrix: Array, bias: Array, channels: int) -> None:
        self._matrix = matrix
        self._bias = bias
        self._channels = channels
        self._rows = 0
        self._total: NDArray[np.float64] = np.zeros(matrix.shape)

    @classmethod
    def of(cls, consumer: Consumer) -> _Products:
        """Return the products of no rows."""
        weight = files.view(tensor_of(consumer.weight)).numpy()
        bias = bias_of(consumer)
        values = np.zeros(1, weight.dtype) if bias is None else tensor_of(bias).numpy()
        return cls(matrix_of(weight, consumer.axis), values, weight.shape[consumer.axis])

    def add(self, rows: Array) -> None:
        """Take in ``rows [any, columns]``."""
        results = rows @ self._matrix + self._bias
        wide = rows.T.astype(np.float64)
        self._rows += len(rows)
        for start in range(0, results.shape[1], _BLOCK):
            part = slice(start, start + _BLOCK)
            self._total[:, part] += wide @ results[:, part]

    def scores(self) -> Scores:
        """Return ``[channels]``."""
        found: Scores = np.zeros(self._channels)
        for start in range(0, self._total.shape[1], _BLOCK):
            part = slice(start, start + _BLOCK)
            shares = self._matrix[:, part] * self._total[:, part] / self._rows
            found += np.abs(shares.reshape(self._channels, -1, shares.shape[1]).sum(axis=1)).sum(axis=1)
        return found


def _size(consumer: Consumer) -> int:
    return tensor_of(consumer.weight).size


def _size_obstacle(consumer: Consumer) -> str | None:
    size = _size(consumer)
    return f"over {size} weights, more than {MAX_WEIGHTS}" if size > MAX_WEIGHTS else None

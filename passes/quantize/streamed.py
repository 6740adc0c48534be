"""Scales and levels of weights that are read some rows at a time: no weight is in memory whole but as int8."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnx_lathe.passes import files
from onnx_lathe.passes.quantize import params
from onnx_lathe.runtime import providers
from onnx_lathe.runtime.samples import Array

T = TypeVar("T")

_LEAST_ROWS = 64
"""Rows for which starting a thread is worth it."""


def largest_magnitudes(tensor: ir.TensorProtocol, axis: int) -> NDArray[np.float32]:
    """Return ``max|w|`` of each slice along ``axis`` of a stored float tensor, ``float32 [channels]``.

    A slice with NaN or infinity in it has that magnitude.
    """
    shape = tensor.shape.numpy()

    def part(start: int, stop: int) -> NDArray[np.float32]:
        found = np.zeros(stop - start if axis == 0 else shape[axis], np.float32)
        for first, rows in files.rows(tensor, start, stop):
            magnitudes = np.abs(rows)
            others = tuple(i for i in range(rows.ndim) if i != axis)
            chunk = magnitudes.max(axis=others).astype(np.float32)
            if axis == 0:
                found[first - start : first - start + len(rows)] = chunk
            else:
                np.maximum(found, chunk, out=found)
        return found

    parts = in_parallel(part, shape[0], _LEAST_ROWS)
    return np.concatenate(parts) if axis == 0 else np.maximum.reduce(parts)


def quantized(
    tensor: ir.TensorProtocol, scales: NDArray[np.float32], axis: int, limit: int, alpha: float = 1.0
) -> NDArray[np.int8]:
    """Return the levels ``clamp(round(alpha w / scale))`` of a stored float tensor, int8 of its shape.

    Args:
        tensor: The stored values.
        scales: ``float32 [channels]`` along ``axis``, or ``[]``.
        axis: The axis of the stored values that runs over output channels.
        limit: The largest level.
        alpha: A factor on the values.
    """
    shape = tensor.shape.numpy()
    levels = np.empty(shape, np.int8)
    factors = params.along(scales, axis, len(shape))
    for first, rows in files.rows(tensor, 0, shape[0]):
        values = rows.astype(np.float32, copy=False)
        if alpha != 1.0:
            values = values * np.float32(alpha)
        here = factors[first : first + len(rows)] if scales.ndim and axis == 0 else factors
        exact = np.divide(values, here)
        np.rint(exact, out=exact)
        np.clip(exact, -limit, limit, out=exact)
        np.copyto(levels[first : first + len(rows)], exact, casting="unsafe")
    return levels


def transposed(matrix: Array) -> Array:
    """Return ``matrix.T`` in memory order, in tiles that fit the nearest cache."""
    result = np.empty(matrix.shape[::-1], matrix.dtype)
    tile = 256
    for row in range(0, matrix.shape[0], tile):
        for column in range(0, matrix.shape[1], tile):
            block = matrix[row : row + tile, column : column + tile]
            result[column : column + tile, row : row + tile] = block.T
    return result


def in_parallel(part: Callable[[int, int], T], count: int, least: int = 1) -> list[T]:
    """Return what ``part`` returns of even ranges of ``0 .. count``; numpy leaves the other threads alone meanwhile.

    Args:
        part: Given the first of a range, and one behind its last.
        count: How many there are.
        least: For how many a thread is worth starting.
    """
    threads = max(1, min(providers.default_threads(), count // least))
    bounds = [count * number // threads for number in range(threads + 1)]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(part, bounds[:-1], bounds[1:]))

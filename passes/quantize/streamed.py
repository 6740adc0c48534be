"""Scales and levels of weights that are read some rows at a time: no weight is in memory whole but as int8."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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

WRITTEN_BYTES = 2**20
"""Bytes of levels that are handed on together: threads that write to one file wait for each other at each write."""
_LEAST_ROWS = 64
"""Rows for which starting a thread is worth it."""


def largest_magnitudes(tensor: ir.TensorProtocol, axis: int) -> NDArray[np.float32]:
    """Return ``max|w|`` of each slice along ``axis`` of a stored float tensor, ``float32 [channels]``.

    A slice with NaN or infinity in it has that magnitude.
    """
    shape = tensor.shape.numpy()

    def part(start: int, stop: int) -> NDArray[np.float32]:
        found = np.zeros(stop - start if axis == 0 else shape[axis], np.float32)
        magnitudes: Array | None = None
        for first, rows in files.rows(tensor, start, stop):
            # One buffer: memory that is asked for anew at each turn is mapped anew at each turn.
            magnitudes = np.empty_like(rows, order="C") if magnitudes is None else magnitudes
            others = tuple(i for i in range(rows.ndim) if i != axis)
            chunk = np.abs(rows, out=magnitudes[: len(rows)]).max(axis=others).astype(np.float32)
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
    levels, done = np.empty(tensor.shape.numpy(), np.int8), 0
    for part in quantized_rows(tensor, scales, axis, limit, alpha):
        levels[done : done + len(part)] = part
        done += len(part)
    return levels


def quantized_rows(
    tensor: ir.TensorProtocol, scales: NDArray[np.float32], axis: int, limit: int, alpha: float = 1.0
) -> Iterator[NDArray[np.int8]]:
    """Yield what `quantized` returns, some rows at a time; each part is good until the next is asked for."""
    shape = tensor.shape.numpy()
    factors = params.along(scales, axis, len(shape))
    exact = levels = None
    filled = 0
    for first, rows in files.rows(tensor, 0, shape[0]):
        if exact is None or levels is None:
            exact = np.empty(rows.shape, np.float32)
            gathered = min(shape[0], len(rows) * max(1, WRITTEN_BYTES // max(1, rows.size)))
            levels = np.empty((gathered, *shape[1:]), np.int8)
        if filled + len(rows) > len(levels):
            yield levels[:filled]
            filled = 0
        here = factors[first : first + len(rows)] if scales.ndim and axis == 0 else factors
        found, part = exact[: len(rows)], levels[filled : filled + len(rows)]
        if alpha != 1.0:
            rows = np.multiply(rows, np.float32(alpha), out=found, dtype=np.float32)
        np.divide(rows, here, out=found, dtype=np.float32)
        np.rint(found, out=found)
        np.clip(found, -limit, limit, out=found)
        np.copyto(part, found, casting="unsafe")
        filled += len(rows)
    if levels is not None:
        yield levels[:filled]


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

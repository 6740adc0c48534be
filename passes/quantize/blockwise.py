"""Weights rounded block by block: scales, zero points, levels, and how they are packed. Pure numpy.

``w_hat = scale (q - zero)`` with ``q = clamp(round(w / scale) + zero, 0, 2^bits - 1)``, one scale and one zero point
for each run of inputs of one output. Kernels take ``values`` whose blocks run along ``axis``, so that both orders in
which weights are stored take the same code: ``[outputs, blocks, inputs of a block]`` with axis 2, or ``[blocks, inputs
of a block, outputs]`` with axis 1. Statistics of blocks keep that axis with size 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from onnx_lathe.passes.quantize.params import MIN_SCALE
from onnx_lathe.runtime.samples import Array

BlockSize = Literal[16, 32, 64, 128, 256]
BlockBits = Literal[4, 8]
Floats = NDArray[np.float32]
Grid = tuple[Floats, Floats]
"""Scales and zero points. Zero points are whole numbers: onnxruntime multiplies by others only after it has made the
weight real again on every run (measured: 80 times as long at 4 bits; at 8 bits it refuses)."""

_ROUNDS = 20
_NORM = 0.7
_BETA = 10.0
_KAPPA = 1.01
"""HQQ's constants, as its authors chose them: rounds, the p of the norm, the penalty's first weight and its growth."""
_TINY = np.float32(1e-8)


@dataclass(frozen=True)
class BlockScheme:
    """How weights are rounded, block by block.

    Attributes:
        bits: Of a level.
        size: Inputs of a block.
        symmetric: Whether the zero point is the middle level instead of one that fits the block.
        power_of_two: Whether scales are powers of two.
    """

    bits: BlockBits
    size: int
    symmetric: bool = False
    power_of_two: bool = False

    @property
    def top(self) -> int:
        """The largest level; the least is 0."""
        return int(2**self.bits - 1)

    @property
    def middle(self) -> int:
        """The zero point of symmetric blocks."""
        return int(2 ** (self.bits - 1))

    def blocks(self, inputs: int) -> int:
        """Return how many blocks ``inputs`` take; the last may be shorter."""
        return -(-inputs // self.size)

    def bytes_of(self, levels: int) -> int:
        """Return how many bytes so many packed levels take."""
        return -(-levels * self.bits // 8)


def reduce(ufunc: np.ufunc, values: Floats, axis: int) -> Floats:
    """Return ``ufunc.reduce`` along ``axis``, which keeps size 1."""
    if axis == values.ndim - 1 and values.flags.c_contiguous:
        # Short rows in memory order: one call for all of them takes a third of the time.
        starts = np.arange(0, values.size, values.shape[-1], dtype=np.intp)
        return ufunc.reduceat(values.reshape(-1), starts).reshape(*values.shape[:-1], 1)
    return ufunc.reduce(values, axis=axis, keepdims=True)


def nearest_grid(values: Floats, axis: int, scheme: BlockScheme) -> Grid:
    """Return the narrowest levels that cover each block; 0.0 is always one of them.

    ``scale = (max - min) / top`` and ``zero = round(-min / scale)``, or symmetric ``scale = max|w| / (middle - 1)`` and
    ``zero = middle``. A block of zeros has scale 1.
    """
    low = np.minimum(reduce(np.minimum, values, axis), np.float32(0.0))
    high = np.maximum(reduce(np.maximum, values, axis), np.float32(0.0))
    if scheme.symmetric:
        scales = _usable(np.maximum(high, -low).astype(np.float64) / (scheme.middle - 1), scheme)
        return scales, np.full_like(scales, scheme.middle)
    scales = _usable((high.astype(np.float64) - low) / scheme.top, scheme)
    return scales, np.clip(np.rint(-low / scales), 0, scheme.top).astype(np.float32)


def levels(values: Floats, grid: Grid, top: int, out: Floats | None = None) -> Floats:
    """Return the levels of ``values``, whole numbers in float32; ``out`` may be ``values``."""
    scales, zeros = grid
    exact = np.divide(values, scales, out=out)
    np.rint(exact, out=exact)
    np.add(exact, zeros, out=exact)
    return np.clip(exact, 0, top, out=exact)


def dequantize(found: Array, grid: Grid) -> Floats:
    """Return the real numbers ``scale (q - zero)`` that levels stand for."""
    scales, zeros = grid
    return np.multiply(scales, np.subtract(found, zeros, dtype=np.float32))


def half_quadratic_grid(values: Floats, axis: int, scheme: BlockScheme) -> Grid:
    """Return the levels of Half-Quadratic Quantization, which needs no data; never worse than `nearest_grid`.

    Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models" (2023): minimise
    ``|W - W_hat|_p^p``, p < 1, by turns. A sparse ``W_e = shrink_p(W - W_hat)`` takes up large errors, so that outliers
    do not decide; then ``z = mean(W_q - (W - W_e) / s)``. Their zero points are real numbers; as whole ones they would
    never leave where they start, so that the scale is fitted too, by the same least squares:
    ``s = <W - W_e, W_q - z> / <W_q - z, W_q - z>``. All is counted in steps of the first grid, so that the weights may
    be of any size, and each block keeps the grid of its least squared error.
    """
    steps, zeros = nearest_grid(values, axis, scheme)
    values = values / steps
    grid = best = (np.ones_like(steps), zeros)
    least = np.full_like(steps, np.inf)
    for number in range(_ROUNDS + 1):
        found = levels(values, grid, scheme.top)
        error = np.subtract(values, dequantize(found, grid))
        squares = reduce(np.add, np.square(error), axis)
        better = squares < least
        least = np.where(better, squares, least)
        best = (np.where(better, grid[0], best[0]), np.where(better, grid[1], best[1]))
        if number < _ROUNDS:
            grid = _fitted(found, values - _shrink(error, _BETA * _KAPPA**number), grid, axis, scheme)
    return np.maximum(steps * best[0], np.float32(MIN_SCALE)), best[1]


def packed(found: NDArray[np.uint8], bits: BlockBits) -> NDArray[np.uint8]:
    """Return levels as MatMulNBits reads them, two of 4 bits in a byte along the last axis, the first in the low half.

    An odd number of levels is filled up with 0.
    """
    if bits == 8:
        return found
    if found.shape[-1] % 2:
        found = np.concatenate([found, np.zeros_like(found[..., :1])], axis=-1)
    pairs = np.ascontiguousarray(found).view("<u2")
    return (pairs | (pairs >> np.uint16(4))).astype(np.uint8)


def unpacked(stored: NDArray[np.uint8], bits: BlockBits, count: int) -> NDArray[np.uint8]:
    """Return the ``count`` levels along the last axis that `packed` stored."""
    if bits == 8:
        return stored[..., :count]
    both = np.stack([stored & np.uint8(15), stored >> np.uint8(4)], axis=-1)
    return both.reshape(*stored.shape[:-1], -1)[..., :count]


FindGrid = Callable[[Floats, int, BlockScheme], Grid]
"""`nearest_grid` or `half_quadratic_grid`."""


def _usable(steps: NDArray[np.float64], scheme: BlockScheme) -> Floats:
    """Return steps as scales: 1 instead of 0, and none so small that products with it are not normal numbers."""
    scales = np.where(steps == 0.0, 1.0, np.maximum(steps, MIN_SCALE))
    return (np.exp2(np.ceil(np.log2(scales))) if scheme.power_of_two else scales).astype(np.float32)


def _shrink(error: Floats, beta: float) -> Floats:
    """Return ``sign(x) max(|x| - |x|^(p - 1) / beta, 0)``, the proximal operator of the norm (their eq. 7)."""
    size = np.abs(error)
    threshold = np.power(size + _TINY, np.float32(_NORM - 1.0)) * np.float32(1.0 / beta)
    return np.copysign(np.maximum(size - threshold, np.float32(0.0)), error)


def _fitted(found: Floats, sought: Floats, grid: Grid, axis: int, scheme: BlockScheme) -> Grid:
    """Return the grid by which the levels ``found`` come nearest to ``sought``: the zero point, then the scale."""
    scales, zeros = grid
    if not scheme.symmetric:
        total = reduce(np.add, np.subtract(found, sought / scales), axis)
        zeros = np.clip(np.rint(total / np.float32(found.shape[axis])), 0, scheme.top)
    distance = np.subtract(found, zeros)
    energy = reduce(np.add, np.square(distance), axis)
    product = reduce(np.add, np.multiply(distance, sought), axis)
    # Where the levels say nothing of the scale, or turned round, it stays.
    steps = np.divide(np.where(product > 0.0, product, scales), np.where(product > 0.0, energy, np.float32(1.0)))
    if not scheme.power_of_two:
        return steps, zeros
    # Rounded down, as the first grid was rounded up; what lies in the middle of the levels stays there.
    steps = np.exp2(np.floor(np.log2(steps)))
    if not scheme.symmetric:
        middle = np.float32(scheme.top / 2)
        zeros = np.clip(np.rint(middle - (middle - zeros) * (scales / steps)), 0, scheme.top)
    return steps, zeros

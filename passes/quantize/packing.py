"""Whole weights as MatMulNBits reads them, rounded some blocks at a time: no weight is in memory as float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from threading import Lock

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnx_lathe.passes import files
from onnx_lathe.passes.quantize.blockwise import (
    BlockScheme,
    FindGrid,
    Floats,
    Grid,
    dequantize,
    levels,
    packed,
    unpacked,
)
from onnx_lathe.passes.quantize.streamed import in_parallel
from onnx_lathe.runtime.samples import Array

SLAB_BYTES = 2**21
"""Bytes of rows that are gathered to whole blocks, where blocks run across rows."""
TILE_BYTES = 2**19
"""Bytes that are rounded together: with what is computed from them they fit the cache of a core."""

Levels = NDArray[np.uint8]


@dataclass(frozen=True)
class Packed:
    """A weight as MatMulNBits reads it.

    Attributes:
        levels: ``uint8 [outputs, blocks, bytes of a block]``.
        scales: ``float32 [outputs, blocks]``.
        zeros: ``uint8 [outputs, bytes of the zero points of an output]``.
    """

    levels: Levels
    scales: Floats
    zeros: Levels

    def rows(self, chosen: NDArray[np.int64], scheme: BlockScheme, inputs: int) -> Floats:
        """Return the real weights of some outputs, ``[chosen, inputs]``."""
        zeros = unpacked(self.zeros[chosen], scheme.bits, self.scales.shape[1])[..., None].astype(np.float32)
        found = unpacked(self.levels[chosen], scheme.bits, scheme.size)
        return dequantize(found, (self.scales[chosen, :, None], zeros)).reshape(len(chosen), -1)[:, :inputs]


class Packing:
    """Takes blocks in any order until a weight is whole.

    Args:
        scheme: How weights are rounded.
        outputs: Of the layer.
        inputs: Of the layer; where the last block is not full, the rest of its levels is 0.
    """

    def __init__(self, scheme: BlockScheme, outputs: int, inputs: int) -> None:
        self._scheme = scheme
        blocks = scheme.blocks(inputs)
        self._levels = np.zeros((outputs, blocks, scheme.bytes_of(scheme.size)), np.uint8)
        self._scales = np.empty((outputs, blocks), np.float32)
        self._zeros = np.empty((outputs, blocks), np.uint8)

    def place(self, output: int, block: int, found: Levels, grid: Grid) -> None:
        """Put blocks at ``(output, block)``.

        Args:
            output: The first output.
            block: The first block.
            found: Levels, ``[outputs, blocks, inputs of a block]``.
            grid: Scales and zero points, ``[outputs, blocks]`` each.
        """
        outputs, blocks, _ = found.shape
        here = np.s_[output : output + outputs, block : block + blocks]
        stored = packed(found, self._scheme.bits)
        self._levels[here][..., : stored.shape[-1]] = stored
        self._scales[here], self._zeros[here] = grid

    def done(self) -> Packed:
        """Return the weight."""
        return Packed(self._levels, self._scales, packed(self._zeros, self._scheme.bits))


def pack(tensor: ir.TensorProtocol, output_axis: int, scheme: BlockScheme, find_grid: FindGrid) -> Packed:
    """Round a stored float matrix.

    Args:
        tensor: ``[inputs, outputs]`` or ``[outputs, inputs]``.
        output_axis: Which of its axes runs over outputs.
        scheme: How weights are rounded.
        find_grid: Chooses the scales and zero points of blocks.
    """
    shape = tensor.shape.numpy()
    outputs, inputs = shape[output_axis], shape[1 - output_axis]
    packing = Packing(scheme, outputs, inputs)

    def rows_of_outputs(start: int, stop: int) -> None:
        for first, rows in files.rows(tensor, start, stop):
            _round_rows(packing, first, rows, scheme, find_grid)

    def rows_of_inputs(start: int, stop: int) -> None:
        for block, slab in _slabs(tensor, start, stop, scheme):
            _round_slab(packing, block, slab, scheme, find_grid)

    if output_axis == 0:
        in_parallel(rows_of_outputs, outputs)
    else:
        in_parallel(rows_of_inputs, scheme.blocks(inputs))
    return packing.done()


def columns(tensor: ir.TensorProtocol, output_axis: int, first: int, last: int) -> Floats:
    """Return the weights of outputs ``first .. last`` of a stored float matrix, ``[inputs, last - first]``."""
    if output_axis == 0:
        return np.concatenate([rows.copy() for _, rows in files.rows(tensor, first, last)]).T.copy()
    inputs = tensor.shape.numpy()[0]
    return np.concatenate([rows[:, first:last].copy() for _, rows in files.rows(tensor, 0, inputs)])


class Together:
    """Arrays that are computed together when the first is asked for, and each forgotten once it was given.

    Args:
        compute: Returns them all.
    """

    def __init__(self, compute: Callable[[], Sequence[Array]]) -> None:
        self._compute = compute
        self._lock = Lock()
        self._held: dict[int, Array] = {}

    def take(self, index: int) -> Array:
        """Return one of the arrays; asked for again it is computed again."""
        with self._lock:
            if index not in self._held:
                self._held = dict(enumerate(self._compute()))
            return self._held.pop(index)


def _slabs(tensor: ir.TensorProtocol, start: int, stop: int, scheme: BlockScheme) -> Iterator[tuple[int, Array]]:
    """Yield the rows of blocks ``start .. stop``, whole blocks together, each time with the first block."""
    rows_count, columns_count = tensor.shape.numpy()
    row_bytes = columns_count * tensor.dtype.itemsize
    step = max(1, int(SLAB_BYTES // (scheme.size * row_bytes)))
    buffer = np.empty((min(step, stop - start) * scheme.size, columns_count), tensor.dtype.numpy())
    for block in range(start, stop, step):
        first, last = block * scheme.size, min(min(block + step, stop) * scheme.size, rows_count)
        for row, rows in files.rows(tensor, first, last):
            buffer[row - first : row - first + len(rows)] = rows
        yield block, buffer[: last - first]


def _round_rows(packing: Packing, output: int, rows: Array, scheme: BlockScheme, find_grid: FindGrid) -> None:
    """Round rows of inputs, ``[outputs, inputs]``."""
    for block, count, size in _whole_and_rest(rows.shape[1], scheme.size):
        start = block * scheme.size
        values = rows[:, start : start + count * size].reshape(len(rows), count, size)
        grid = find_grid(values, 2, scheme)
        found = levels(values, grid, scheme.top).astype(np.uint8)
        packing.place(output, block, found, (grid[0][..., 0], grid[1][..., 0]))


def _round_slab(packing: Packing, first: int, slab: Array, scheme: BlockScheme, find_grid: FindGrid) -> None:
    """Round rows of outputs, ``[inputs, outputs]``, which begin at block ``first``."""
    outputs = slab.shape[1]
    width = max(1, TILE_BYTES // (scheme.size * 4))
    step = max(1, width // outputs)
    for block, count, size in _whole_and_rest(len(slab), scheme.size):
        start = block * scheme.size
        blocks = slab[start : start + count * size].reshape(count, size, outputs)
        for above in range(0, count, step):
            for output in range(0, outputs, width):
                values = blocks[above : above + step, :, output : output + width]
                grid = find_grid(values, 1, scheme)
                found = levels(values, grid, scheme.top).astype(np.uint8)
                across = np.ascontiguousarray(found.transpose(2, 0, 1))
                packing.place(output, first + block + above, across, (grid[0][:, 0].T, grid[1][:, 0].T))


def _whole_and_rest(inputs: int, size: int) -> Iterator[tuple[int, int, int]]:
    """Yield the first block, the number and the size of whole blocks, and of the rest that is none."""
    whole, rest = divmod(inputs, size)
    if whole:
        yield 0, whole, size
    if rest:
        yield whole, 1, rest

"""The distribution of a tensor's values, counted batch by batch in memory of fixed size. Pure numpy."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from onnx_lathe.runtime.samples import Array

BINS_A_SIDE = 4096
"""Bins on each side of zero; the largest magnitude lies in the outer half, so its side has at least 2048 in use."""
_CHUNK = 2**15
"""Elements that are binned at once: the temporary arrays fit the cache of a core."""
_READ = 2**17
"""Elements that are read at once: they fit the cache of a core."""
_ONE = np.int64(1)


class Extremes:
    """The least and the largest of a tensor's values, batch by batch.

    Attributes:
        low: The least value, float32; infinity before the first.
        high: The largest value, float32; minus infinity before the first.
    """

    def __init__(self) -> None:
        self.low = math.inf
        self.high = -math.inf

    @property
    def ends(self) -> tuple[float, float] | None:
        """The least and the largest value; None before the first."""
        return None if self.low > self.high else (self.low, self.high)

    def update(self, values: Array, part: Array | None = None) -> bool:
        """Take in ``values``, floats of any shape; False, and nothing is taken in, where one is not finite."""
        del part
        if values.size == 0:
            return True
        # Chunk by chunk, so that the second of the two reads finds what the first brought; NaN where a value is.
        flat = values.reshape(-1)
        chunks = [flat[start : start + _READ] for start in range(0, flat.size, _READ)]
        ends = np.array([(chunk.min(), chunk.max()) for chunk in chunks], np.float64)
        low, high = float(ends[:, 0].min()), float(ends[:, 1].max())
        if not (math.isfinite(low) and math.isfinite(high)):
            return False
        self.low, self.high = min(self.low, low), max(self.high, high)
        return True


class Histogram(Extremes):
    """The distribution of a tensor's values, counted batch by batch.

    Bins are ``[i w, (i + 1) w)`` with a width ``w`` that is a power of two, so that an index is exact and two
    neighbours merge exactly into one bin of twice the width. The width depends on nothing but the largest magnitude
    seen, so that streaming in any order and in any batches gives the counts that all values at once give.

    Attributes:
        counts: ``int64 [2 * BINS_A_SIDE]``; bin ``BINS_A_SIDE`` begins at zero.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: NDArray[np.int64] = np.zeros(2 * BINS_A_SIDE, np.int64)
        self._exponent: int | None = None

    @property
    def width(self) -> float:
        """The width of a bin; 0.0 while all values are zero."""
        return 0.0 if self._exponent is None else math.ldexp(1.0, self._exponent)

    @property
    def used(self) -> slice:
        """The bins from the first that counts a value to the last, and one on each side."""
        found = np.flatnonzero(self.counts)
        return slice(0, 0) if found.size == 0 else slice(max(0, int(found[0]) - 1), int(found[-1]) + 2)

    def centers(self) -> NDArray[np.float64]:
        """Return the middle of each bin."""
        return (np.arange(-BINS_A_SIDE, BINS_A_SIDE, dtype=np.float64) + 0.5) * self.width

    def update(self, values: Array, part: Array | None = None) -> bool:
        """Count ``values``, floats of any shape; False, and none is counted, where one is not finite.

        Args:
            values: The values, of which the least and the largest are taken.
            part: Those of them that are counted; None for all.
        """
        if not super().update(values):
            return False
        if values.size:
            self._widen(max(-self.low, self.high, 0.0))
            flat = (values if part is None else part).reshape(-1)
            for start in range(0, flat.size, _CHUNK):
                self._count(flat[start : start + _CHUNK])
        return True

    def _count(self, chunk: Array) -> None:
        if self._exponent is None:
            self.counts[BINS_A_SIDE] += chunk.size
            return
        # A finite factor of at least 1 is exact in float32; a smaller one could round what is tiny to zero.
        exact = chunk.dtype == np.float32 and -127 <= self._exponent <= 0
        dtype = np.float32 if exact else np.float64
        scaled = np.multiply(chunk, dtype(math.ldexp(1.0, -self._exponent)), dtype=dtype)
        if self.low < 0.0:
            np.floor(scaled, out=scaled)
        # The conversion cuts off fractions; by way of int32, to which processors convert floats several at a time.
        index = scaled.astype(np.int32).astype(np.intp)
        index += BINS_A_SIDE
        np.add.at(self.counts, index, _ONE)

    def _widen(self, largest: float) -> None:
        """Merge neighbours until ``largest`` fits."""
        if largest == 0.0:
            return
        # frexp: 2^(needed - 1) <= largest / BINS_A_SIDE < 2^needed.
        _, needed = math.frexp(largest / BINS_A_SIDE)
        if self._exponent is None:
            self._exponent = needed
        for _ in range(needed - self._exponent):
            merged = self.counts.reshape(-1, 2).sum(axis=1)
            self.counts[:] = 0
            self.counts[BINS_A_SIDE // 2 : BINS_A_SIDE // 2 + BINS_A_SIDE] = merged
        self._exponent = max(self._exponent, needed)

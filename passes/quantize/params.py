"""From ranges to scales and zero points, and from real numbers to integers. Pure numpy.

Formulas: Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference"
(2018), eq. 1 (affine) and section 2.4 (bias scale = input scale x weight scale).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from onnx_lathe.passes.quantize.histogram import BINS_A_SIDE, Extremes, Histogram
from onnx_lathe.passes.quantize.scheme import Affine, Ranges, WeightScheme
from onnx_lathe.runtime.samples import Array

LEVELS = 256
"""Levels of uint8."""
UNSIGNED_ZERO = 128
"""The zero point of weights that are stored as uint8."""
MIN_SCALE = 2.0**-60
"""The least scale: the product of two of them is a normal float32."""
MAX_BIAS = 2**30
"""The largest magnitude of an int32 bias; the other half of the range is left to the sum of products."""
_CLIPS = 100
"""Clips that "mse" and "kl" compare."""
_LEAST_KL_SHARE = 1 / 16
"""The tightest clip that "kl" tries: with hardly more bins than levels inside, any clip would look perfect."""

Range = tuple[float, float]


def choose_range(seen: Extremes, ranges: Ranges, percentile: float) -> Range:
    """Return the range of real numbers that the levels shall cover; 0.0 is in it.

    "minmax" covers all values. "percentile" leaves out ``(100 - percentile) / 2`` percent at each end. "mse" is the
    clip with the least squared rounding error. "kl" is the clip whose rounded distribution is nearest to the clipped
    one (Migacz, "8-bit Inference with TensorRT", 2017: clip, tail to the last bin, merge to the levels).

    Args:
        seen: The values seen, counted (a `Histogram`) unless ``ranges`` is "minmax".
        ranges: The method.
        percentile: In 0..100; only "percentile" uses it.
    """
    low, high = min(seen.low, 0.0), max(seen.high, 0.0)
    if ranges == "minmax":
        return (low, high)
    assert isinstance(seen, Histogram), f"{ranges} needs the values counted"
    if seen.width == 0.0:
        return (low, high)
    if ranges == "percentile":
        return _percentile(seen, percentile)
    largest = max(-low, high)
    shares = np.arange(1, _CLIPS + 1) / _CLIPS
    clips = [(max(low, -share * largest), min(high, share * largest)) for share in shares]
    bins = _Bins.of(seen)
    if ranges == "mse":
        errors = [bins.squared_error(clip) for clip in clips]
        return clips[int(np.argmin(errors))]
    wide = [clip for clip, share in zip(clips, shares, strict=True) if share >= _LEAST_KL_SHARE]
    return wide[int(np.argmin([bins.divergence(clip) for clip in wide]))]


def activation(low: float, high: float, *, power_of_two: bool = False) -> Affine:
    """Return the levels of a uint8 tensor with values in ``low..high``; 0.0 is always a level.

    ``scale = (high - low) / 255``, ``zero_point = round(-low / scale)`` with the range widened to hold 0.0. A range of
    nothing but zero has scale 1.
    """
    low, high = min(low, 0.0), max(high, 0.0)
    if low == high:
        return Affine(1.0, 0)
    if power_of_two:
        scale = np.float32(_power_of_two(max((high - low) / (LEVELS - 1), MIN_SCALE)))
    else:
        scale = np.float32(max((high - low) / (LEVELS - 1), MIN_SCALE))
        # The largest level must not lie above the bound of a Clip by rounding: the Clip would not be redundant.
        if low == 0.0 and scale * np.float32(LEVELS - 1) > high:
            scale = np.nextafter(scale, np.float32(0.0))
    return Affine(float(scale), int(np.clip(np.rint(-low / float(scale)), 0, LEVELS - 1)))


def weight_scales(
    weight: Array, axis: int, scheme: WeightScheme, floor: NDArray[np.float64] | float = 0.0
) -> NDArray[np.float32]:
    """Return ``max|w| / limit`` for each slice along ``axis`` (``[channels]``), or of the whole tensor (``[]``).

    A slice of zeros has scale 1. Scales are at least `MIN_SCALE` and ``floor`` (a number for each channel). A scheme
    with an exponent has that scale alone, ``[]``, floor or not.
    """
    others = tuple(i for i in range(weight.ndim) if i != axis % weight.ndim)
    return scales_of(np.maximum(weight.max(axis=others), -weight.min(axis=others)), scheme, floor)


def scales_of(largest: Array, scheme: WeightScheme, floor: NDArray[np.float64] | float = 0.0) -> NDArray[np.float32]:
    """Return what `weight_scales` does, of the largest magnitude of each slice, ``[channels]``."""
    if scheme.exponent is not None:
        return np.asarray(math.ldexp(1.0, scheme.exponent), np.float32)
    scales = np.maximum(largest.astype(np.float64) / scheme.limit, floor)
    if not scheme.per_channel:
        scales = np.max(scales)
    scales = np.where(scales == 0.0, 1.0, np.maximum(scales, MIN_SCALE))
    if scheme.power_of_two:
        scales = np.exp2(np.ceil(np.log2(scales)))
    return scales.astype(np.float32)


def bias_floor(bias: Array, input_scale: float) -> NDArray[np.float64]:
    """Return the least weight scales with which ``bias`` (``[channels]``) fits in an int32."""
    return np.abs(bias.astype(np.float64)) / (input_scale * MAX_BIAS)


def quantize_weight(weight: Array, scales: NDArray[np.float32], axis: int, scheme: WeightScheme) -> NDArray[np.int8]:
    """Return the levels of ``weight`` (float32), int8 of the same shape."""
    levels = weight / along(scales, axis, weight.ndim)
    np.rint(levels, out=levels)
    np.clip(levels, -scheme.limit, scheme.limit, out=levels)
    return levels.astype(np.int8)


def as_unsigned(levels: NDArray[np.int8]) -> NDArray[np.uint8]:
    """Return the levels with zero point `UNSIGNED_ZERO` that stand for the same numbers."""
    return levels.view(np.uint8) ^ np.uint8(UNSIGNED_ZERO)


def bias_scales(input_scale: float, scales: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return ``input_scale * scales`` as float32 arithmetic has it: integer kernels take no other bias scale."""
    return np.float32(input_scale) * scales


def quantize_bias(bias: Array, scales: NDArray[np.float32]) -> NDArray[np.int32]:
    """Return the levels of ``bias`` (``[channels]``) at ``scales`` (``[channels]`` or ``[]``)."""
    return np.rint(bias.astype(np.float64) / scales.astype(np.float64)).astype(np.int32)


def along(vector: Array, axis: int, rank: int) -> Array:
    """Return ``vector`` shaped to broadcast along ``axis`` of a tensor of ``rank`` dimensions; a scalar stays one."""
    if vector.ndim == 0:
        return vector
    shape = [1] * rank
    shape[axis] = -1
    return vector.reshape(shape)


def _power_of_two(scale: float) -> float:
    return math.ldexp(1.0, math.ceil(math.log2(scale)))


def _percentile(histogram: Histogram, percentile: float) -> Range:
    share = np.cumsum(histogram.counts) / histogram.counts.sum()
    tail = (1.0 - percentile / 100.0) / 2.0
    centers = histogram.centers()
    low = centers[int(np.searchsorted(share, tail, side="right"))] - histogram.width / 2
    high = centers[int(np.searchsorted(share, 1.0 - tail))] + histogram.width / 2
    return min(max(float(low), histogram.low), 0.0), max(min(float(high), histogram.high), 0.0)


@dataclass(frozen=True)
class _Bins:
    """The bins of a histogram that count something.

    Attributes:
        counts: ``int64 [bins]``.
        centers: The middle of each.
        width: Of each.
        zero: Which of them begins at zero; it may lie outside.
    """

    counts: NDArray[np.int64]
    centers: NDArray[np.float64]
    width: float
    zero: int

    @classmethod
    def of(cls, histogram: Histogram) -> _Bins:
        """Return those of a histogram with values in it."""
        used = histogram.used
        return cls(histogram.counts[used], histogram.centers()[used], histogram.width, BINS_A_SIDE - used.start)

    def squared_error(self, clip: Range) -> float:
        """Return the sum of squared rounding errors with a clip."""
        levels, affine = self._levels(clip)
        rounded = (levels - affine.zero_point) * affine.scale
        return float((self.counts * (self.centers - rounded) ** 2).sum())

    def divergence(self, clip: Range) -> float:
        """Return KL(P || Q): P the clipped distribution, Q what is left of the unclipped part after rounding."""
        levels = self._levels(clip)[0].astype(np.intp)
        counts = self._without_spike
        inside = (self.centers >= clip[0] - self.width) & (self.centers <= clip[1] + self.width)
        positions = np.flatnonzero(inside)
        kept = np.where(inside, counts, 0).astype(np.float64)
        used = kept > 0
        if not used.any():
            return math.inf
        reference = kept.copy()
        reference[positions[0]] += counts[: positions[0]].sum()
        reference[positions[-1]] += counts[positions[-1] + 1 :].sum()
        total = np.bincount(levels, kept, LEVELS)
        share = total / np.maximum(np.bincount(levels[used], minlength=LEVELS), 1)
        model = np.where(used, share[levels], 0.0)
        p, q = reference / reference.sum(), model / model.sum()
        both = p > 0
        return float((p[both] * np.log(p[both] / np.maximum(q[both], 1e-12))).sum())

    @cached_property
    def _without_spike(self) -> NDArray[np.int64]:
        """The counts; but the zeros of a Relu are rounded exactly, and as a spike would hide all other errors."""
        counts = self.counts.copy()
        if 0 <= self.zero < len(counts) - 1:
            counts[self.zero] = counts[self.zero + 1]
        return counts

    def _levels(self, clip: Range) -> tuple[NDArray[np.float64], Affine]:
        """Return the level of each bin."""
        affine = activation(*clip)
        levels = np.divide(self.centers, affine.scale)
        np.rint(levels, out=levels)
        np.add(levels, affine.zero_point, out=levels)
        return np.clip(levels, 0, LEVELS - 1, out=levels), affine

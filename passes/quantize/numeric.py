"""What integer operators must compute, in numpy and float64: the oracle of single operators. Arrays in, arrays out."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from onnx_lathe.runtime.samples import Array

Wide = NDArray[np.float64]


def dequantize(levels: Array, scale: Array, zero_point: Array) -> Wide:
    """Return ``scale * (levels - zero_point)``; ``scale`` and ``zero_point`` broadcast against ``levels``."""
    return (levels.astype(np.float64) - zero_point.astype(np.float64)) * scale.astype(np.float64)


def quantize(values: Wide, scale: Array, zero_point: Array) -> NDArray[np.int64]:
    """Return the uint8 levels of ``values`` (as int64, so that they subtract)."""
    levels = np.rint(values / scale.astype(np.float64)) + zero_point.astype(np.float64)
    return np.clip(levels, 0, 255).astype(np.int64)


def dynamic_quantize(values: Array) -> tuple[NDArray[np.uint8], np.float32, np.uint8]:
    """Return levels, scale and zero point as the ONNX operator DynamicQuantizeLinear defines them, in float32."""
    low = np.minimum(values.min(), np.float32(0.0))
    high = np.maximum(values.max(), np.float32(0.0))
    scale = np.float32((high - low) / np.float32(255.0)) if high > low else np.float32(1.0)
    zero_point = np.rint(np.clip(-low / scale, 0.0, 255.0))
    levels = np.clip(np.rint(values / scale) + zero_point, 0.0, 255.0)
    return levels.astype(np.uint8), scale, np.uint8(zero_point)


def convolve(
    x: Wide, weight: Wide, groups: int, strides: Sequence[int], pads: Sequence[int], dilations: Sequence[int]
) -> Wide:
    """Return the convolution of ``[batch, in, *space]`` with ``[out, in / groups, *kernel]``, for any rank.

    Args:
        x: The input.
        weight: The kernels.
        groups: Parts of the channels, each of which sees itself alone.
        strides: One for each dimension of space.
        pads: Zeros before each dimension of space, then after each.
        dilations: One for each dimension of space.
    """
    rank, kernel = len(strides), weight.shape[2:]
    padded = np.pad(x, [(0, 0), (0, 0), *((pads[i], pads[rank + i]) for i in range(rank))])
    space = [(padded.shape[2 + i] - dilations[i] * (kernel[i] - 1) - 1) // strides[i] + 1 for i in range(rank)]
    batch, (outputs, inputs) = x.shape[0], weight.shape[:2]
    total = np.zeros((groups, outputs // groups, batch * math.prod(space)))
    for offset in np.ndindex(*kernel):
        starts = [offset[i] * dilations[i] for i in range(rank)]
        steps = [slice(starts[i], starts[i] + (space[i] - 1) * strides[i] + 1, strides[i]) for i in range(rank)]
        window = padded[(slice(None), slice(None), *steps)].swapaxes(0, 1)
        taps = weight[(slice(None), slice(None), *offset)]
        total += taps.reshape(groups, -1, inputs) @ window.reshape(groups, inputs, -1)
    return total.reshape(outputs, batch, *space).swapaxes(0, 1)


def same_pads(
    size: Sequence[int], kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int], *, upper: bool
) -> list[int]:
    """Return the pads of ``auto_pad`` SAME_UPPER or SAME_LOWER: before each dimension of space, then after each."""
    before: list[int] = []
    after: list[int] = []
    for n, k, s, d in zip(size, kernel, strides, dilations, strict=True):
        total = max((-(-n // s) - 1) * s + d * (k - 1) + 1 - n, 0)
        small, large = total // 2, total - total // 2
        before.append(small if upper else large)
        after.append(large if upper else small)
    return before + after

"""How far channels are smoothed, and what rounding then costs. Pure numpy.

SmoothQuant (Xiao et al. 2023, arXiv:2211.10438), eq. 4: ``s_j = max|X_j|^a / max|W_j|^(1-a)``; the layers read
``X / s`` and multiply by ``s W``.
"""

from __future__ import annotations

import numpy as np

from onnx_lathe.passes.quantize import params
from onnx_lathe.passes.quantize.scheme import WeightScheme
from onnx_lathe.passes.repair.kernels import Vector
from onnx_lathe.runtime.samples import Array

LIMIT = 1e5
"""The largest divisor, and its inverse the least: float16 ends there."""


def smoothing(inputs: Vector, weights: Vector, alpha: float) -> Vector:
    """Return the divisors of eq. 4, ``[channels]``; 1 where a channel is zero on either side.

    Args:
        inputs: ``max|X_j|``.
        weights: ``max|W_j|`` over all weights that multiply channel j.
        alpha: How much of the difficulty moves into the weights, in 0..1.
    """
    used = (inputs > 0.0) & (weights > 0.0)
    x, w = np.where(used, inputs, 1.0), np.where(used, weights, 1.0)
    return np.clip(x**alpha / w ** (1.0 - alpha), 1.0 / LIMIT, LIMIT)


def rounding_error(rows: Array, weight: Array, low: Vector, high: Vector, s: Vector, scheme: WeightScheme) -> float:
    """Return how far ``X W`` is from the product of rounded ``X / s`` and ``s W``, squared, relative to ``|X W|^2``.

    Args:
        rows: Some of ``X``, ``[rows, inputs]``.
        weight: ``[inputs, outputs]``.
        low: The least value of each input on all samples.
        high: The largest.
        s: The divisors.
        scheme: How weights are rounded; inputs are rounded to uint8, one scale for all.
    """
    affine = params.activation(float((low / s).min()), float((high / s).max()))
    levels = np.clip(np.rint(rows / s / affine.scale) + affine.zero_point, 0, params.LEVELS - 1)
    x = ((levels - affine.zero_point) * affine.scale).astype(np.float32)
    smoothed = (weight * s[:, None]).astype(np.float32)
    scales = params.weight_scales(smoothed, 1, scheme)
    w = params.quantize_weight(smoothed, scales, 1, scheme) * scales
    want = rows @ weight
    return float(np.square(x @ w - want).sum() / max(np.square(want).sum(), np.finfo(np.float64).tiny))

"""Weights on a grid that was given: ``w_hat = 2^k clamp(round(w / 2^k))``, whatever the weights are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from onnx_lathe.passes import files
from onnx_lathe.passes.edit import Refusal
from onnx_lathe.passes.quantize.layers import Layer, not_finite, refusal, result_name
from onnx_lathe.passes.quantize.scheme import WeightScheme
from onnx_lathe.runtime.samples import Array


@dataclass(frozen=True)
class GridFit:
    """How a weight lies on a grid.

    Attributes:
        layer: The result of the operator that reads it.
        weight: The initializer.
        saturated: Share of its entries that lie beyond the largest level and are clamped to it.
        lost: Share of its entries that are not zero and become it.
    """

    layer: str
    weight: str
    saturated: float
    lost: float


def fit_to_grid(
    layers: Sequence[Layer], scheme: WeightScheme
) -> tuple[list[Layer], tuple[GridFit, ...], list[Refusal]]:
    """Return the layers whose weights a given grid can hold, how they lie on it, and what stays float with the reason.

    A scheme without an exponent fits its grid to the weights: then nothing is looked at or refused.

    Raises:
        UnsupportedModelError: A weight is not finite.
    """
    if scheme.exponent is None:
        return list(layers), (), []
    able: list[Layer] = []
    fits: list[GridFit] = []
    refused: list[Refusal] = []
    for layer in layers:
        stored = files.view(layer.weight.tensor).numpy()
        if not _is_finite(stored):
            raise not_finite(layer)
        saturated, kept, entries = _counts(stored, abs(layer.alpha) * 2.0**-scheme.exponent, scheme.limit)
        if kept == 0:
            refused.append(refusal(layer.node, f"all of its weights round to zero at a step of 2^{scheme.exponent}"))
            continue
        able.append(layer)
        shares = saturated / stored.size, (entries - kept) / stored.size
        fits.append(GridFit(result_name(layer.node), layer.weight.tensor.name or "", *shares))
    return able, tuple(fits), refused


def _is_finite(stored: Array) -> bool:
    return all(bool(np.isfinite(block).all()) for block in files.blocks(stored))


def _counts(stored: Array, factor: float, limit: int) -> tuple[int, int, int]:
    """Return how many entries are clamped, how many have a level other than zero, and how many are not zero."""
    saturated = kept = entries = 0
    for part in files.blocks(stored):
        block = part.astype(np.float64)
        levels = np.rint(np.abs(block) * factor)
        saturated += int(np.count_nonzero(levels > limit))
        kept += int(np.count_nonzero(levels))
        entries += int(np.count_nonzero(block))
    return saturated, kept, entries

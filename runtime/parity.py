"""How near two sets of outputs are."""

from __future__ import annotations

import numpy as np

from onnx_lathe.runtime.samples import Array


def relative_error(want: Array, got: Array) -> float:
    """Return ``max|got - want| / max|want|`` over all elements; infinity where shapes or NaNs differ."""
    if want.shape != got.shape or (np.isnan(want) != np.isnan(got)).any():
        return float("inf")
    if want.size == 0:
        return 0.0
    wide_want, wide_got = want.astype(np.float64), got.astype(np.float64)
    same = (wide_want == wide_got) | np.isnan(wide_want)
    difference = float(np.abs(np.where(same, 0.0, wide_got - wide_want)).max())
    finite = np.abs(wide_want[np.isfinite(wide_want)])
    scale = float(finite.max()) if finite.size else 0.0
    return 0.0 if difference == 0.0 else difference / max(scale, float(np.finfo(np.float32).tiny))


def sqnr_db(signal: Array, noisy: Array) -> float:
    """Return ``10 log10(sum signal^2 / sum (signal - noisy)^2)`` in dB; infinity where they are equal."""
    if signal.shape != noisy.shape:
        return float("-inf")
    wide = signal.astype(np.float64)
    noise = float(np.square(wide - noisy.astype(np.float64)).sum())
    if noise == 0.0:
        return float("inf")
    power = float(np.square(wide).sum())
    return float("-inf") if not np.isfinite(noise) or power == 0.0 else float(10.0 * np.log10(power / noise))

"""How far outputs lie from others, batch by batch. Pure numpy.

Signal-to-quantization-noise ratio ``10 log10(sum y^2 / sum (y - y_hat)^2)`` in dB, and the divergence of Kullback and
Leibler ("On Information and Sufficiency", 1951) ``sum p (log p - log p_hat)`` in nats of the distributions that
rows stand for.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from onnx_lathe.runtime.samples import Array

LIMIT_DB = 200.0
"""The ratio of outputs that do not differ; its negative is that of outputs that are not finite any more."""
LARGEST_KL = 1e6
"""The divergence of rows that are not finite any more."""
_LEAST_SHARE = 1e-12
"""Stands for a probability of zero."""


class Difference:
    """How far one output lies from another, over all batches so far.

    Args:
        classes: Whether rows along the last axis are logits or probabilities, whose divergence is wanted too.
    """

    def __init__(self, *, classes: bool) -> None:
        self._classes = classes
        self._signal = self._noise = self._divergence = 0.0
        self._rows = 0

    def update(self, want: Array, got: Array) -> None:
        """Take in a batch: what an output was, and what it is, of one shape."""
        wide, other = want.astype(np.float64), got.astype(np.float64)
        sound = np.isfinite(wide)
        self._signal += float(np.square(wide[sound]).sum())
        self._noise += float(np.square(other[sound] - wide[sound]).sum())
        if self._classes:
            shares, others = _log_shares(wide), _log_shares(other)
            divergence = (np.exp(shares) * (shares - others)).sum(axis=-1)
            self._divergence += float(np.where(np.isfinite(divergence), divergence, LARGEST_KL).sum())
            self._rows += divergence.size

    @property
    def sqnr_db(self) -> float:
        """The signal-to-quantization-noise ratio in dB, within `LIMIT_DB`."""
        if self._noise == 0.0:
            return LIMIT_DB
        if not np.isfinite(self._noise) or self._signal == 0.0:
            return -LIMIT_DB
        return float(np.clip(10.0 * np.log10(self._signal / self._noise), -LIMIT_DB, LIMIT_DB))

    @property
    def kl(self) -> float | None:
        """The mean divergence of a row in nats; None where rows are no distributions."""
        return max(0.0, self._divergence / self._rows) if self._rows else None


def looks_like_classes(name: str, values: Array) -> bool:
    """Say whether the rows of an output are logits or probabilities: its name says so, or they sum to 1."""
    if values.ndim < 2 or values.shape[-1] < 2 or values.size == 0:
        return False
    return any(word in name.lower() for word in ("logit", "prob", "class")) or _are_shares(values)


def _are_shares(values: Array) -> bool:
    return bool(values.min() >= 0) and np.allclose(values.sum(axis=-1), 1.0, atol=1e-3)


def _log_shares(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the logarithms of the probabilities that rows are, or whose logits they are."""
    if _are_shares(values):
        return np.log(np.maximum(values, _LEAST_SHARE))
    with np.errstate(invalid="ignore"):
        shifted = values - values.max(axis=-1, keepdims=True)
        return np.maximum(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)), np.log(_LEAST_SHARE))

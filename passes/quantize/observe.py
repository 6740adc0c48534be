"""What values a network computes on calibration samples."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from onnx_lathe.passes.quantize.histogram import Histogram
from onnx_lathe.passes.taps import tap
from onnx_lathe.runtime.errors import SamplesError
from onnx_lathe.runtime.samples import Samples

BATCH = 8
"""Samples in one calibration run: all observed values of a batch are in memory together."""


def observe(model: ir.Model, names: Sequence[str], samples: Samples) -> dict[str, Histogram]:
    """Return the histogram of each value called ``names`` as ``model`` runs on ``samples``.

    Raises:
        SamplesError: The samples do not fit the model, or a value is not finite on them.
    """
    histograms = {name: Histogram() for name in names}
    for number, values in enumerate(tap(model, names, samples, BATCH)):
        for name, array in values.items():
            if not np.isfinite(array).all():
                raise SamplesError(
                    f"{samples.source}: value {name!r}",
                    got=f"NaN or infinity as the network runs on batch {number} of {BATCH} samples",
                    expected="finite values",
                    mend="Check that the samples are prepared as in training and that the float model is sound.",
                )
            histograms[name].update(array)
    return histograms

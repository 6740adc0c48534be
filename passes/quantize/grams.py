"""Second moments of what layers read, streamed over samples: the data of GPTQ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import onnx_ir as ir

from onnx_lathe.passes.quantize.blockwise import Floats
from onnx_lathe.passes.taps import BATCH, portions, tap
from onnx_lathe.runtime.errors import SamplesError
from onnx_lathe.runtime.samples import Samples

GRAM_BYTES = 2**29
"""Moments that are summed in one pass over the samples; where all take more there are several passes."""
LARGEST = 2.0**50
"""The largest magnitude of a value: the sum of 2^27 squares is still a float32."""


def grams(model: ir.Model, widths: Mapping[str, int], samples: Samples) -> Iterator[tuple[str, Floats]]:
    """Yield the name and ``X'X``, ``float32 [features, features]``, of values as ``model`` runs on ``samples``.

    The rows of ``X`` are the value's last axis, whatever the axes before it. Sums in float32 suffice: GPTQ adds a
    hundredth of the diagonal to it.

    Args:
        model: The graph.
        widths: The values by name, with their features.
        samples: What to run.

    Raises:
        SamplesError: The samples do not fit the model, or a value is not finite on them.
    """
    item = np.dtype(np.float32).itemsize
    for group in portions(widths, lambda name: item * widths[name] ** 2, GRAM_BYTES):
        sums = {name: np.zeros((widths[name], widths[name]), np.float32) for name in group}
        for values in tap(model, group, samples, BATCH):
            for name, array in values.items():
                rows = array.reshape(-1, widths[name])
                if not np.abs(rows).max(initial=0.0) <= LARGEST:
                    raise SamplesError(
                        f"{samples.source}: value {name!r}",
                        got="NaN, infinity or numbers over 2^50 as the network runs",
                        expected="finite values whose squares can be summed",
                        mend="Check that the samples are prepared as in training and that the float model is sound.",
                    )
                sums[name] += rows.T @ rows
        for name in group:
            yield name, sums.pop(name)

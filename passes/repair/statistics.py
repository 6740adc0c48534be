"""What layers read, channel by channel, streamed over samples."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from onnx_lathe.passes.quantize.layers import Layer
from onnx_lathe.passes.repair.kernels import Vector
from onnx_lathe.passes.repair.pairs import begin
from onnx_lathe.passes.taps import BATCH, check_finite, tap
from onnx_lathe.runtime.samples import Array, Samples


@dataclass
class ChannelStatistics:
    """The channels of one value.

    Attributes:
        count: Entries of each channel so far.
        total: Their sum, ``[channels]``.
        low: The least, and at most 0.
        high: The largest, and at least 0.
        kept: Some rows ``[any, channels]``, where any were asked for.
    """

    count: int
    total: Vector
    low: Vector
    high: Vector
    kept: list[Array] = field(default_factory=list[Array])

    @classmethod
    def zeros(cls, channels: int) -> ChannelStatistics:
        """Return the statistics of nothing."""
        return cls(0, np.zeros(channels), np.zeros(channels), np.zeros(channels))

    @property
    def mean(self) -> Vector:
        """The mean of each channel, ``[channels]``."""
        return self.total / max(self.count, 1)

    @property
    def largest(self) -> Vector:
        """The largest magnitude of each channel, ``[channels]``."""
        return np.maximum(-self.low, self.high)

    def rows(self) -> Array:
        """Return the rows that were kept."""
        return np.concatenate(self.kept)

    def add(self, rows: Array, keep: int) -> None:
        """Take in ``rows [any, channels]`` and keep about ``keep`` of them, evenly spread."""
        self.count += len(rows)
        self.total += rows.sum(axis=0, dtype=np.float64)
        np.minimum(self.low, rows.min(axis=0, initial=0.0), out=self.low)
        np.maximum(self.high, rows.max(axis=0, initial=0.0), out=self.high)
        if keep and len(rows):
            self.kept.append(rows[:: math.ceil(len(rows) / keep)].copy())


def input_statistics(
    model: ir.Model, layers: Iterable[Layer], samples: Samples, keep: int = 0
) -> dict[ir.Node, ChannelStatistics]:
    """Return what each layer reads as ``model`` runs on ``samples``, by its node; one value is looked at once.

    Args:
        model: The graph, or one whose values have the same names.
        layers: The readers.
        samples: What to run.
        keep: About how many rows of each value to keep.

    Raises:
        SamplesError: The samples do not fit the model, or a value is not finite on them.
    """
    read = {layer.node: (input_name(layer), begin(layer).axes[0]) for layer in layers}
    found: dict[tuple[str, int], ChannelStatistics] = {}
    share = math.ceil(keep / sum(1 for _ in samples.iter_batches(BATCH)))
    for values in tap(model, list(dict.fromkeys(name for name, _ in read.values())), samples, BATCH):
        for name, axis in dict.fromkeys(read.values()):
            array = np.moveaxis(values[name], axis, -1)
            rows = array.reshape(-1, array.shape[-1])
            check_finite(rows, name, samples)
            found.setdefault((name, axis), ChannelStatistics.zeros(rows.shape[1])).add(rows, share)
    return {node: found[key] for node, key in read.items()}


def input_name(layer: Layer) -> str:
    """Return the name of what a layer reads."""
    value = layer.node.inputs[0]
    assert value is not None, "a layer has an input"
    return value.name or ""

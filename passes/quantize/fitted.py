"""Weights that GPTQ fitted to samples, kept on disk from the plan until the model is written."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from onnx_lathe.passes.quantize import gptq
from onnx_lathe.passes.quantize.blockwise import BlockScheme
from onnx_lathe.passes.quantize.grams import grams
from onnx_lathe.passes.quantize.layers import Layer, result_name
from onnx_lathe.passes.quantize.packing import Packed, Packing, columns
from onnx_lathe.runtime.errors import OutputError
from onnx_lathe.runtime.samples import Samples

COLUMN_BYTES = 2**26
"""Bytes of a weight, as float32, that are fitted together: all inputs of some outputs."""


class Shelf:
    """Packed weights by name, in files that are gone once nothing holds the shelf any more.

    Attributes:
        folder: Where the files are.
    """

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="lathe-fitted-"))
        self._files: dict[str, Path] = {}
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)

    def write(self, name: str, weight: Packed) -> None:
        """Keep a weight.

        Raises:
            OutputError: The disk of temporary files is full.
        """
        self._files[name] = self.folder / f"{len(self._files)}.npz"
        try:
            np.savez(self._files[name], levels=weight.levels, scales=weight.scales, zeros=weight.zeros)
        except OSError as error:
            raise OutputError(
                str(self.folder),
                got=f"no room for the fitted weights ({error.strerror})",
                expected="enough free space for temporary files: a byte or half of one a weight",
                mend="Free some space there, or name another folder for temporary files in TMPDIR.",
            ) from None

    def read(self, name: str) -> Packed:
        """Return a weight."""
        with np.load(self._files[name], allow_pickle=False) as arrays:
            return Packed(arrays["levels"], arrays["scales"], arrays["zeros"])


def fit_to_samples(
    model: ir.Model,
    layers: Sequence[Layer],
    schemes: Mapping[str, BlockScheme],
    samples: Samples,
    *,
    by_activation: bool,
) -> Shelf:
    """Return the weights of layers as GPTQ rounds them, by the names of the layers' results.

    Layers see the inputs that the float network gives them.

    Args:
        model: The graph, which is not changed.
        layers: Of the main graph.
        schemes: How each weight is rounded.
        samples: What the layers read is computed from them.
        by_activation: Whether inputs of large energy are rounded first.

    Raises:
        SamplesError: The samples do not fit the model, or a value is not finite on them.
        OutputError: The disk of temporary files is full.
    """
    readers: dict[str, list[Layer]] = defaultdict(list)
    for layer in layers:
        source = layer.node.inputs[0]
        assert source is not None, "a layer has an input"
        readers[source.name or ""].append(layer)
    widths = {name: found[0].weight.shape[1 - found[0].axis] for name, found in readers.items()}
    shelf = Shelf()
    for name, gram in grams(model, widths, samples):
        order = gptq.order_of(gram, by_activation=by_activation)
        for layer in readers[name]:
            shelf.write(result_name(layer.node), _fit(layer, order, schemes[result_name(layer.node)]))
    return shelf


def _fit(layer: Layer, order: gptq.Order, scheme: BlockScheme) -> Packed:
    """Return the weight of a layer, some outputs after the other: they do not know of each other."""
    inputs, outputs = len(order.inputs), layer.channels
    packing = Packing(scheme, outputs, inputs)
    step = max(1, COLUMN_BYTES // (inputs * 4))
    for first in range(0, outputs, step):
        weight = columns(layer.weight.tensor, layer.stored_axis, first, min(first + step, outputs))
        found, scales, zeros = gptq.solve(weight, order, scheme)
        whole = inputs // scheme.size * scheme.size
        for block, part in ((0, found[:whole]), (whole // scheme.size, found[whole:])):
            if len(part):
                count = max(1, len(part) // scheme.size)
                levels = part.reshape(count, -1, part.shape[1]).transpose(2, 0, 1)
                packing.place(first, block, levels, (scales[block : block + count].T, zeros[block : block + count].T))
    return packing.done()

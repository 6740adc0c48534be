"""Adding quantized constants and operators to a graph, and dropping the float ones that nothing reads any more."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnx_lathe.passes import files
from onnx_lathe.passes.additions import add_initializer, take_free_name
from onnx_lathe.passes.quantize import params, streamed
from onnx_lathe.passes.quantize.layers import Layer, not_finite
from onnx_lathe.passes.quantize.scheme import WeightScheme
from onnx_lathe.runtime.errors import UnsupportedModelError
from onnx_lathe.runtime.samples import Array


class Builder:
    """Adds to one graph, under names that are not taken.

    Args:
        graph: The main graph of a model.
        scheme: How weights are rounded.
    """

    def __init__(self, graph: ir.Graph, scheme: WeightScheme) -> None:
        self._graph = graph
        self._scheme = scheme
        self._names: set[str | None] = set()
        for part in (graph, *graph.subgraphs()):
            self._names |= set(part.initializers) | {value.name for value in part.inputs}
            self._names |= {item.name for node in part for item in (node, *node.outputs)}
        self._weights: dict[tuple[object, ...], ir.Value] = {}
        self._made: dict[tuple[object, ...], tuple[ir.Value, ir.Value]] = {}

    def constant(self, name: str, array: Array) -> ir.Value:
        """Add an initializer."""
        name = self.free(name)
        return add_initializer(self._graph, ir.Tensor(array, name=name))

    def once(self, key: tuple[object, ...], make: Callable[[], tuple[ir.Value, ir.Value]]) -> tuple[ir.Value, ir.Value]:
        """Return what ``make`` returned when ``key`` was asked for first: what several operators read is added once."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def stored(self, name: str, compute: Callable[[], Array], dtype: ir.DataType, shape: tuple[int, ...]) -> ir.Value:
        """Add an initializer that is computed while the model is written (`onnx_lathe.passes.files.computed`)."""
        name = self.free(name)
        return add_initializer(self._graph, files.computed(name, compute, dtype, shape))

    def streamed(
        self, name: str, parts: Callable[[], Iterable[Array]], dtype: ir.DataType, shape: tuple[int, ...]
    ) -> ir.Value:
        """Add an initializer that is computed some at a time while it is written (`files.StreamedTensor`)."""
        name = self.free(name)
        return add_initializer(self._graph, files.StreamedTensor(name, parts, dtype, shape))

    def op(
        self,
        operator: str,
        inputs: Sequence[ir.Value | None],
        results: Sequence[tuple[str, ir.DataType, ir.Shape | None]],
        attributes: Mapping[str, int | float] | None = None,
    ) -> ir.Node:
        """Return a new node that is not yet in the graph; ``results`` are names, element types and shapes."""
        outputs = [
            ir.Value(name=self.free(name), type=ir.TensorType(dtype), shape=shape) for name, dtype, shape in results
        ]
        given = ir.convenience.convert_attributes(attributes or {})
        return ir.Node("", operator, inputs, given, outputs=outputs, name=self.free(f"{results[0][0]}_{operator}"))

    def scales(self, layer: Layer, floor: NDArray[np.float64] | float = 0.0) -> NDArray[np.float32]:
        """Return the scales of a layer's weight: ``[channels]``, or ``[]`` where the scheme has one a tensor.

        Args:
            layer: The layer.
            floor: The least scale, for each channel.

        Raises:
            UnsupportedModelError: The weight is not finite, or its scale is given and under the floor.
        """
        if self._scheme.exponent is not None and np.max(floor) > 2.0**self._scheme.exponent:
            raise UnsupportedModelError(
                f"weight {layer.weight.tensor.name!r}",
                got=f"a bias that needs a scale of {np.max(floor):.3g} to fit in 32 bits",
                expected=f"at most 2^{self._scheme.exponent}, which weight_exponent gives",
                mend="Raise weight_exponent, or leave the layer out by the option exclude.",
            )

        largest = streamed.largest_magnitudes(layer.weight.tensor, layer.stored_axis) * np.float32(abs(layer.alpha))
        if not np.isfinite(largest).all():
            raise not_finite(layer)
        return params.scales_of(largest, self._scheme, floor)

    def weight(
        self, layer: Layer, scales: NDArray[np.float32], *, transposed: bool = False, unsigned: bool = False
    ) -> ir.Value:
        """Add the levels of a layer's weight, computed while the model is written; one weight is added once.

        Args:
            layer: The layer.
            scales: From `scales`.
            transposed: Whether the two axes of the weight are exchanged.
            unsigned: Whether the levels are uint8 with zero point `params.UNSIGNED_ZERO` instead of int8.
        """
        source, axis = layer.weight.tensor, layer.axis
        key = (id(source), layer.weight.perm, axis, layer.alpha, transposed, unsigned, scales.tobytes())
        if key not in self._weights:
            weight, stored_axis, alpha, limit = layer.weight, layer.stored_axis, layer.alpha, self._scheme.limit

            def parts() -> Iterator[Array]:
                rows = streamed.quantized_rows(source, scales, stored_axis, limit, alpha)
                return (params.as_unsigned(part) if unsigned else part for part in rows)

            shape = layer.weight.shape[::-1] if transposed else layer.weight.shape
            dtype = ir.DataType.UINT8 if unsigned else ir.DataType.INT8
            name = f"{source.name}_quantized"
            if weight.perm is None and not transposed:
                self._weights[key] = self.streamed(name, parts, dtype, shape)
                return self._weights[key]

            def compute() -> Array:
                levels = weight.arrange(streamed.quantized(source, scales, stored_axis, limit, alpha))
                levels = levels.T if transposed else levels
                if levels.ndim == 2 and not levels.flags.c_contiguous:
                    levels = streamed.transposed(levels.T)
                return params.as_unsigned(levels) if unsigned else levels

            self._weights[key] = self.stored(name, compute, dtype, shape)
        return self._weights[key]

    def drop_unused(self, values: Sequence[ir.Value | None]) -> None:
        """Remove those of ``values`` that nothing reads, and what computed them alone."""
        for value in values:
            if value is None or value.uses() or value.is_graph_output() or value.is_graph_input():
                continue
            node = value.producer()
            if node is not None:
                inputs = list(dict.fromkeys(node.inputs))
                assert node.graph is not None, "what is dropped is in a graph"
                node.graph.remove(node, safe=True)
                self.drop_unused(inputs)
            elif value.is_initializer() and isinstance(value.graph, ir.Graph):
                del value.graph.initializers[value.name or ""]

    def free(self, name: str) -> str:
        """Return ``name``, with a number behind it where it is taken, and take it."""
        return take_free_name(self._names, name)

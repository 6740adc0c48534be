"""The layers that make queries, keys and values of one tensor: three products with a weight, or one that is split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from onnx_lathe.passes.fuse.heads import Dims, Heads, Site, producer
from onnx_lathe.passes.fuse.probe import Probe
from onnx_lathe.passes.quantize.layers import Constant, constant

_PLAIN_GEMM = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0}


@dataclass(frozen=True, eq=False)
class Projections:
    """What makes queries, keys and values.

    Attributes:
        source: The tensor of all three, ``[batch, tokens, size]``.
        weights: Of queries, keys and values, each ``[size, width]``; one alone where they are merged already.
        biases: As many; None for one that is 0.
        widths: As many.
    """

    source: ir.Value
    weights: Sequence[Constant]
    biases: Sequence[Constant | None]

    @property
    def widths(self) -> list[int]:
        """The sizes of the last axes of the weights."""
        return [weight.shape[1] for weight in self.weights]


def projections(found: Site, facts: Probe) -> Projections | str:
    """Return the layers of an attention, or why its queries, keys and values are no products of one tensor."""
    parts = (found.query, found.key, found.value)
    tokens = [_tokens(heads, facts) for heads in parts]
    joint = _joint(tokens, facts)
    layers = [joint] if joint is not None else [_layer(value, facts) for value in tokens]
    known = [layer for layer in layers if layer is not None]
    if len(known) != len(layers):
        return "its queries, keys or values are not each the product of a tensor with a weight"
    if len({id(source) for source, _, _ in known}) != 1:
        return "its queries, keys and values are not made of one tensor"
    return Projections(known[0][0], [weight for _, weight, _ in known], [bias for _, _, bias in known])


_Layer = tuple[ir.Value, Constant, Constant | None]


def _tokens(heads: Heads, facts: Probe) -> ir.Value | None:
    """Return queries, keys or values before their heads were split, ``[batch, tokens, width]``."""
    reshape = producer(heads.split, "Reshape")
    batch, number, tokens, size = heads.dims
    fits = reshape is not None and facts.shape(reshape.inputs[0]) == (batch, tokens, number * size)
    return reshape.inputs[0] if reshape is not None and fits else None


def _joint(tokens: Sequence[ir.Value | None], facts: Probe) -> _Layer | None:
    """Return the layer that is split into queries, keys and values, in this order."""
    split = producer(tokens[0], "Split")
    if split is None or list(split.outputs) != list(tokens) or split.attributes.get_int("axis", 0) not in (-1, 2):
        return None
    return _layer(split.inputs[0], facts)


def _layer(value: ir.Value | None, facts: Probe) -> _Layer | None:
    """Return the input ``[batch, tokens, size]``, the weight and the bias of what makes ``[batch, tokens, width]``."""
    dims = facts.shape(value)
    if value is None or dims is None or len(dims) != 3:
        return None
    reshape = producer(value, "Reshape")
    if reshape is not None:
        return _flat_layer(producer(reshape.inputs[0], "Gemm"), dims, facts)
    add = producer(value, "Add")
    bias = None
    if add is not None:
        constants = [None if operand is None else constant(operand) for operand in add.inputs]
        bias = next((each for each in constants if each is not None), None)
        value = next((operand for operand, each in zip(add.inputs, constants, strict=True) if each is None), None)
    product = producer(value, "MatMul")
    if product is None or (add is not None and bias is None):
        return None
    return _checked(product.inputs[0], product.inputs[1], bias, dims, facts)


def _flat_layer(gemm: ir.Node | None, dims: Dims, facts: Probe) -> _Layer | None:
    """Return the layer of a Gemm between Reshapes that merge batch and tokens, and split them again."""
    inner = None if gemm is None else producer(gemm.inputs[0], "Reshape")
    if gemm is None or inner is None or facts.shape(gemm.outputs[0]) != (dims[0] * dims[1], dims[2]):
        return None
    attributes = {key: gemm.attributes[key].value for key in _PLAIN_GEMM if key in gemm.attributes}
    given = gemm.inputs[2] if len(gemm.inputs) > 2 else None
    bias = None if given is None else constant(given)
    if any(attributes[key] != _PLAIN_GEMM[key] for key in attributes) or (given is not None and bias is None):
        return None
    return _checked(inner.inputs[0], gemm.inputs[1], bias, dims, facts)


def _checked(
    source: ir.Value | None, weight: ir.Value | None, bias: Constant | None, dims: Dims, facts: Probe
) -> _Layer | None:
    known = None if weight is None else constant(weight)
    if source is None or known is None or len(known.shape) != 2 or facts.shape(source) != (*dims[:2], known.shape[0]):
        return None
    return (source, known, bias) if bias is None or bias.shape == known.shape[1:] else None

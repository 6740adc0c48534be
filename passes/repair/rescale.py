"""Channels made smaller where they are written and their readers' weights larger: the graph computes what it did."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from onnx_lathe.passes.edit import Edit, Refusal
from onnx_lathe.passes.oracle import Tolerance
from onnx_lathe.passes.quantize.layers import Layer, constant, result_name
from onnx_lathe.passes.repair.kernels import Form, Vector, scaled
from onnx_lathe.passes.repair.pairs import Offset, Pair, Way, form_of
from onnx_lathe.passes.repair.rewriter import Rewriter, nodes_of, reads
from onnx_lathe.runtime.samples import Array


@dataclass(frozen=True, eq=False)
class ScaledWeight:
    """A weight of which channels are multiplied.

    Attributes:
        layer: The result of the operator that reads it.
        source: The value it reads.
        form: The layout.
        outputs: Factors of the outputs, ``[outputs]``; None leaves them.
        inputs: Factors of the inputs, ``[inputs]``; None leaves them.
    """

    layer: str
    source: str
    form: Form
    outputs: Vector | None = None
    inputs: Vector | None = None


@dataclass(frozen=True, eq=False)
class ScaledConstant:
    """A constant beside weights (a bias, the affine part of a normalization) that is multiplied.

    Attributes:
        node: The first result of the node that reads it.
        index: As which input.
        source: The value it reads.
        factors: Broadcast against it.
    """

    node: str
    index: int
    source: str
    factors: Vector


@dataclass(frozen=True, eq=False)
class ScaledBranch:
    """Readers of a value that get it multiplied, because others need it as it is.

    Attributes:
        value: The value.
        readers: The first results of these readers, and as which input each reads it.
        factors: Along its last axis.
    """

    value: str
    readers: tuple[tuple[str, int], ...]
    factors: Vector


@dataclass(frozen=True)
class Step:
    """One place where channels are scaled, for people.

    Attributes:
        maker: What makes the channels: the result of a layer or a normalization.
        readers: The results of the layers that read them.
        how: "folded" into weights, or "multiplied" by a new operator.
        least: The smallest number that a channel is divided by.
        largest: The largest.
        alpha: Of SmoothQuant, where that chose the numbers.
    """

    maker: str
    readers: tuple[str, ...]
    how: str
    least: float
    largest: float
    alpha: float | None = None


@dataclass(frozen=True, eq=False)
class Rescaled(Edit):
    """A plan of scaled channels.

    Attributes:
        suffix: What the names of new weights end in.
        steps: What is done, for people.
        weights: Weights that change.
        constants: Other constants that change.
        branches: Values that some readers get multiplied.
        refusals: What was left alone, and why.
    """

    tolerance: ClassVar[Tolerance] = Tolerance(
        "the same products of weights that were multiplied and divided in float32, through a whole network",
        relative=1e-4,
    )

    suffix: str
    steps: tuple[Step, ...]
    weights: tuple[ScaledWeight, ...]
    constants: tuple[ScaledConstant, ...]
    branches: tuple[ScaledBranch, ...] = ()
    refusals: tuple[Refusal, ...] = ()

    def describe(self) -> Mapping[str, Any]:
        """Return who is scaled and by how much."""
        return {"steps": [dataclasses.asdict(step) | {"readers": list(step.readers)} for step in self.steps]}

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Scale what still reads the constants that were planned for."""
        nodes, rewriter = nodes_of(model.graph), Rewriter(model.graph, self.suffix)
        modified = False
        for weight in self.weights:
            node = nodes.get(weight.layer)
            if node is not None and reads(node, 1, weight.source):
                found = constant(node.inputs[1])
                assert found is not None, f"{weight.source} was planned as a weight"
                rewriter.swap(node, 1, _scaler(weight), found.shape, _key(weight.form, weight.outputs, weight.inputs))
                modified = True
        for item in self.constants:
            node = nodes.get(item.node)
            if node is not None and reads(node, item.index, item.source):
                found = constant(node.inputs[item.index])
                assert found is not None, f"{item.source} was planned as a constant"
                shape = np.broadcast_shapes(found.shape, item.factors.shape)
                rewriter.swap(node, item.index, _multiplier(item.factors), shape, _key(item.factors))
                modified = True
        for branch in self.branches:
            modified |= _branch(rewriter, nodes, branch)
        return ir.passes.PassResult(model, modified)


@dataclass
class Scaling:
    """Factors as they come together, for `Rescaled`."""

    outputs: dict[ir.Node, Vector] = field(default_factory=dict[ir.Node, Vector])
    inputs: dict[ir.Node, Vector] = field(default_factory=dict[ir.Node, Vector])
    layers: dict[ir.Node, Layer] = field(default_factory=dict[ir.Node, Layer])
    constants: list[ScaledConstant] = field(default_factory=list[ScaledConstant])

    def pair(self, pair: Pair, divisors: Vector) -> None:
        """Divide the channels of a layer by ``divisors [channels]`` and multiply what the next reads."""
        node = pair.first.node
        self.layers[node] = pair.first
        self.outputs[node] = 1.0 / divisors
        if pair.first.bias is not None:
            self.multiply(node, 2, 1.0 / divisors)
        self.arrive(pair.way, divisors)

    def arrive(self, way: Way, divisors: Vector) -> None:
        """Divide what is added on a way, and multiply what the layer at its end reads."""
        for offset in way.offsets:
            self.offset(offset, divisors)
        self.layers[way.layer.node] = way.layer
        self.inputs[way.layer.node] = divisors[way.channels]

    def offset(self, offset: Offset, divisors: Vector) -> None:
        """Divide a constant that is added."""
        self.multiply(offset.node, offset.index, 1.0 / divisors[offset.channels])

    def multiply(self, node: ir.Node, index: int, factors: Vector) -> None:
        """Multiply a constant input of ``node`` by ``factors``, which broadcast against it."""
        value = node.inputs[index]
        assert value is not None, "a scaled constant is there"
        self.constants.append(ScaledConstant(result_name(node), index, value.name or "", factors))

    def weights(self) -> tuple[ScaledWeight, ...]:
        """Return the weights that change."""
        return tuple(
            ScaledWeight(
                layer=result_name(node),
                source=_weight_name(node),
                form=form_of(layer),
                outputs=self.outputs.get(node),
                inputs=self.inputs.get(node),
            )
            for node, layer in self.layers.items()
        )


def _weight_name(node: ir.Node) -> str:
    value = node.inputs[1]
    assert value is not None, "a layer has a weight"
    return value.name or ""


def _scaler(weight: ScaledWeight) -> Callable[[Array], Array]:
    return lambda array: scaled(array, weight.form, weight.outputs, weight.inputs)


def _multiplier(factors: Vector) -> Callable[[Array], Array]:
    return lambda array: array * factors.astype(array.dtype)


def _key(*parts: Form | Vector | None) -> tuple[object, ...]:
    return tuple((part.shape, part.tobytes()) if isinstance(part, np.ndarray) else part for part in parts)


def _branch(rewriter: Rewriter, nodes: Mapping[str, ir.Node], branch: ScaledBranch) -> bool:
    """Put a Mul between a value and some of its readers, and say whether it was not there."""
    here = [(nodes[name], index) for name, index in branch.readers if reads(nodes.get(name), index, branch.value)]
    if not here:
        return False
    value = here[0][0].inputs[here[0][1]]
    assert value is not None, f"{branch.value} is read"
    dtype = np.float32 if value.dtype is None else value.dtype.numpy()
    product = rewriter.behind(value, "Mul", branch.factors.astype(dtype))
    for node, index in here:
        node.replace_input_with(index, product)
    return True

"""Where a graph computes Gelu, an approximation of it, or SiLU: as one operator, or spelled in elementary ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import onnx_ir as ir

from onnx_lathe.passes.fuse.stretch import Reals, Stretch, erf, name, stretches

Function = Literal["erf", "tanh", "sigmoid"]

MICROSOFT = "com.microsoft"
"""The domain of onnxruntime's own operators."""
QUICK_FACTOR = 1.702
"""Of the approximation by a sigmoid, and the default of onnxruntime's QuickGelu."""
TANH_FACTORS = (math.sqrt(2.0 / math.pi), 0.044715)
"""Of the approximation by tanh: on the whole argument, and on its cube."""

_SAME = 2e-6
"""Largest difference between a stretch and the function that it is: its constants are float32."""
_GRID: Reals = np.linspace(-9.0, 9.0, 721)
_CORES = frozenset({"Erf", "Tanh", "Sigmoid"})


@dataclass(frozen=True)
class Activation:
    """One activation of a graph.

    Attributes:
        source: The value that it reads.
        bias: What is added to that first; empty where nothing is.
        result: The value that it makes.
        function: Gelu itself ("erf") or its approximation by tanh or by a sigmoid.
        factor: What a sigmoid's argument is multiplied by, 1 for SiLU; 0 for the other functions.
        operator: The operator that makes the result now, with its domain.
        reads: What that operator reads.
        dtype: The type of the elements; empty where it is not known.
    """

    source: str
    bias: str
    result: str
    function: Function
    factor: float
    operator: str
    reads: tuple[str, ...]
    dtype: str


def curve(function: Function, factor: float = 0.0) -> Callable[[Reals], Reals]:
    """Return an activation as a function of real numbers; ``factor`` is that of a sigmoid."""
    if function == "erf":
        return lambda x: 0.5 * x * (1.0 + erf(x / math.sqrt(2.0)))
    if function == "tanh":
        outer, inner = TANH_FACTORS
        return lambda x: 0.5 * x * (1.0 + np.tanh(outer * (x + inner * x**3)))
    return lambda x: x / (1.0 + np.exp(-factor * x))


def largest_difference(one: Callable[[Reals], Reals], other: Callable[[Reals], Reals]) -> float:
    """Return how far two activations are apart at most: beyond 9 all of them are 0 or the identity."""
    return float(np.abs(one(_GRID) - other(_GRID)).max())


def find_activations(model: ir.Model) -> Iterator[Activation]:
    """Yield the activations of the main graph; ``model`` has its types inferred."""
    for node in model.graph:
        whole = _whole(node)
        if whole is not None:
            yield whole
        elif node.op_type in _CORES and node.domain == "":
            found = next(filter(None, map(_spelled, stretches(node))), None)
            if found is not None:
                yield found


def operator_of(node: ir.Node) -> str:
    """Return the type of a node with its domain, where that is not ONNX's own."""
    return f"{node.domain}.{node.op_type}" if node.domain else node.op_type


def is_as_found(activation: Activation, result: ir.Value | None) -> bool:
    """Say whether ``result`` is still made by the operator that was found."""
    node = None if result is None else result.producer()
    if node is None:
        return False
    return (operator_of(node), tuple(map(name, node.inputs))) == (activation.operator, activation.reads)


def _found(source: ir.Value | None, result: ir.Value, function: Function, factor: float) -> Activation:
    node = result.producer()
    assert node is not None, "an activation is computed"
    dtypes = {value.dtype for value in (source, result) if value is not None and value.dtype is not None}
    dtype = next((each for each in dtypes if each != ir.DataType.FLOAT), next(iter(dtypes), None))
    return Activation(
        source=name(source),
        bias="",
        result=name(result),
        function=function,
        factor=factor,
        operator=operator_of(node),
        reads=tuple(map(name, node.inputs)),
        dtype="" if dtype is None else dtype.name,
    )


def _whole(node: ir.Node) -> Activation | None:
    """Return the activation that one operator is."""
    approximated = node.attributes.get_string("approximate", "none") == "tanh"
    functions: Mapping[str, Function] = {
        "Gelu": "tanh" if approximated else "erf",
        f"{MICROSOFT}.Gelu": "erf",
        f"{MICROSOFT}.BiasGelu": "erf",
        f"{MICROSOFT}.FastGelu": "tanh",
        f"{MICROSOFT}.QuickGelu": "sigmoid",
    }
    function = functions.get(operator_of(node))
    if function is None:
        return None
    factor = node.attributes.get_float("alpha", QUICK_FACTOR) if function == "sigmoid" else 0.0
    found = _found(node.inputs[0], node.outputs[0], function, factor)
    return replace(found, bias=name(node.inputs[1])) if len(node.inputs) > 1 else found


def _spelled(stretch: Stretch) -> Activation | None:
    """Return the activation that a stretch computes; None where it computes something else."""
    if stretch.may_widen() or any(array.size != 1 for array in stretch.constants.values()):
        return None
    got = np.broadcast_to(stretch.run(_GRID), _GRID.shape)
    functions: list[tuple[Function, float]] = [("erf", 0.0), ("tanh", 0.0)]
    share = float(got[np.searchsorted(_GRID, 1.0)])
    if 0.5 < share < 1.0:  # x sigmoid(a x) at 1 tells a
        factor = math.log(share / (1.0 - share))
        functions.append(("sigmoid", round(factor, 5) if abs(factor - round(factor, 5)) < _SAME else factor))
    for function, factor in functions:
        with np.errstate(all="ignore"):
            away = np.abs(got - curve(function, factor)(_GRID)).max()
        if away < _SAME:
            return _found(stretch.source, stretch.result, function, factor)
    return None

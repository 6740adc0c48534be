"""How long a model will take, before it runs: each node at the rates that this machine was just seen to reach.

The roofline model (Williams, Waterman, Patterson 2009, doi:10.1145/1498765.1498785) node by node: the longer of its
arithmetic at the peak of its element type and its activations at their bandwidth, then its weights at theirs, and a
fixed time. (Kernels were seen to wait for weights that come from memory: the longest of the three fell 30 % short on a
large perceptron.) The peaks are those of onnxruntime's own kernels (`onnx_lathe.benchmarks.peaks`). What onnxruntime
computes together with the node before, such as an activation after a convolution, counts as nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from onnx_lathe.benchmarks.peaks import Peaks
from onnx_lathe.runtime.facts import GraphFacts, NodeFacts

SEEN_WITHIN = 1.4
"""The factor that the estimate stayed within on a quiet machine, on the models it was tried on (docs/log.md)."""

LEAST_SUMMED = 32
"""Convolutions that sum fewer products an element (depthwise ones, the first of a network) do not run as products."""

Bound = Literal["arithmetic", "memory", "overhead", "fused", "unknown"]

_VIEWS = {"Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Shape", "Size", "Dropout"}
"""Operators that move no values on the CPU."""
_SELECTING = {"Gather", "GatherElements", "GatherND", "Slice", "Split"}
"""Operators that read no more of a constant than they write."""

_OPERATORS = {
    "function": (
        *("Gelu", "BiasGelu", "FastGelu", "QuickGelu", "Erf", "Exp", "Log", "Pow", "Sin", "Cos", "Sigmoid", "Tanh"),
        *("Softmax", "LogSoftmax", "Softplus", "Elu", "Selu", "Mish", "Swish", "HardSwish", "HardSigmoid"),
        *("QuantizeLinear", "DynamicQuantizeLinear"),
    ),
    "normalization": (
        *("LayerNormalization", "SimplifiedLayerNormalization", "RMSNormalization", "LpNormalization"),
        *("InstanceNormalization", "GroupNormalization"),
    ),
    "skip-normalization": ("SkipLayerNormalization",),
    "transpose": (
        *("Transpose", "Concat", "Slice", "Split", "Gather", "GatherElements", "GatherND", "Expand", "Tile", "Pad"),
        *("Resize", "DepthToSpace", "SpaceToDepth", "Where"),
    ),
}
"""The operators of each kind of work on elements; all others are ``elementwise``."""
_KINDS = {op_type: kind for kind, op_types in _OPERATORS.items() for op_type in op_types}

_ACTIVATIONS = {"Relu", "Clip", "LeakyRelu", "Sigmoid", "Tanh", "HardSigmoid"}
_AFTER_CONVOLUTION = {*_ACTIVATIONS, "Add", "BatchNormalization"}
_AFTER_INTEGERS = {"Cast", "Mul", "Add"}
_ABSORBED = {
    "Conv": _AFTER_CONVOLUTION,
    "FusedConv": _AFTER_CONVOLUTION,
    "QLinearConv": _AFTER_CONVOLUTION,
    "Gemm": _ACTIVATIONS,
    "MatMulInteger": _AFTER_INTEGERS,
    "ConvInteger": _AFTER_INTEGERS,
}
"""What onnxruntime computes together with a product that nothing else reads."""


@dataclass(frozen=True)
class NodeEstimate:
    """What one node will take.

    Attributes:
        name: The node.
        op_type: Its operator.
        seconds: Its time; 0 where it is computed together with another, or unknown.
        bound: What it waits for.
    """

    name: str
    op_type: str
    seconds: float
    bound: Bound


@dataclass(frozen=True)
class Estimate:
    """What a model will take on the CPU.

    Attributes:
        seconds: Of one call: the sum over the nodes that can be estimated.
        nodes: All nodes, the longest first.
        peaks: What this machine was seen to reach.
    """

    seconds: float
    nodes: tuple[NodeEstimate, ...]
    peaks: Peaks

    @property
    def unknown(self) -> tuple[NodeEstimate, ...]:
        """The nodes that are in no sum, because their shapes or their arithmetic are unknown."""
        return tuple(node for node in self.nodes if node.bound == "unknown")


def estimate(facts: GraphFacts, peaks: Peaks) -> Estimate:
    """Estimate the latency of one call on the CPU, in seconds, at the shapes of ``facts``."""
    absorbed, added = _absorbed(facts.nodes), _written_by(facts.nodes, "Add")
    nodes: list[NodeEstimate] = []
    for node in facts.nodes:
        kind = _KINDS.get(node.op_type, "elementwise")
        if kind == "normalization" and added.intersection(node.reads):
            kind = "skip-normalization"
        free = node.name in absorbed or (node.activation_bytes == 0 and not node.macs)
        seconds, bound = (0.0, "fused") if free else _seconds(node, kind, facts, peaks)
        nodes.append(NodeEstimate(node.name, node.op_type, seconds, bound))
    total = peaks.call_seconds + sum(node.seconds for node in nodes)
    return Estimate(total, tuple(sorted(nodes, key=lambda node: node.seconds, reverse=True)), peaks)


def _seconds(node: NodeFacts, kind: str, facts: GraphFacts, peaks: Peaks) -> tuple[float, Bound]:
    """Return the time of one node and what it waits for."""
    if node.activation_bytes is None or node.macs is None or node.summed is None:
        return 0.0, "unknown"
    if node.op_type in _VIEWS:
        return peaks.node_seconds, "overhead"
    weights = node.weight_bytes
    if node.op_type in _SELECTING:
        weights = min(weights, sum(facts.activations[name] or 0 for name in node.writes))
    reading = weights / peaks.bandwidth(sum(facts.weights.values()))
    moving = node.activation_bytes / min(peaks.rate(kind), peaks.bandwidth(node.activation_bytes))
    computing = node.macs / peaks.rate(_product(node)) if node.macs else 0.0
    seconds = reading + max(moving, computing)
    # A node whose work is not worth sharing runs on one thread.
    seconds = min(peaks.threads * seconds, seconds + peaks.fork_seconds)
    if seconds < peaks.node_seconds:
        return seconds + peaks.node_seconds, "overhead"
    return seconds + peaks.node_seconds, "arithmetic" if computing > max(reading, moving) else "memory"


def _product(node: NodeFacts) -> str:
    """Return whose peak the arithmetic of a node has."""
    if node.op_type == "ConvInteger":
        return "integer-convolution"
    few = "Conv" in node.op_type and node.summed is not None and node.summed < LEAST_SUMMED
    return "few-products" if few else node.dtype


def _absorbed(nodes: Sequence[NodeFacts]) -> set[str]:
    """Return the names of the nodes that onnxruntime computes together with the one before."""
    readers = Counter(name for node in nodes for name in node.reads)
    roots: dict[str, str] = {}
    found: set[str] = set()
    for node in nodes:
        before = [roots[name] for name in node.reads if name in roots and readers[name] == 1]
        root = next((root for root in before if node.op_type in _ABSORBED[root]), None)
        if root is not None:
            found.add(node.name)
        elif node.op_type in _ABSORBED:
            root = node.op_type
        if root is not None:
            roots.update(dict.fromkeys(node.writes, root))
    return found


def _written_by(nodes: Sequence[NodeFacts], op_type: str) -> set[str]:
    return {name for node in nodes if node.op_type == op_type for name in node.writes}

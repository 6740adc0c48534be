"""The memory and the arithmetic that a model needs, from its facts alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from onnx_lathe.runtime.facts import GraphFacts

SESSION_BYTES = 10 * 2**20
"""What onnxruntime takes for a session of the smallest model, its libraries being loaded already."""

_REORDERED = {"Conv", "FusedConv"}
"""Operators whose float weights onnxruntime keeps twice: as given, and in the blocks that its kernels read."""


@dataclass(frozen=True)
class Needs:
    """What a model needs at the shapes of its facts.

    Attributes:
        flops: Floating or integer operations of one run: 2 for each multiply-accumulate of convolutions and matrix
            products; None where one of them is unknown. Element by element work is not counted.
        not_counted: Operators that multiply much and are in no count, by how often they occur.
        load_bytes: Peak memory of loading on the CPU, estimated: the session, the weights, one copy of the largest
            while it is packed, and the copies of convolutions' weights. Seen: 0.7 to 1.0 of what was taken.
        run_bytes: The most that activations take at one time if nodes run in order and each tensor is freed after its
            last reader; None where a shape is unknown. onnxruntime's arena was seen to take 1 to 5 times as much, the
            most for encoders.
        unknown: The first node whose shapes are unknown; None where there is none.
    """

    flops: int | None
    not_counted: Mapping[str, int]
    load_bytes: int
    run_bytes: int | None
    unknown: str | None


def needs(facts: GraphFacts) -> Needs:
    """Return what a model needs."""
    weights = [node.weight_bytes for node in facts.nodes]
    reordered = (node.weight_bytes for node in facts.nodes if node.op_type in _REORDERED and node.dtype == "float32")
    unknown = next((node for node in facts.nodes if node.activation_bytes is None), None)
    return Needs(
        flops=None if facts.macs is None else 2 * facts.macs,
        not_counted=dict(Counter(node.op_type for node in facts.nodes if node.macs is None).most_common()),
        load_bytes=SESSION_BYTES + sum(facts.weights.values()) + max(weights, default=0) + sum(reordered),
        run_bytes=max(_live(facts), default=0) if unknown is None else None,
        unknown=None if unknown is None else f"{unknown.name} ({unknown.op_type})",
    )


def _live(facts: GraphFacts) -> Iterator[int]:
    """Yield the bytes of the activations that are alive while each node runs."""
    last = {name: place for place, node in enumerate(facts.nodes) for name in (*node.writes, *node.reads)}
    kept = {spec.name for spec in (*facts.inputs, *facts.outputs)}
    sizes = {name: size or 0 for name, size in facts.activations.items()}
    alive = sum(sizes.get(spec.name, 0) for spec in facts.inputs)
    for place, node in enumerate(facts.nodes):
        alive += sum(sizes[name] for name in node.writes)
        yield alive
        alive -= sum(sizes[name] for name in {*node.reads, *node.writes} if last[name] == place and name not in kept)

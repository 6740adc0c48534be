"""Where the nodes of a graph run, and which may run on the host whatever the provider."""

from __future__ import annotations

from dataclasses import dataclass

from onnx import GraphProto


@dataclass(frozen=True)
class AssignedNode:
    """A node and where it runs.

    Attributes:
        name: Its name; may be empty.
        operator: Its operator type.
        provider: The provider that runs it, by the users' name.
    """

    name: str
    operator: str
    provider: str


def shape_nodes(graph: GraphProto) -> set[tuple[str, str]]:
    """Return name and operator of the nodes that compute from constants and shapes alone.

    Shapes live on the host: onnxruntime puts their arithmetic on the CPU of its own accord, whatever the provider.
    """
    known = {"", *(tensor.name for tensor in graph.initializer)}
    found: set[tuple[str, str]] = set()
    for node in graph.node:
        if node.op_type in ("Shape", "Size") or known.issuperset(node.input):
            known.update(node.output)
            found.add((node.name, node.op_type))
    return found

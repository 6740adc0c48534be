"""Did a graph change? Compared without writing its weights."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir


@dataclass(frozen=True)
class Snapshot:
    """A graph as it was: everything but the weights as bytes, and the weights by reference."""

    graph: bytes
    tensors: tuple[ir.TensorProtocol, ...]

    @classmethod
    def of(cls, model: ir.Model) -> Snapshot:
        """Take down ``model``; later changes of it do not change the snapshot."""
        copy = model.clone()
        tensors: list[ir.TensorProtocol] = []
        for graph in copy.graphs():
            tensors += [value.const_value for value in graph.initializers.values() if value.const_value is not None]
            graph.initializers.clear()
        return cls(ir.to_proto(copy).SerializeToString(deterministic=True), tuple(tensors))

    def same(self, other: Snapshot) -> bool:
        """Whether both would be written to the same bytes; only weights that were replaced are read."""
        return (
            self.graph == other.graph
            and len(self.tensors) == len(other.tensors)
            and all(_same(mine, theirs) for mine, theirs in zip(self.tensors, other.tensors, strict=True))
        )


def _same(mine: ir.TensorProtocol, theirs: ir.TensorProtocol) -> bool:
    return mine is theirs or (
        (mine.name, mine.dtype, mine.shape) == (theirs.name, theirs.dtype, theirs.shape)
        and mine.tobytes() == theirs.tobytes()
    )

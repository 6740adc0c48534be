"""Cleanup of initializers, reading as few of them as can be."""

from __future__ import annotations

from functools import partial

import numpy as np
import onnx_ir as ir

from onnx_lathe.passes import files

SHARED_FROM_BYTES = 64 * 2**10
"""Floating-point initializers below this stay apart even when equal: merging them saves nothing, and ties the layers
that use them together when they are pruned or quantized (a shared scale also blocks onnxruntime's fusions)."""
HEAD = 256
"""Elements compared first: unequal weights of one shape nearly always differ there, and only that page is read."""


def merge_duplicates(model: ir.Model) -> None:
    """Let equal initializers of the main graph be one."""
    unique: dict[tuple[object, ...], list[ir.Value]] = {}
    for name, value in tuple(model.graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or value.is_graph_input() or value.is_graph_output() or tensor.dtype.is_string():
            continue
        if tensor.dtype.is_floating_point() and tensor.nbytes < SHARED_FROM_BYTES:
            continue
        head = np.ravel(tensor.numpy())[:HEAD].tobytes()
        alike = unique.setdefault((tensor.dtype, tuple(tensor.shape.numpy()), head), [])
        twin = next((other for other in alike if _equal(tensor, other.const_value)), None)
        if twin is None:
            alike.append(value)
        else:
            value.replace_all_uses_with(twin)
            del model.graph.initializers[name]


def fold_transposes(model: ir.Model) -> None:
    """Let a Transpose of a weight that nothing else reads be a transposed weight, computed as it is written."""
    for node in tuple(model.graph):
        source = node.inputs[0] if node.op_type == "Transpose" and node.domain == "" else None
        tensor = None if source is None else source.const_value
        result = node.outputs[0]
        if source is None or tensor is None or not _belongs_to_one_node(source) or result.is_graph_output():
            continue
        if tensor.dtype.is_string() or tensor.dtype.bitwidth < 8:
            continue
        order = node.attributes.get_ints("perm", tuple(reversed(range(len(tensor.shape)))))
        shape = tuple(int(tensor.shape.numpy()[axis]) for axis in order)
        name = result.name or ""
        turned = ir.Value(
            name=name,
            type=ir.TensorType(tensor.dtype),
            shape=ir.Shape(shape),
            const_value=files.lazy(name, tensor, partial(np.transpose, axes=order), tensor.dtype, shape),
        )
        result.replace_all_uses_with(turned)
        model.graph.remove(node, safe=True)
        model.graph.register_initializer(turned)
        del model.graph.initializers[source.name or ""]


def _belongs_to_one_node(value: ir.Value) -> bool:
    exposed = value.is_graph_input() or value.is_graph_output()
    return value.is_initializer() and not exposed and len(value.uses()) == 1


def _equal(one: ir.TensorProtocol, other: ir.TensorProtocol | None) -> bool:
    return other is not None and np.array_equal(
        np.ravel(files.view(one).numpy()).view(np.uint8), np.ravel(files.view(other).numpy()).view(np.uint8)
    )

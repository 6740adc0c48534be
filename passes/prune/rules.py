"""How each operator ties the channels of its inputs, weights and results to one another.

A rule ties what it knows. Every axis that it leaves is held afterwards, so that an operator, or a form of one, that no
rule knows refuses its channels and never cuts them wrongly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir

from onnx_lathe.passes.edit import Refusal
from onnx_lathe.passes.prune import literals
from onnx_lathe.passes.prune.groups import Coupling, Role, Slots, dims, solve
from onnx_lathe.passes.prune.literals import Length
from onnx_lathe.passes.prune.reshapes import flatten, reshape, squeeze, transpose, unsqueeze
from onnx_lathe.passes.prune.site import Operand, Site

Rule = Callable[[Site], None]


def couple(model: ir.Model) -> Coupling:
    """Find the coupled channels of ``model``, whose values must have shapes (see `onnx_ir`'s shape inference)."""
    slots = Slots()
    opset = model.opset_imports.get("", 1)
    for value in model.graph.inputs:
        slots.hold(value, range(len(dims(value))), Refusal(value.name or "", "Input", "belongs to a graph input"))
    for node in model.graph:
        site = Site(node, slots, opset)
        rule = RULES.get(node.op_type) if node.domain == "" else None
        reason = _obstacle(site)
        if rule is not None and reason is None:
            rule(site)
            reason = REASONS.get(node.op_type)
        site.hold_rest(reason or "no rule says which channels this operator, in this form, ties together")
        _hold_captured(site, model.graph)
    for value in model.graph.outputs:
        refusal = Refusal(value.name or "", "Output", "reaches a graph output")
        slots.hold(value, range(len(dims(value))), refusal)
    return solve(slots)


def _obstacle(site: Site) -> str | None:
    """Return why no rule can be trusted with this node, if that is so."""
    if site.node.op_type == "Constant":
        return "a constant inside the graph; the cleanup pass makes it an initializer"
    if any(item is not None and item.value.shape is None for item in (*site.inputs, *site.outputs)):
        return "a shape is not known"
    extra = () if site.node.op_type == "Split" else site.outputs[1:]
    if any(item.value.uses() or item.value.is_graph_output() for item in extra):
        return "more than one result of this operator is used"
    return None


def _hold_captured(site: Site, graph: ir.Graph) -> None:
    """Hold what the subgraphs of a node read from around them."""
    refusal = site.refusal("read inside a subgraph")
    for attribute in site.node.attributes.values():
        if attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
            single = attribute.type is ir.AttributeType.GRAPH
            for subgraph in [attribute.as_graph()] if single else attribute.as_graphs():
                for node in ir.traversal.RecursiveGraphIterator(subgraph):
                    for value in node.inputs:
                        if value is not None and value.graph is graph:
                            site.slots.hold(value, range(len(dims(value))), refusal)


def _elementwise(site: Site) -> None:
    """Tie the axes that broadcasting aligns; an axis of length 1 is repeated, and tied to nothing."""
    _broadcast(site, [operand for operand in site.inputs if operand is not None], site.out, 0)


def _broadcast(site: Site, inputs: list[Operand], out: Operand, spared: int) -> None:
    """Tie all but the last ``spared`` axes as broadcasting aligns them."""
    for axis in range(out.rank - spared):
        aligned = [(item, axis - out.rank + item.rank) for item in inputs]
        present = [(item, place) for item, place in aligned if place >= 0 and item.dims[place] != 1]
        if all(isinstance(item.dims[place], int) for item, place in present):
            for item, place in present:
                site.tie(item, place, out, axis)


def _conv(site: Site) -> None:
    data, weight, bias = site.input(0), site.input(1), site.input(2)
    if data is None or weight is None or data.rank < 3:
        return
    groups = site.node.attributes.get_int("group", 1)
    made, read = weight.dims[0], data.dims[1]
    if groups == 1:
        site.tie(weight, 0, site.out, 1, role=Role.PRODUCES)
        site.consume(data, 1, weight, 1)
    elif groups == read and isinstance(made, int):
        site.tie(weight, 0, site.out, 1, role=Role.SCALES)
        site.tie(data, 1, site.out, 1, left_at=np.repeat(np.arange(groups), made // groups))
        site.slots.attributes.append((site.out.value.name or "", data.value.name or ""))
    else:
        return
    if bias is not None:
        site.tie(bias, 0, site.out, 1)
    site.tie(data, 0, site.out, 0)


def _matmul(site: Site) -> None:
    left, right = site.input(0), site.input(1)
    if left is None or right is None or min(left.rank, right.rank) < 2:
        return
    site.tie(left, left.rank - 2, site.out, site.out.rank - 2, role=Role.PRODUCES)
    site.tie(right, right.rank - 1, site.out, site.out.rank - 1, role=Role.PRODUCES)
    _broadcast(site, [left, right], site.out, 2)
    if right.is_weight:
        site.consume(left, left.rank - 1, right, right.rank - 2)
    elif left.is_weight:
        site.consume(right, right.rank - 2, left, left.rank - 1)


def _gemm(site: Site) -> None:
    left, right, bias = site.input(0), site.input(1), site.input(2)
    if left is None or right is None or left.rank != 2 or right.rank != 2:
        return
    left_sum = 0 if site.node.attributes.get_int("transA", 0) else 1
    right_sum = 1 if site.node.attributes.get_int("transB", 0) else 0
    site.tie(left, 1 - left_sum, site.out, 0, role=Role.PRODUCES)
    site.tie(right, 1 - right_sum, site.out, 1, role=Role.PRODUCES)
    if bias is not None:
        _broadcast(site, [bias], site.out, 0)
    if right.is_weight:
        site.consume(left, left_sum, right, right_sum)
    elif left.is_weight:
        site.consume(right, right_sum, left, left_sum)


def _gather(site: Site) -> None:
    """Rows of a table, such as an embedding: the table's other axes are the channels."""
    data, indices = site.input(0), site.input(1)
    if data is None or indices is None or site.out.rank != data.rank - 1 + indices.rank:
        return
    axis = site.node.attributes.get_int("axis", 0) % data.rank
    for other in range(data.rank):
        if other != axis:
            place = other if other < axis else other - 1 + indices.rank
            site.tie(data, other, site.out, place, role=Role.PRODUCES)
    for place in range(indices.rank):
        site.tie(indices, place, site.out, axis + place)


def _per_channel_norm(site: Site) -> None:
    """BatchNormalization and InstanceNormalization: each channel by itself."""
    data = site.input(0)
    if data is None or data.rank < 2 or site.node.attributes.get_int("training_mode", 0):
        return
    site.tie(data, 0, site.out, 0)
    site.tie(data, 1, site.out, 1)
    for index, role in ((1, Role.SCALES), (2, Role.CARRIES), (3, Role.CARRIES), (4, Role.CARRIES)):
        operand = site.input(index)
        if operand is not None:
            site.tie(operand, 0, site.out, 1, role=role)
    if site.node.op_type == "BatchNormalization":
        for axis in range(2, data.rank):
            site.tie(data, axis, site.out, axis)


def _leading_axes(site: Site) -> None:
    """LayerNormalization and its like: the axes before the normalized ones."""
    data = site.input(0)
    if data is not None and data.rank:
        for axis in range(site.node.attributes.get_int("axis", -1) % data.rank):
            site.tie(data, axis, site.out, axis)


def _softmax(site: Site) -> None:
    data = site.input(0)
    if data is None or not data.rank:
        return
    axis = site.node.attributes.get_int("axis", -1 if site.opset >= 13 else 1) % data.rank
    # Before operator set 13 every axis from this one on is normalized together.
    normalized = {axis} if site.opset >= 13 else set(range(axis, data.rank))
    for other in set(range(data.rank)) - normalized:
        site.tie(data, other, site.out, other)


def _pool(site: Site) -> None:
    data = site.input(0)
    if data is not None and data.rank > 2:
        site.tie(data, 0, site.out, 0)
        site.tie(data, 1, site.out, 1)


def _reduce(site: Site) -> None:
    data = site.input(0)
    given = site.input(1) is None or site.constant(1) is not None
    if data is None or not data.rank or not given:
        return
    axes = site.ints("axes", 1)
    if not axes:
        nothing = site.node.attributes.get_int("noop_with_empty_axes", 0)
        axes = () if nothing else tuple(range(data.rank))
    reduced = {axis % data.rank for axis in axes}
    keep = site.node.attributes.get_int("keepdims", 1)
    place = 0
    for axis in range(data.rank):
        if axis not in reduced:
            site.tie(data, axis, site.out, place)
        place += 1 if keep or axis not in reduced else 0


def _concat(site: Site) -> None:
    operands = [operand for operand in site.inputs if operand is not None]
    if not site.out.rank:
        return
    joined = site.node.attributes.get_int("axis", 0) % site.out.rank
    start = 0
    for operand in operands:
        length = operand.dims[joined] if operand.rank else None
        for axis in range(operand.rank):
            if axis != joined:
                site.tie(operand, axis, site.out, axis)
        if isinstance(site.out.dims[joined], int) and isinstance(length, int):
            site.tie(operand, joined, site.out, joined, right_at=np.arange(start, start + length))
            start += length


def _split(site: Site) -> None:
    data = site.input(0)
    if data is None or not data.rank:
        return
    parted = site.node.attributes.get_int("axis", 0) % data.rank
    lengths = literals.read(site.node) or [Length(None, (0, part)) for part in range(len(site.outputs))]
    known = literals.told(site.node) is None or all(length.number is not None for length in lengths)
    start = 0
    for told, part in zip(lengths, site.outputs, strict=False):
        length = part.dims[parted]
        for axis in set(range(part.rank)) - {parted}:
            site.tie(data, axis, part, axis)
        # Before operator set 13 the sizes are an attribute, which is left alone.
        if known and site.opset >= 13 and isinstance(data.dims[parted], int) and isinstance(length, int):
            site.tie(data, parted, part, parted, left_at=np.arange(start, start + length))
            site.follow(told.place, part, parted)
            start += length


def _slice(site: Site) -> None:
    """Tie the axes that are not sliced."""
    data, starts, axes = site.input(0), site.input(1), site.ints("axes", 3)
    if axes is None and starts is not None and site.input(3) is None and isinstance(starts.dims[0], int):
        axes = tuple(range(starts.dims[0]))
    if data is not None and axes is not None:
        for axis in set(range(data.rank)) - {axis % data.rank for axis in axes}:
            site.tie(data, axis, site.out, axis)


def _pad(site: Site) -> None:
    data, pads = site.input(0), site.ints("pads", 1)
    if data is None or pads is None or site.input(3) is not None or len(pads) != 2 * data.rank:
        return
    for axis in range(data.rank):
        if pads[axis] == pads[axis + data.rank] == 0:
            site.tie(data, axis, site.out, axis)


def _resize(site: Site) -> None:
    data = site.input(0)
    mode = site.node.attributes.get_string("coordinate_transformation_mode", "half_pixel")
    scales = site.constant(1 if site.node.op_type == "Upsample" or site.opset < 11 else 2)
    if data is None or scales is None or len(scales) != data.rank or mode == "tf_crop_and_resize":
        return
    for axis in range(data.rank):
        if scales[axis] == 1:
            site.tie(data, axis, site.out, axis)


def _shape(site: Site) -> None:
    """Only the lengths that are read matter, and an index of the result says which."""
    data = site.input(0)
    if data is None:
        return
    start = site.node.attributes.get_int("start", 0)
    described = list(range(data.rank))[start : site.node.attributes.get_int("end", data.rank)]
    read: set[int] = set()
    for reader in site.out.value.consumers():
        index = None if reader.op_type != "Gather" else Site(reader, site.slots, site.opset).constant(1)
        read |= set(described) if index is None else {described[int(item)] for item in np.ravel(index)}
    if site.out.value.is_graph_output():
        read = set(described)
    for axis in set(range(data.rank)) - read:
        site.free(data, axis)


ELEMENTWISE = (
    *("Abs", "Add", "And", "BitShift", "Cast", "Ceil", "Celu", "Clip", "Cos", "Div", "Dropout", "Elu", "Equal", "Erf"),
    *("Exp", "Floor", "Gelu", "Greater", "GreaterOrEqual", "HardSigmoid", "HardSwish", "Identity", "LeakyRelu"),
    *("Less", "LessOrEqual", "Log", "Max", "Mean", "Min", "Mish", "Mod", "Mul", "Neg", "Not", "Or", "PRelu", "Pow"),
    *("Reciprocal", "Relu", "Round", "Selu", "Sigmoid", "Sign", "Sin", "Softplus", "Softsign", "Sqrt", "Sub", "Sum"),
    *("Swish", "Tanh", "ThresholdedRelu", "Where", "Xor"),
)
REDUCTIONS = (
    *("ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin"),
    *("ReduceProd", "ReduceSum", "ReduceSumSquare"),
)

RULES: Mapping[str, Rule] = {
    **dict.fromkeys(ELEMENTWISE, _elementwise),
    **dict.fromkeys(("BatchNormalization", "InstanceNormalization"), _per_channel_norm),
    **dict.fromkeys(("LayerNormalization", "RMSNormalization"), _leading_axes),
    **dict.fromkeys(("Softmax", "LogSoftmax"), _softmax),
    **dict.fromkeys(("MaxPool", "AveragePool", "LpPool", "GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool"), _pool),
    **dict.fromkeys(REDUCTIONS, _reduce),
    **dict.fromkeys(("Resize", "Upsample"), _resize),
    "Concat": _concat,
    "Conv": _conv,
    "Flatten": flatten,
    "Gather": _gather,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "Pad": _pad,
    "Reshape": reshape,
    "Shape": _shape,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": squeeze,
    "Transpose": transpose,
    "Unsqueeze": unsqueeze,
}

REASONS: Mapping[str, str] = {
    **dict.fromkeys(REDUCTIONS, "reduces over the axis"),
    **dict.fromkeys(
        ("LayerNormalization", "RMSNormalization", "InstanceNormalization", "Softmax", "LogSoftmax"),
        "normalizes over the axis",
    ),
    "Conv": "a grouped convolution, neither dense nor depthwise",
    "MatMul": "both operands are computed",
    "Gemm": "both operands are computed",
    "Pad": "pads the axis",
    "Resize": "resizes the axis, or to sizes that name its length",
    "Upsample": "resizes the axis",
    "Shape": "its length is read as the model runs",
    "Slice": "slices the axis",
    "Split": "splits the axis at sizes that are computed",
    "Reshape": "merges or splits the axis other than block by block, or to a shape that is not known",
}
"""Why an axis that a rule left is held, for operators where one reason covers the usual case."""

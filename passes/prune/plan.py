"""Which channels go: the decision, made of groups, importance and calibration data."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from onnx_lathe.passes.edit import Refusal
from onnx_lathe.passes.prune.apply import Kept, PrunedGroup, PruneEdit
from onnx_lathe.passes.prune.groups import Consumer, Coupling, Group, Role, tensor_of
from onnx_lathe.passes.prune.literals import Place
from onnx_lathe.passes.prune.refit import Refitted, refit
from onnx_lathe.passes.prune.rules import couple
from onnx_lathe.passes.prune.score import Importance, check_samples, losses, scores, strengths
from onnx_lathe.runtime.errors import UnsupportedModelError
from onnx_lathe.runtime.samples import Samples

QUANTIZED = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "MatMulNBits")
"""Operators that only quantized graphs have, beside those called QLinear... and ...Integer."""


def plan(
    model: ir.Model,
    samples: Samples | None,
    *,
    ratio: float,
    multiple: int,
    importance: Importance,
    threshold: float,
    reconstruct: bool,
) -> PruneEdit:
    """Decide what to cut; see `onnx_lathe.passes.prune.request.Prune` for the options.

    Raises:
        UnsupportedModelError: The graph is quantized, or nothing can be cut.
        SamplesError: ``samples`` do not fit the model.
    """
    _refuse_quantized(model)
    check_samples(importance, samples)
    shaped = model.clone()
    ShapeInferencePass(check_type=False, strict_mode=False)(shaped)
    coupling = couple(shaped)
    if importance == "std":
        wanted = [int((strengths(group, coupling, shaped.graph) >= threshold).sum()) for group in coupling.groups]
    else:
        # The epsilon keeps (1 - 0.3) * 10 at 7.
        wanted = [math.ceil((1.0 - ratio) * _size(group) - 1e-9) for group in coupling.groups]
    counts = [_round_up(count, group, coupling, multiple) for group, count in zip(coupling.groups, wanted, strict=True)]
    cut = [(group, count) for group, count in zip(coupling.groups, counts, strict=True) if count < _size(group)]
    refused = [*coupling.refused, *_too_small(coupling.groups, wanted, counts, multiple)]
    if not cut:
        raise _nothing_to_cut(refused)

    axes = {(member.initializer, member.axis) for group, _ in cut for member in group.members}
    consumers = [item for item in coupling.consumers if (item.weight.name, item.axis) in axes]
    lost, unread = losses(shaped, consumers, samples, importance)
    removed: set[int] = set()
    for group, count in cut:
        by_weights = importance == "std"
        found = strengths(group, coupling, shaped.graph) if by_weights else scores(group, coupling, shaped.graph, lost)
        lowest = np.argsort(found, kind="stable")
        removed |= set(group.channels[lowest[: _size(group) - count]].tolist())
    kept = _kept(coupling, removed)
    weights = {name: stay for name, stay in kept.items() if name in shaped.graph.initializers}
    refitted = refit(shaped, consumers, weights, samples) if reconstruct and samples is not None else Refitted()
    return PruneEdit(
        groups=tuple(PrunedGroup(group.name, _size(group), count, group.members) for group, count in cut),
        kept=weights,
        consumed=_consumed(consumers),
        shapes={
            name: tuple(tensor_of(shaped.graph.initializers[name]).shape.numpy())
            for name in {**weights, **refitted.values}
        },
        dims={
            name: {axis: len(entries) for axis, entries in stay.items()}
            for name, stay in kept.items()
            if name not in weights
        },
        lengths=_lengths(coupling, kept),
        attributes={output: len(kept[data][1]) for output, data in coupling.attributes if 1 in kept.get(data, {})},
        new_values=refitted.values,
        refits=tuple(refitted.refits),
        refusals=(*refused, *unread, *refitted.refused),
    )


def _refuse_quantized(model: ir.Model) -> None:
    for node in model.graph:
        if node.op_type in QUANTIZED or node.op_type.startswith("QLinear") or node.op_type.endswith("Integer"):
            raise UnsupportedModelError(
                f"node {node.name or node.outputs[0].name!r}",
                got=f"{node.op_type}: the model is already quantized",
                expected="a model in floating point",
                mend="Prune the original, then quantize what is left.",
            )


def _size(group: Group) -> int:
    return len(group.channels)


def _round_up(wanted: int, group: Group, coupling: Coupling, multiple: int) -> int:
    """Return how many channels of a group stay where ``wanted`` shall: at least one.

    Rounded up so that what makes them has a multiple of ``multiple`` entries: widths that are no multiples of what the
    kernels take lose more than they save.
    """
    made = [member for member in group.members if member.role is Role.PRODUCES]
    widths = [
        int(np.isin(coupling.axes[member.initializer, member.axis], group.channels).sum()) // _size(group)
        for member in made
    ]
    step = math.lcm(*(multiple // math.gcd(multiple, width) for width in widths))
    return min(math.ceil(max(wanted, 1) / step) * step, _size(group))


def _too_small(groups: Sequence[Group], wanted: Sequence[int], counts: Sequence[int], multiple: int) -> list[Refusal]:
    return [
        Refusal(
            group.name,
            "group",
            f"{stay} of its {count} channels shall stay, rounded up to a multiple of {multiple} entries all of them",
        )
        for group, stay, count in zip(groups, wanted, counts, strict=True)
        if count == _size(group)
    ]


def _nothing_to_cut(refused: Sequence[Refusal]) -> UnsupportedModelError:
    shown = "; ".join(f"{item.node} ({item.operator}): {item.reason}" for item in refused[:5])
    more = f"; and {len(refused) - 5} more" if len(refused) > 5 else ""
    return UnsupportedModelError(
        "prune",
        got=f"a model with nothing to cut: {shown or 'no weights that make channels for others'}{more}",
        expected="channels that a weight makes and another sums over, away from the model's inputs and outputs",
        mend="Raise the ratio (or threshold) or lower the multiple where that is the reason; else leave pruning out.",
    )


def _kept(coupling: Coupling, removed: set[int]) -> dict[str, dict[int, tuple[int, ...]]]:
    """Return what stays along every axis that loses something."""
    gone = np.fromiter(removed, dtype=np.int64)
    kept: dict[str, dict[int, tuple[int, ...]]] = {}
    for (name, axis), channel in coupling.axes.items():
        stay = np.flatnonzero(~np.isin(channel, gone))
        if len(stay) < len(channel):
            kept.setdefault(name, {})[axis] = tuple(stay.tolist())
    return kept


def _consumed(consumers: Sequence[Consumer]) -> dict[str, tuple[int, ...]]:
    consumed: dict[str, tuple[int, ...]] = {}
    for consumer in consumers:
        name = consumer.weight.name or ""
        consumed[name] = tuple(dict.fromkeys((*consumed.get(name, ()), consumer.axis)))
    return consumed


def _lengths(coupling: Coupling, kept: Kept) -> dict[str, dict[Place, int]]:
    """Return all numbers that a node is told, for the nodes where one changes."""
    changed = {item.output for item in coupling.literals if item.axis in kept.get(item.value, {})}
    told: dict[str, dict[Place, int]] = {}
    for item in coupling.literals:
        if item.output in changed:
            stay = kept.get(item.value, {}).get(item.axis, coupling.axes[item.value, item.axis])
            told.setdefault(item.output, {})[item.place] = len(stay)
    return told

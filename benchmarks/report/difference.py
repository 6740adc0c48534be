"""What the passes made of the graph, summed up: operators, nodes and weights, before and after."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from onnx_lathe.benchmarks.report import text
from onnx_lathe.benchmarks.report.document import Row, Section, Table, columns, row
from onnx_lathe.benchmarks.report.model import Report
from onnx_lathe.benchmarks.report.text import ABSENT
from onnx_lathe.runtime.difference import GraphDifference, NodeChange, StoredForm, WeightChange

_ROWS_SHOWN = 20
_NAMES_SHOWN = 2

_TERMS = (
    "Nodes are found again by name, by the tensors that they write or read, and by their place.",
    "reads: an input comes from elsewhere than before.",
)
_WEIGHT_TERMS = (
    "Weights are found again by name, or as what the same node reads. Constants, scales and zero points count as "
    "weights. Values are not compared.",
)


def graph_difference(report: Report) -> Section | None:
    """Return what the graph that ships differs in from where its passes started; None where nothing differs."""
    found = report.difference
    if found is None or found.empty:
        return None
    lead = (
        f"From {found.before} to {found.after}: {_plural(found.nodes_kept, 'node')} and "
        f"{_plural(found.weights_kept, 'weight')} are as they were; all weights took "
        f"{text.size(found.weight_bytes_before)} and take {text.size(found.weight_bytes_after)}."
    )
    tables = [table for table in (_operators(found), _what_happened(found), _weights(found)) if table.rows]
    notes = (*(_TERMS if found.nodes else ()), *(_WEIGHT_TERMS if found.weights else ()))
    return Section("difference", "What changed in the graph", lead, tuple(tables), notes, folded=True)


def _operators(found: GraphDifference) -> Table:
    """Return the operators whose number changed, the largest change first."""
    before, after = found.operators_before, found.operators_after
    changes = {kind: after.get(kind, 0) - before.get(kind, 0) for kind in before.keys() | after.keys()}
    changed = sorted((kind for kind in changes if changes[kind]), key=lambda kind: (-abs(changes[kind]), kind))
    rows = [
        row(kind, f"{before.get(kind, 0):,}", f"{after.get(kind, 0):,}", f"{changes[kind]:+,}")
        for kind in changed[:_ROWS_SHOWN]
    ]
    if rest := changed[_ROWS_SHOWN:]:
        sums = [sum(side.get(kind, 0) for kind in rest) for side in (before, after)]
        rows.append(row(f"and {len(rest):,} more", *(f"{total:,}" for total in sums), f"{sums[1] - sums[0]:+,}"))
    totals = [sum(side.values()) for side in (before, after)]
    rows.append(row("all nodes", *(f"{total:,}" for total in totals), f"{totals[1] - totals[0]:+,}"))
    figures = ("before", "after", "change")
    return Table(columns("operator", *figures, numeric=figures), tuple(rows), "Operators whose number changed")


def _what_happened(found: GraphDifference) -> Table:
    shown, rest = found.nodes[:_ROWS_SHOWN], found.nodes[_ROWS_SHOWN:]
    rows = [row(*_told(change), f"{len(change.nodes):,}", _such_as(change.nodes)) for change in shown]
    if rest:
        rows.append(row(f"and {len(rest):,} more", "", f"{sum(len(change.nodes) for change in rest):,}", ""))
    heads = columns("operator", "what happened", "nodes", "such as", numeric=("nodes",))
    return Table(heads, tuple(rows), "What happened to nodes")


def _told(change: NodeChange) -> tuple[str, str]:
    """Return the operator of a group of nodes, and what happened to them."""
    if change.before is None:
        return change.after or ABSENT, "added"
    if change.after is None:
        return change.before, "removed"
    if change.before != change.after:
        return f"{change.before} → {change.after}", "replaced"
    return change.before, ", ".join(change.changes)


_Forms = tuple[str, str, str]


def _weights(found: GraphDifference) -> Table:
    """Group weights by their types and by what became of their shape, the most bytes first."""
    groups: dict[_Forms, list[WeightChange]] = defaultdict(list)
    for change in found.weights:
        groups[_forms(change)].append(change)
    ordered = sorted(groups.items(), key=lambda item: -max(_sizes(item[1])))
    rows = [_weight_row(forms, group) for forms, group in ordered[:_ROWS_SHOWN]]
    if rest := ordered[_ROWS_SHOWN:]:
        rows.append(_weight_row((f"and {len(rest):,} more", "", ""), [each for _, group in rest for each in group]))
    figures = ("weights", "bytes before", "bytes after")
    heads = columns("stored as", "what happened", "shape", *figures, "such as", numeric=figures)
    return Table(heads, tuple(rows), "What happened to weights")


def _weight_row(forms: _Forms, group: Sequence[WeightChange]) -> Row:
    names = [name for change in group for name in change.names]
    sizes = (text.size(size) if size else ABSENT for size in _sizes(group))
    return row(*forms, f"{len(names):,}", *sizes, _such_as(names))


def _forms(change: WeightChange) -> _Forms:
    """Return the types of a group of weights, what happened to it, and its shapes where they changed."""
    before, after = change.before, change.after
    if before is None or after is None:
        form = before or after
        return form.dtype if form else ABSENT, "gone" if after is None else "new", "any"
    dtype = before.dtype if before.dtype == after.dtype else f"{before.dtype} → {after.dtype}"
    if before.shape == after.shape:
        return dtype, "other type", "as before"
    happened = "other shape" if before.dtype == after.dtype else "other type and shape"
    return dtype, happened, f"{_shape(before)} → {_shape(after)}"


def _shape(form: StoredForm) -> str:
    return f"[{', '.join(map(str, form.shape))}]"


def _sizes(group: Sequence[WeightChange]) -> tuple[int, int]:
    """Return the bytes of the weights of a group before and after."""
    before = sum(len(change.names) * change.before.nbytes for change in group if change.before)
    return before, sum(len(change.names) * change.after.nbytes for change in group if change.after)


def _such_as(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMES_SHOWN]) + (", ..." if len(names) > _NAMES_SHOWN else "")


def _plural(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"

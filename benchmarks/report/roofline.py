"""How near each model came to what the machine could do, as a section."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from onnx_lathe.benchmarks.limits import ModelRoofline, OperatorShare, total_share
from onnx_lathe.benchmarks.report import text
from onnx_lathe.benchmarks.report.document import Row, Section, Table, columns, row
from onnx_lathe.benchmarks.report.model import Report
from onnx_lathe.benchmarks.report.text import ABSENT

_NODES_SHOWN = 10

_TERMS = (
    "Limit: the longer of the multiply-accumulates (MACs) at the peak of their element type and the bytes at the "
    "bandwidth (the roofline model of Williams, Waterman and Patterson, 2009). Peaks and bandwidth are what "
    "onnxruntime's own kernels were measured to reach on this machine.",
    "share of limit: the limit divided by the measured time; 100 % is as fast as the machine allows. Over 100 % the "
    "peak was measured too low for it: noise, or data that stayed in a nearer cache.",
    "bound by: arithmetic or memory, whichever the limit is; overhead where there is nothing to multiply or move; "
    "unknown where the arithmetic is not known or the node ran elsewhere than on the CPU.",
    "Bytes: each operand once, weights included. Times are the profiler's, which slows a run; MACs are of the executed "
    "kernels, padding included. Element by element work has no MACs.",
)


def roofline(report: Report) -> Section | None:
    """Return each operator's share of its limit, by model; None where no model was profiled."""
    if not report.rooflines:
        return None
    tables = tuple(table for model in report.rooflines for table in (_operators(model), _nodes(model)))
    notes = (*(_sentence(model) for model in report.rooflines), *_TERMS)
    lead = "How near each executed operator came to what this machine can do."
    return Section("roofline", "Share of the machine's limit", lead, tables, notes, folded=True)


def _sentence(model: ModelRoofline) -> str:
    peaks = (
        f"peaks of {_rate(model.float_rate)} (float32) and {_rate(model.integer_rate)} (uint8 with int8), "
        f"{text.size(round(model.bandwidth))}/s, {model.threads} thread{'s' if model.threads > 1 else ''}"
    )
    return f"{model.name}: {_percent(model.share)} of its limit over {_percent(model.known)} of the time; {peaks}."


def _operators(model: ModelRoofline) -> Table:
    kinds: dict[str, list[OperatorShare]] = defaultdict(list)
    for item in model.shares:
        kinds[item.op_type].append(item)
    longest = sorted(kinds.items(), key=lambda kind: -_seconds(kind[1]))
    rows = tuple(row(name, f"{len(items):,}", *_figures(items, model)) for name, items in longest)
    whole = row("all nodes", f"{len(model.shares):,}", *_figures(model.shares, model))
    return _table(("operator",), ("nodes",), (*rows, whole), f"{model.name}, by operator")


def _nodes(model: ModelRoofline) -> Table:
    rows = tuple(row(item.node, item.op_type, *_figures([item], model)) for item in model.shares[:_NODES_SHOWN])
    return _table(("node", "operator"), (), rows, f"{model.name}, the nodes that take longest")


def _table(names: Sequence[str], counts: Sequence[str], rows: tuple[Row, ...], caption: str) -> Table:
    figures = (*counts, "MACs", "bytes", "time", "share of run", "share of limit")
    return Table(columns(*names, *figures, "bound by", numeric=figures), rows, caption)


def _figures(items: Sequence[OperatorShare], model: ModelRoofline) -> Iterator[str]:
    """Yield the figures of some nodes together; a sum of which a part is unknown is unknown."""
    macs, nbytes = ([item.macs for item in items], [item.nbytes for item in items])
    seconds = _seconds(items)
    yield ABSENT if None in macs else text.count(sum(filter(None, macs)))
    yield ABSENT if None in nbytes else text.size(sum(filter(None, nbytes)))
    yield text.seconds(seconds)
    yield _percent(seconds / model.seconds if model.seconds else None)
    yield _percent(total_share(items))
    yield _bound(items)


def _bound(items: Sequence[OperatorShare]) -> str:
    """Return what most of the time of some nodes is bound by."""
    seconds: dict[str, float] = defaultdict(float)
    for item in items:
        seconds[item.bound] += item.seconds
    return max(seconds, key=seconds.__getitem__, default=ABSENT)


def _seconds(items: Sequence[OperatorShare]) -> float:
    return sum(item.seconds for item in items)


def _percent(share: float | None) -> str:
    return ABSENT if share is None else f"{100 * share:.1f} %"


def _rate(rate: float) -> str:
    return f"{text.figure(rate / 1e9)} GMAC/s"

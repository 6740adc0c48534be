"""What ``lathe bench`` found, as sections: latencies, limits, and what became of a gate."""

from __future__ import annotations

from collections.abc import Sequence

from onnx_lathe.benchmarks.gate import Gate, OperatorChange
from onnx_lathe.benchmarks.report import text
from onnx_lathe.benchmarks.report.document import Section, Table, columns, row
from onnx_lathe.benchmarks.report.text import ABSENT, Cell
from onnx_lathe.benchmarks.result import Interval, Timing
from onnx_lathe.benchmarks.stats import least_samples
from onnx_lathe.benchmarks.suite import Case

_OPERATORS_SHOWN = 5


def latencies(case: Case) -> Section:
    """Return the models of a case: latencies, memory, starts and verdicts; then each one's share of the limits."""
    measurement = case.measurement
    verdicts = {comparison.name: comparison for comparison in measurement.comparisons}
    unit = text.time_unit(timing.p50.value for timing in measurement.timings)
    figures = ("p50", "p90", "p99", "p99.9", "peak memory", "session", "cold start", "speed")
    rows = [
        row(
            timing.name,
            text.duration(timing.p50, unit),
            *(_percentile(found, quantile, timing, unit) for found, quantile in _tails(timing)),
            text.size(timing.peak_memory),
            text.seconds(timing.start_seconds),
            ABSENT if timing.cold_start_seconds is None else text.seconds(timing.cold_start_seconds),
            text.judged_speed(verdicts[timing.name]) if timing.name in verdicts else "1",
        )
        for timing in measurement.timings
    ]
    tables = [Table(columns("model", *figures, numeric=figures), tuple(rows), case.title)]
    if case.rooflines:
        tables.append(_limits(case))
    notes = [f"{each.name}: {each.verdict}, {each.reason}." for each in measurement.comparisons]
    return Section("latency", "Latency", "", tuple(tables), tuple(notes))


def gates(found: Sequence[Gate], limit: float) -> Section:
    """Return what became of the limit of every model in every case, and where a slower one lost its time."""
    rows = tuple(
        row(each.case, each.model, each.baseline, text.slower(each.slowdown), each.outcome, each.reason)
        for each in found
    )
    heads = columns("case", "model", "against", "slower by", "outcome", "why", numeric=("slower by",))
    tables = [Table(heads, rows, f"At most {100 * limit:g} % slower")]
    tables += [_changes(each.model, each.operators) for each in found if each.outcome != "kept" and each.operators]
    return Section("gate", "Against the baseline", "", tuple(tables))


def _tails(timing: Timing) -> tuple[tuple[Interval | None, float], ...]:
    return (timing.p90, 0.9), (timing.p99, 0.99), (timing.p999, 0.999)


def _percentile(found: Interval | None, quantile: float, timing: Timing, unit: text.Unit) -> Cell:
    """Return a percentile, or how many values it lacks: a guess is never printed."""
    if found is not None:
        return text.duration(found, unit)
    values = sum(len(block) for process in timing.blocks for block in process)
    return Cell(ABSENT, note=f"{values:,} of {least_samples(quantile):,} values")


def _limits(case: Case) -> Table:
    """Return each model's and its slowest operators' share of what the machine could do."""
    rows = [
        row(
            roofline.name,
            f"{share.op_type} {share.node}",
            text.seconds(share.seconds),
            ABSENT if share.share is None else f"{100 * share.share:.0f} %",
            share.bound,
        )
        for roofline in case.rooflines
        for share in roofline.shares[:_OPERATORS_SHOWN]
    ]
    rows += [
        row(
            each.name, "all", text.seconds(sum(share.seconds for share in each.shares)), f"{100 * each.share:.0f} %", ""
        )
        for each in case.rooflines
        if each.share is not None
    ]
    figures = ("time", "share of its limit")
    caption = "The longest operators (profiled) against the machine's peaks"
    return Table(columns("model", "operator", *figures, "bound by", numeric=figures), tuple(rows), caption)


def _changes(model: str, changes: Sequence[OperatorChange]) -> Table:
    rows = tuple(
        row(change.op_type, *(text.seconds(part) for part in (change.before, change.now)), _signed(change))
        for change in changes[:_OPERATORS_SHOWN]
    )
    figures = ("before", "now", "change")
    return Table(columns("operator", *figures, numeric=figures), rows, f"{model}: where the time went (profiled)")


def _signed(change: OperatorChange) -> str:
    return ("+" if change.now >= change.before else "-") + text.seconds(abs(change.now - change.before))

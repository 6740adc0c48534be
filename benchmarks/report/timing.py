"""What ``lathe bench`` found, as sections: latencies, load, and limits."""

from __future__ import annotations

from collections.abc import Sequence

from onnx_lathe.benchmarks.gate import Gate, OperatorChange
from onnx_lathe.benchmarks.queueing import Percentile, Responses
from onnx_lathe.benchmarks.report import text
from onnx_lathe.benchmarks.report.document import Row, Section, Table, columns, row
from onnx_lathe.benchmarks.report.text import ABSENT, Cell
from onnx_lathe.benchmarks.result import Interval, Timing
from onnx_lathe.benchmarks.scenarios import MaxRate, OfflineResult, ServerResult
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


def throughputs(title: str, result: OfflineResult) -> Section:
    """Return the offline scenario: samples per second."""
    verdicts = {comparison.name: comparison for comparison in result.comparisons}
    rows = tuple(
        row(
            each.name,
            _rate(each.throughput),
            text.size(each.peak_memory),
            text.seconds(each.start_seconds),
            text.judged_speed(verdicts[each.name]) if each.name in verdicts else "1",
        )
        for each in result.subjects
    )
    figures = ("samples/s", "peak memory", "session", "speed")
    table = Table(columns("model", *figures, numeric=figures), rows, f"offline, {title}, {_streams(result.streams)}")
    notes = tuple(f"{each.name}: {each.verdict}, {each.reason}." for each in result.comparisons)
    return Section("offline", "Throughput", "", (table,), notes)


def responses(title: str, result: ServerResult) -> Section:
    """Return the server scenario: latencies from the time at which a query was to arrive."""
    quantiles = ("p50", "p90", "p95", "p99", "p99.9")
    rows = tuple(_response(each) for each in result.subjects)
    figures = ("load", "achieved", *quantiles)
    caption = f"server, {title}, {result.rate:.4g} queries/s, {_streams(result.traffic.streams)}"
    notes = [f"{each.name}: overloaded, {each.overloaded}." for each in result.subjects if each.overloaded]
    notes += [
        f"{each.name}: {text.seconds(each.bound.bound.seconds)} are {each.bound.verdict}, {each.bound.reason}."
        for each in result.subjects
        if each.bound is not None
    ]
    notes += [f"{each.name}: {note}" for each in result.subjects for note in each.notes]
    notes += [
        f"{each.name}: no p{100 * found.quantile:g}, {found.reason}."
        for each in result.subjects
        for found in each.percentiles
        if found.value is None
    ]
    table = Table(columns("model", *figures, numeric=figures), rows, caption)
    return Section("server", "Latency under load", "", (table,), tuple(notes))


def highest_rates(title: str, results: Sequence[MaxRate]) -> Section:
    """Return the highest rate of each model that keeps the bound of the latency."""
    rows = tuple(
        row(
            _name(result),
            "none" if result.rate is None else f"{result.rate:.4g}/s",
            f"{result.not_met:.4g}/s",
            _rate(result.offline.subjects[0].throughput),
        )
        for result in results
    )
    figures = ("bound kept at", "not kept at", "offline samples/s")
    table = Table(columns("model", *figures, numeric=figures), rows, f"server, {title}")
    return Section("rate", "Highest rate", "", (table,))


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


def under_load(title: str, result: ServerResult | Sequence[MaxRate]) -> Section:
    """Return the server scenario at one rate, or the highest rate of each model."""
    return responses(title, result) if isinstance(result, ServerResult) else highest_rates(title, result)


def bounds_missed(result: ServerResult | Sequence[MaxRate]) -> list[str]:
    """Return what did not keep the bound of its latency, or could not be shown to."""
    if isinstance(result, ServerResult):
        checks = [(each.name, each.bound) for each in result.subjects if each.bound is not None]
        return [f"{name}: {check.verdict}, {check.reason}" for name, check in checks if check.verdict != "met"]
    return [f"{_name(each)}: no rate keeps the bound" for each in result if each.rate is None]


def _streams(count: int) -> str:
    return f"{count} stream{'s' if count > 1 else ''}"


def _name(found: MaxRate) -> str:
    return found.offline.subjects[0].name


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


def _response(each: Responses) -> Row:
    cells = [_loaded(found) for found in each.percentiles] or [Cell(ABSENT)] * 5
    return row(each.name, f"{each.load:.2f}", f"{each.achieved:.4g}/s", *cells)


def _loaded(found: Percentile) -> Cell:
    return Cell(ABSENT) if found.value is None else text.duration(found.value)


def _changes(model: str, changes: Sequence[OperatorChange]) -> Table:
    rows = tuple(
        row(change.op_type, *(text.seconds(part) for part in (change.before, change.now)), _signed(change))
        for change in changes[:_OPERATORS_SHOWN]
    )
    figures = ("before", "now", "change")
    return Table(columns("operator", *figures, numeric=figures), rows, f"{model}: where the time went (profiled)")


def _signed(change: OperatorChange) -> str:
    return ("+" if change.now >= change.before else "-") + text.seconds(abs(change.now - change.before))


def _rate(interval: Interval) -> Cell:
    low, high = (f"{part:,.4g}" for part in (interval.low, interval.high))
    return Cell(f"{interval.value:,.4g}", f"[{low}, {high}]")

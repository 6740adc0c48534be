"""What ``lathe bench --scenario`` found, as sections: throughput, latencies under load, and the highest rates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from onnx_lathe.benchmarks.load_suite import LoadCase, LoadResult, LoadSuite
from onnx_lathe.benchmarks.queueing import QUANTILES, Percentile, Responses
from onnx_lathe.benchmarks.report import text
from onnx_lathe.benchmarks.report.document import Row, Section, Table, columns, row
from onnx_lathe.benchmarks.report.text import ABSENT, Cell
from onnx_lathe.benchmarks.result import Interval
from onnx_lathe.benchmarks.scenarios import MaxRate, OfflineResult, ServerResult


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
    rows = tuple(_response(each) for each in result.subjects)
    figures = ("load", "achieved", *map(_quantile, QUANTILES))
    caption = f"server, {title}, {result.rate:.4g} queries/s, {_streams(result.traffic.streams)}"
    notes = [f"{each.name}: overloaded, {each.overloaded}." for each in result.subjects if each.overloaded]
    notes += [
        f"{each.name}: {text.seconds(each.bound.bound.seconds)} are {each.bound.verdict}, {each.bound.reason}."
        for each in result.subjects
        if each.bound is not None
    ]
    notes += [f"{each.name}: {note}" for each in result.subjects for note in each.notes]
    notes += [
        f"{each.name}: no {_quantile(found.quantile)}, {found.reason}."
        for each in result.subjects
        for found in each.percentiles
        if found.value is None
    ]
    tables = [Table(columns("model", *figures, numeric=figures), rows, caption)]
    tables += [_comparisons(result)] if result.comparisons else []
    return Section("server", "Latency under load", "", tuple(tables), tuple(notes))


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


def under_load(case: LoadCase) -> Section:
    """Return what was found of a case, whatever was looked for."""
    title, result = case.conditions.title, case.result
    if isinstance(result, OfflineResult):
        return throughputs(title, result)
    return responses(title, result) if isinstance(result, ServerResult) else highest_rates(title, result)


def loads(suites: Sequence[LoadSuite]) -> Section:
    """Return several results, each table under the time at which it was taken."""
    found = [(suite.taken, under_load(case)) for suite in suites for case in suite.cases]
    tables = [
        replace(table, caption=f"{taken}: {table.caption}") for taken, section in found for table in section.tables
    ]
    notes = [f"{taken}: {note}" for taken, section in found for note in section.notes]
    return Section("load", "Under load", f"{_counted(suites)}, raw times kept.", tuple(tables), tuple(notes))


def bounds_missed(result: LoadResult) -> list[str]:
    """Return what did not keep the bound of its latency, or could not be shown to."""
    if isinstance(result, OfflineResult):
        return []
    if isinstance(result, ServerResult):
        checks = [(each.name, each.bound) for each in result.subjects if each.bound is not None]
        return [f"{name}: {check.verdict}, {check.reason}" for name, check in checks if check.verdict != "met"]
    return [f"{_name(each)}: no rate keeps the bound" for each in result if each.rate is None]


def _counted(suites: Sequence[LoadSuite]) -> str:
    return f"{len(suites):,} result{'s' if len(suites) > 1 else ''}"


def _comparisons(result: ServerResult) -> Table:
    """Return who answers faster under the same arrivals."""
    rows = tuple(
        row(each.name, each.against, _quantile(each.quantile), text.speed(each.speed), each.verdict, each.reason)
        for each in result.comparisons
    )
    heads = columns("model", "against", "percentile", "speed", "verdict", "why", numeric=("speed",))
    return Table(heads, rows, "Latency under the same arrivals, by percentiles of runs")


def _quantile(quantile: float) -> str:
    return f"p{100 * quantile:g}"


def _streams(count: int) -> str:
    return f"{count} stream{'s' if count > 1 else ''}"


def _name(found: MaxRate) -> str:
    return found.offline.subjects[0].name


def _response(each: Responses) -> Row:
    cells = [_loaded(found) for found in each.percentiles] or [Cell(ABSENT)] * 5
    return row(each.name, f"{each.load:.2f}", f"{each.achieved:.4g}/s", *cells)


def _loaded(found: Percentile) -> Cell:
    return Cell(ABSENT) if found.value is None else text.duration(found.value)


def _rate(interval: Interval) -> Cell:
    low, high = (f"{part:,.4g}" for part in (interval.low, interval.high))
    return Cell(f"{interval.value:,.4g}", f"[{low}, {high}]")

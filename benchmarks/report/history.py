"""A file of results as a page: each model in each case over time, and where it changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from onnx_lathe.benchmarks.history import Point, Result, Series, series
from onnx_lathe.benchmarks.load_suite import LoadSuite
from onnx_lathe.benchmarks.report import text
from onnx_lathe.benchmarks.report.document import Document, Row, Section, Table, columns, row
from onnx_lathe.benchmarks.report.load import loads
from onnx_lathe.benchmarks.report.model import Report
from onnx_lathe.benchmarks.report.plots import SERIES, Plot, Value, escape, plain_layout
from onnx_lathe.benchmarks.report.text import ABSENT, Cell
from onnx_lathe.benchmarks.suite import Suite

HISTORY = "history"
"""The key of the section whose plots `history_plots` draws."""

_HEIGHT = 340
_AGAINST = "each result against the one before, where both can be compared"
_NOTES = (
    "change: against the result before, by the medians of fresh processes, with its 95 % interval; + is slower.",
    "Results of unlike environments, or of a machine in another state (by the canary), are not compared.",
    "changed file: the model file differs from the one before, whatever its name.",
)


def history(results: Sequence[Result]) -> tuple[Section, ...]:
    """Return the results of a file: latencies over time, and what was found under load."""
    suites, loaded = _split(results)
    lead = f"{len(suites):,} result{'s' if len(suites) > 1 else ''}, raw samples kept."
    return (*([timeline(suites, lead)] if suites else []), *([loads(loaded)] if loaded else []))


def timeline(suites: Sequence[Suite], lead: str) -> Section:
    """Return each case as a table of its models over time."""
    found = series(suites)
    titles = dict.fromkeys(each.case for each in found)
    tables = tuple(_table(title, [each for each in found if each.case == title]) for title in titles)
    return Section(HISTORY, "Latency over time", lead, tables, _NOTES)


def report_history(report: Report) -> Section | None:
    """Return what the same output held before; None where this is the first."""
    if len(report.history) < 2:
        return None
    lead = f"{len(report.history):,} results made here, of the original and of what shipped, each measured by itself."
    return timeline(report.history, lead)


def changes(results: Sequence[Result]) -> list[dict[str, object]]:
    """Return every result that is slower or faster than the one before, JSON-able."""
    return [
        {"case": each.case, "model": each.model, "taken": point.taken, "verdict": point.verdict, "reason": point.reason}
        for each in series(_split(results)[0])
        for point in each.points
        if point.verdict in ("slower", "faster")
    ]


def history_document(name: str, results: Sequence[Result]) -> Document:
    """Return the page."""
    alone, _ = _split(results)
    slower = sum(change["verdict"] == "slower" for change in changes(results))
    times = "slower once" if slower == 1 else f"slower {slower} times" if slower else "never slower"
    return Document(
        title=f"History of {name}",
        status=times if alone else "under load",
        meaning=_AGAINST if alone else "each result by itself",
        verdict=f"From {results[0].taken} to {results[-1].taken}.",
        reason="",
        headlines=(),
        warnings=(),
        sections=history(results),
    )


def history_plots(results: Sequence[Result]) -> dict[str, tuple[Plot, ...]]:
    """Return a plot of each case over time."""
    found = series(_split(results)[0])
    titles = dict.fromkeys(each.case for each in found)
    return {HISTORY: tuple(_plot(title, [each for each in found if each.case == title]) for title in titles)}


def _split(results: Sequence[Result]) -> tuple[list[Suite], list[LoadSuite]]:
    """Return the results of models that ran alone, and of those under load."""
    alone = [result for result in results if isinstance(result, Suite)]
    return alone, [result for result in results if isinstance(result, LoadSuite)]


def _table(title: str, found: Sequence[Series]) -> Table:
    judged = any(point.accuracy is not None for each in found for point in each.points)
    figures = ("p50", "change", *(["accuracy"] if judged else []))
    rows = tuple(_row(each.model, point, judged) for each in found for point in each.points)
    return Table(columns("model", "taken", *figures, "verdict", "why", numeric=figures), rows, title)


def _row(model: str, point: Point, judged: bool) -> Row:
    change = ABSENT if point.change is None else text.slower(point.change)
    accuracy = [_accuracy(point)] if judged else []
    return row(model, point.taken, text.duration(point.latency), change, *accuracy, point.verdict, point.reason)


def _accuracy(point: Point) -> Cell:
    if point.accuracy is None:
        return Cell(ABSENT)
    return replace(text.percent(point.accuracy), note="" if point.metric == "accuracy" else point.metric)


def _plot(title: str, found: Sequence[Series]) -> Plot:
    unit = text.time_unit(point.latency.value for each in found for point in each.points)
    data = [_line(each, number, unit[0]) for number, each in enumerate(found)]
    layout = plain_layout(_HEIGHT + 20 * len(found), "taken (UTC)", f"p50 ({unit[1]})")
    layout["yaxis"]["rangemode"] = "tozero"
    note = "Lower is faster. Whiskers: 95 % interval. An open mark: another environment, not compared."
    return Plot(escape(title), note, {"data": data, "layout": layout})


def _line(each: Series, number: int, scale: float) -> Value:
    intervals = [point.latency for point in each.points]
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": escape(each.model),
        "x": [point.taken for point in each.points],
        "y": [interval.value / scale for interval in intervals],
        "error_y": {
            "type": "data",
            "symmetric": False,
            "array": [(interval.high - interval.value) / scale for interval in intervals],
            "arrayminus": [(interval.value - interval.low) / scale for interval in intervals],
            "thickness": 1.5,
            "width": 4,
        },
        "line": {"color": SERIES[number % len(SERIES)], "width": 2},
        "marker": {
            "size": 9,
            "symbol": ["circle" if point.comparable else "circle-open" for point in each.points],
        },
        "hovertemplate": f"%{{x}}: %{{y:.4g}}<extra>{escape(each.model)}</extra>",
    }

"""A file of results as a page: each model in each case over time, and where it changed."""

from __future__ import annotations

from collections.abc import Sequence

from onnx_lathe.benchmarks.history import Point, Series, series
from onnx_lathe.benchmarks.report import text
from onnx_lathe.benchmarks.report.document import Document, Row, Section, Table, columns, row
from onnx_lathe.benchmarks.report.plots import SERIES, Plot, Value, escape, plain_layout
from onnx_lathe.benchmarks.report.text import ABSENT
from onnx_lathe.benchmarks.suite import Suite

_HEIGHT = 340
_KEY = "history"


def history(suites: Sequence[Suite]) -> tuple[Section, ...]:
    """Return each case as a table of its models over time."""
    found = series(suites)
    titles = dict.fromkeys(each.case for each in found)
    tables = tuple(_table(title, [each for each in found if each.case == title]) for title in titles)
    notes = (
        "change: against the result before, by the medians of fresh processes, with its 95 % interval; + is slower.",
        "Results of unlike environments, or of a machine in another state (by the canary), are not compared.",
        "changed file: the model file differs from the one before, whatever its name.",
    )
    lead = f"{len(suites):,} result{'s' if len(suites) > 1 else ''}, raw samples kept."
    return (Section(_KEY, "Latency over time", lead, tables, notes),)


def changes(suites: Sequence[Suite]) -> list[dict[str, object]]:
    """Return every result that is slower or faster than the one before, JSON-able."""
    return [
        {"case": each.case, "model": each.model, "taken": point.taken, "verdict": point.verdict, "reason": point.reason}
        for each in series(suites)
        for point in each.points
        if point.verdict in ("slower", "faster")
    ]


def history_document(name: str, suites: Sequence[Suite]) -> Document:
    """Return the page."""
    slower = sum(change["verdict"] == "slower" for change in changes(suites))
    return Document(
        title=f"History of {name}",
        status="slower once" if slower == 1 else f"slower {slower} times" if slower else "never slower",
        meaning="each result against the one before, where both can be compared",
        verdict=f"From {suites[0].taken} to {suites[-1].taken}.",
        reason="",
        headlines=(),
        warnings=(),
        sections=history(suites),
    )


def history_plots(suites: Sequence[Suite]) -> dict[str, tuple[Plot, ...]]:
    """Return a plot of each case."""
    found = series(suites)
    titles = dict.fromkeys(each.case for each in found)
    return {_KEY: tuple(_plot(title, [each for each in found if each.case == title]) for title in titles)}


def _table(title: str, found: Sequence[Series]) -> Table:
    rows = tuple(_row(each.model, point) for each in found for point in each.points)
    figures = ("p50", "change")
    return Table(columns("model", "taken", *figures, "verdict", "why", numeric=figures), rows, title)


def _row(model: str, point: Point) -> Row:
    change = ABSENT if point.change is None else text.slower(point.change)
    return row(model, point.taken, text.duration(point.latency), change, point.verdict, point.reason)


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

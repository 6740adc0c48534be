"""The plots, as plotly's JSON: plain values, so that nothing but plotly's own script is needed to draw them.

A colour is written as the name of a CSS variable of the page, such as ``--accent``, whose value its theme gives.
"""

from __future__ import annotations

import html
import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnx_lathe.benchmarks.report.ladder import accuracy_of, file_unit, reference_of, speed_of, timing_of
from onnx_lathe.benchmarks.report.model import Curve, MeasuredShape, Report, Rung
from onnx_lathe.benchmarks.report.text import clean, percent, size, speed, time_unit
from onnx_lathe.benchmarks.result import Interval, Timing

SERIES = ("--series-1", "--series-2", "--series-3", "--series-4", "--series-5", "--series-6")
ACCENT, QUIET, INK, FAINT = "--accent", "--quiet", "--ink", "--faint"

_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "triangle-down")
_DASHES = ("solid", "dash", "dot", "dashdot")
_WRAP = 22
_ROW_PIXELS = 52
_LINE_PIXELS = 19
_LOGARITHMIC_BEYOND = 10.0
"""Ratio of the slowest to the fastest beyond which times are drawn on a logarithmic axis."""

Value = dict[str, Any]


@dataclass(frozen=True)
class Plot:
    """A plot: what it shows, how to read it, and plotly's figure with ``data`` and ``layout``."""

    title: str
    note: str
    figure: Value


def plots(report: Report) -> dict[str, tuple[Plot, ...]]:
    """Return the plots of each section, by its key."""
    drawn: list[Plot] = []
    for shape in report.shapes:
        drawn += [_speeds(report, shape), _distributions(report, shape)]
        trade_off = _trade_off(report, shape)
        drawn += [trade_off] if trade_off else []
    sizes = _sizes(report)
    drawn += [sizes] if sizes else []
    learning = (_scores(report.curves), _losses(report.curves)) if report.curves else ()
    return {"ladder": tuple(drawn), "training": learning}


def _speeds(report: Report, shape: MeasuredShape) -> Plot:
    reference = reference_of(shape)
    names = [timing.name for timing in _in_order(report, shape)]
    found = {name: comparison.speed for name in names if (comparison := speed_of(shape, name))}
    ratios = [found.get(name, Interval(1.0, 1.0, 1.0)) for name in names]
    labels = [_label(name, speed(ratio).value) for name, ratio in zip(names, ratios, strict=True)]
    bars = _bars(labels, [ratio.value for ratio in ratios], _highlighted(report, names))
    bars["error_x"] = _errors(ratios, 1.0)
    bars["hovertext"] = [f"{label}<br>{speed(ratio).interval}" for label, ratio in zip(labels, ratios, strict=True)]
    layout = _rows_layout(labels, "speed (times)")
    layout["shapes"] = [_line(x0=1, x1=1, yref="paper", y0=0, y1=1)]
    title = f"Speed against {clean(reference)}, {clean(shape.name)}"
    return Plot(title, "Longer is faster. Whiskers: 95 % interval.", {"data": [bars], "layout": layout})


def _distributions(report: Report, shape: MeasuredShape) -> Plot:
    timings = _in_order(report, shape)
    scale, unit = time_unit(timing.p50.value for timing in timings)
    labels = [_label(timing.name) for timing in timings]
    colours = _highlighted(report, [timing.name for timing in timings])
    boxes = [_box(timing, label, scale, colour) for timing, label, colour in zip(timings, labels, colours, strict=True)]
    medians = [
        (float(np.median(np.concatenate(process))) / scale, label)
        for timing, label in zip(timings, labels, strict=True)
        for process in timing.blocks
    ]
    dots: Value = {
        "type": "scatter",
        "mode": "markers",
        "x": [median for median, _ in medians],
        "y": [label for _, label in medians],
        "marker": {"color": INK, "size": 5, "opacity": 0.7},
        "hovertemplate": f"median of a process: %{{x:.4g}} {unit}<extra></extra>",
    }
    layout = _rows_layout(labels, f"latency ({unit})")
    slowest, fastest = (pick(timing.p50.value for timing in timings) for pick in (max, min))
    layout["xaxis"] |= {"type": "log"} if slowest > _LOGARITHMIC_BEYOND * fastest else {"rangemode": "tozero"}
    note = "Box: the middle half of all calls. Whiskers: 5 % to 95 % of them. Dots: the median of each process."
    return Plot(f"Latency of single calls, {clean(shape.name)}", note, {"data": [*boxes, dots], "layout": layout})


def _trade_off(report: Report, shape: MeasuredShape) -> Plot | None:
    """Draw accuracy against latency with the Pareto front; None where no accuracy is known."""
    rungs = [
        (rung, accuracy, timing.p50)
        for rung in report.rungs
        if (accuracy := accuracy_of(report, rung.name)) and (timing := timing_of(shape, rung.name))
    ]
    if not rungs or report.metric is None:
        return None
    scale, unit = time_unit(latency.value for _, _, latency in rungs)
    front = pareto_front([(latency.value / scale, 100 * accuracy.value) for _, accuracy, latency in rungs])
    data = [_front(front)]
    for number, (rung, accuracy, latency) in enumerate(rungs):
        colour = SERIES[number % len(SERIES)]
        point = _point(rung, number)
        point |= {"x": [latency.value / scale], "error_x": _errors([latency], 1 / scale, colour)}
        point |= {"y": [100 * accuracy.value], "error_y": _errors([accuracy], 100, colour)}
        point["hovertemplate"] = f"%{{x:.4g}} {unit}, {percent(accuracy).text}<extra>{_label(rung.name)}</extra>"
        data.append(point)
    layout = plain_layout(380 + _LINE_PIXELS * len(data), f"median latency ({unit})", f"{escape(report.metric)} (%)")
    layout["xaxis"]["rangemode"] = "tozero"
    note = (
        "Up and to the left is better. Whiskers: 95 % intervals. "
        "Pareto front: nothing else is both as fast and more accurate."
    )
    budget = _budget(report)
    if budget is not None:
        layout["shapes"] = [_line(xref="paper", x0=0, x1=1, y0=budget, y1=budget)]
        layout["annotations"] = [_remark("least allowed", xref="paper", x=1, y=budget)]
        note += " Dashed: the original's score less the budget."
    title = f"{clean(report.metric).capitalize()} against latency, {clean(shape.name)}"
    return Plot(title, note, {"data": data, "layout": layout})


def _front(points: Sequence[tuple[float, float]]) -> Value:
    return {
        "type": "scatter",
        "mode": "lines",
        "name": "Pareto front",
        "x": [latency for latency, _ in points],
        "y": [accuracy for _, accuracy in points],
        "line": {"color": QUIET, "width": 2, "dash": "dot", "shape": "hv"},
        "hoverinfo": "skip",
    }


def _point(rung: Rung, number: int) -> Value:
    """Return the mark of a rung: a star for what ships, else a symbol and a colour of its own."""
    symbol = "star" if rung.chosen else _SYMBOLS[number % len(_SYMBOLS)]
    return {
        "type": "scatter",
        "mode": "markers",
        "name": _wrapped(rung.name, 2 * _WRAP) + (" (ships)" if rung.chosen else ""),
        "marker": {"color": SERIES[number % len(SERIES)], "symbol": symbol, "size": 16 if rung.chosen else 11},
    }


def _sizes(report: Report) -> Plot | None:
    known = [(rung, rung.file_bytes) for rung in report.rungs if rung.file_bytes is not None]
    if len(known) < 2:
        return None
    scale, unit = file_unit(report)
    labels = [_label(rung.name, size(bytes_, (scale, unit))) for rung, bytes_ in known]
    colours = _highlighted(report, [rung.name for rung, _ in known])
    bars = _bars(labels, [bytes_ / scale for _, bytes_ in known], colours)
    bars["hovertext"] = labels
    figure: Value = {"data": [bars], "layout": _rows_layout(labels, f"file size ({unit})")}
    return Plot("Size of the model file", "With the weights beside it. Shorter is smaller.", figure)


def _scores(curves: Sequence[Curve]) -> Plot:
    where = " and ".join(dict.fromkeys(clean(curve.scored_on) for curve in curves))
    data = _epochs(curves, lambda curve: [100 * score for score in curve.scores])
    layout = plain_layout(320 + _LINE_PIXELS * len(curves), "epoch", "score (%)")
    return Plot(f"Score after each epoch, on {where}", "Higher is better.", {"data": data, "layout": layout})


def _losses(curves: Sequence[Curve]) -> Plot:
    data = _epochs(curves, lambda curve: list(curve.losses))
    layout = plain_layout(320 + _LINE_PIXELS * len(curves), "epoch", "loss (log scale)")
    if all(loss > 0 for curve in curves for loss in curve.losses):
        layout["yaxis"]["type"] = "log"
    else:
        layout["yaxis"]["title"]["text"] = "loss"
    return Plot(
        "Training loss",
        "Each network's own loss: compare its course, not its height.",
        {"data": data, "layout": layout},
    )


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points (latency, accuracy) than which none is both as fast and more accurate, by latency."""
    front: list[tuple[float, float]] = []
    for latency, accuracy in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or accuracy > front[-1][1]:
            front.append((latency, accuracy))
    return front


def _epochs(curves: Sequence[Curve], values: Callable[[Curve], list[float]]) -> list[Value]:
    return [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": _wrapped(curve.name, 2 * _WRAP),
            "x": list(range(1, len(values(curve)) + 1)),
            "y": values(curve),
            "line": {"color": SERIES[number % len(SERIES)], "dash": _DASHES[number % len(_DASHES)], "width": 2},
            "marker": {"symbol": _SYMBOLS[number % len(_SYMBOLS)], "size": 6},
            "hovertemplate": f"epoch %{{x}}: %{{y:.4g}}<extra>{_label(curve.name)}</extra>",
        }
        for number, curve in enumerate(curves)
    ]


def _bars(labels: list[str], values: list[float], colours: list[str]) -> Value:
    return {
        "type": "bar",
        "orientation": "h",
        "x": values,
        "y": labels,
        "marker": {"color": colours},
        "width": 0.55,
        "hoverinfo": "text",
    }


def _box(timing: Timing, label: str, scale: float, colour: str) -> Value:
    values = np.concatenate([block for process in timing.blocks for block in process]) / scale
    low, q1, median, q3, high = (float(value) for value in np.quantile(values, [0.05, 0.25, 0.5, 0.75, 0.95]))
    return {
        "type": "box",
        "orientation": "h",
        "y": [label],
        "lowerfence": [low],
        "q1": [q1],
        "median": [median],
        "q3": [q3],
        "upperfence": [high],
        "width": 0.5,
        "line": {"color": colour, "width": 2},
        "hoverinfo": "x",
    }


def _in_order(report: Report, shape: MeasuredShape) -> list[Timing]:
    """Return the timings of the rungs from the first to the last, then any others."""
    order = {rung.name: number for number, rung in enumerate(report.rungs)}
    return sorted(shape.measurement.timings, key=lambda timing: order.get(timing.name, len(order)))


def _highlighted(report: Report, names: Sequence[str]) -> list[str]:
    chosen = report.chosen
    return [ACCENT if chosen is not None and name == chosen.name else QUIET for name in names]


def _budget(report: Report) -> float | None:
    """Return the least score in percent that the budget allows."""
    budgets = [item for name, item in report.certificates.items() if name != report.original]
    return 100 * (budgets[0].original.value - budgets[0].max_drop) if budgets else None


def _errors(intervals: Sequence[Interval], scale: float, colour: str = INK) -> Value:
    """Return whiskers from the ends of intervals; none where an end is infinite."""
    finite = [all(math.isfinite(end) for end in (item.low, item.high)) for item in intervals]
    pairs = list(zip(intervals, finite, strict=True))
    return {
        "type": "data",
        "symmetric": False,
        "array": [scale * (item.high - item.value) if known else 0.0 for item, known in pairs],
        "arrayminus": [scale * (item.value - item.low) if known else 0.0 for item, known in pairs],
        "color": colour,
        "thickness": 1.5,
        "width": 4,
    }


def _rows_layout(labels: Sequence[str], x_title: str) -> Value:
    """Return the layout of a plot with a row for each label, the first on top."""
    lines = sum(max(0, label.count("<br>") - 1) for label in labels)
    layout = plain_layout(90 + _ROW_PIXELS * len(labels) + _LINE_PIXELS * lines, x_title, "")
    layout["yaxis"] |= {"type": "category", "autorange": "reversed", "showgrid": False}
    layout["showlegend"] = False
    return layout


def plain_layout(height: int, x_title: str, y_title: str) -> Value:
    """Return the layout that all plots share, ``height`` pixels high."""
    axis: Value = {
        "gridcolor": FAINT,
        "linecolor": FAINT,
        "zerolinecolor": FAINT,
        "automargin": True,
        "fixedrange": True,
    }
    return {
        "height": height,
        "font": {"color": INK, "size": 13, "family": "system-ui, sans-serif"},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "margin": {"l": 8, "r": 16, "t": 8, "b": 8},
        "xaxis": {**axis, "title": {"text": x_title}},
        "yaxis": {**axis, "title": {"text": y_title}},
        "legend": {"orientation": "h", "y": -0.25, "yanchor": "top", "x": 0},
        "hoverlabel": {"bgcolor": "--card", "bordercolor": FAINT, "font": {"color": INK}},
        "dragmode": False,
    }


def _line(**where: Any) -> Value:
    return {"type": "line", "line": {"color": INK, "width": 1, "dash": "dash"}, **where}


def _remark(text: str, **where: Any) -> Value:
    return {"text": text, "showarrow": False, "xanchor": "right", "yanchor": "bottom", **where}


def _label(name: str, figure: str = "") -> str:
    """Return a name in lines, and a figure below it."""
    return _wrapped(name, _WRAP) + (f"<br><b>{figure}</b>" if figure else "")


def _wrapped(name: str, width: int) -> str:
    return "<br>".join(escape(line) for line in textwrap.wrap(clean(name), width)) or "?"


def escape(text: str) -> str:
    """Return ``text`` so that plotly, which reads some HTML and its own templates in labels, shows it as it is."""
    return html.escape(clean(text), quote=False).replace("%{", "%&#123;")

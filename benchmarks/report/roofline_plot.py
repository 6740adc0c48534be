"""The classic roofline plot: what each node reaches against its arithmetic intensity, below the machine's roofs."""

from __future__ import annotations

from collections.abc import Sequence

from onnx_lathe.benchmarks.limits import ModelRoofline, OperatorShare
from onnx_lathe.benchmarks.report.plots import ACCENT, QUIET, SERIES, Plot, Value, escape, plain_layout
from onnx_lathe.benchmarks.report.text import clean

_HEIGHT = 420
_MARGIN = 3.0
"""Factor by which the roofs reach beyond the nodes."""


def roofline_plots(models: Sequence[ModelRoofline]) -> tuple[Plot, ...]:
    """Return a plot for each model that multiplies anything."""
    return tuple(plot for model in models if (plot := _plot(model)) is not None)


def _plot(model: ModelRoofline) -> Plot | None:
    shown = [item for item in model.shares if item.macs and item.nbytes and item.seconds > 0]
    if not shown:
        return None
    intensities = [_intensity(item) for item in shown]
    ridge = max(model.float_rate, model.integer_rate) / model.bandwidth
    ends = (min(*intensities, ridge) / _MARGIN, max(*intensities, ridge) * _MARGIN)
    data = [
        _roof("float32 roof", model.float_rate, model.bandwidth, ends, "solid"),
        _roof("uint8 roof", model.integer_rate, model.bandwidth, ends, "dash"),
    ]
    for label, integers, colour in (("float32", False, ACCENT), ("uint8 with int8", True, SERIES[1])):
        chosen = [item for item in shown if item.integers is integers]
        data += [_dots(label, chosen, colour)] if chosen else []
    axes = plain_layout(_HEIGHT, "arithmetic intensity (MACs/byte)", "MAC/s (log scale)")
    axes["xaxis"]["type"] = axes["yaxis"]["type"] = "log"
    note = (
        "Dots: nodes that multiply. On a roof a node is as fast as the machine allows; under the slope it waits for "
        "memory, under the flat part for arithmetic. The slope is the bandwidth of the largest weights probed."
    )
    return Plot(f"Roofline, {clean(model.name)}", note, {"data": data, "layout": axes})


def _intensity(item: OperatorShare) -> float:
    return (item.macs or 0) / (item.nbytes or 1)


def _roof(name: str, rate: float, bandwidth: float, ends: tuple[float, float], dash: str) -> Value:
    points = (ends[0], rate / bandwidth, ends[1])
    return {
        "type": "scatter",
        "mode": "lines",
        "name": name,
        "x": list(points),
        "y": [min(rate, bandwidth * point) for point in points],
        "line": {"color": QUIET, "width": 2, "dash": dash},
        "hoverinfo": "skip",
    }


def _dots(name: str, items: Sequence[OperatorShare], colour: str) -> Value:
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "x": [_intensity(item) for item in items],
        "y": [(item.macs or 0) / item.seconds for item in items],
        "marker": {"color": colour, "size": 7, "opacity": 0.7},
        "text": [escape(f"{item.op_type} {item.node}") for item in items],
        "hovertemplate": "%{text}<br>%{x:.3g} MACs/byte, %{y:.3s}MAC/s<extra></extra>",
    }

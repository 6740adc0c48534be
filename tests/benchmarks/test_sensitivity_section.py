"""What layers cost and gain, as the page says and draws it."""

from __future__ import annotations

import plotly.graph_objects

from onnx_lathe.benchmarks.report.render import render_page
from onnx_lathe.benchmarks.report.sensitivity import (
    LayerCost,
    sensitivities,
    sensitivity_document,
    sensitivity_plots,
)

LAYERS = (
    LayerCost("head", "MatMul", 12.34, 0.0123, 2e-6),
    LayerCost("<b>odd</b>", "Conv", 40.0, 1e-5, -3e-5),
    LayerCost("stem", "Conv", 200.0),
)


def test_the_table_has_a_row_for_each_layer_in_order() -> None:
    section = sensitivities(LAYERS, 64)
    assert "64 samples" in section.lead
    assert [[cell.text for cell in row.cells] for row in section.tables[0].rows] == [
        ["head", "MatMul", "12.3 dB", "0.0123", "2.00 µs"],
        ["<b>odd</b>", "Conv", "40.0 dB", "1e-05", "-30.0 µs"],
        ["stem", "Conv", "200.0 dB", "—", "—"],
    ]


def test_the_plots_are_plotlys_and_escape_names() -> None:
    (drawn,) = sensitivity_plots(LAYERS).values()
    assert [plot.title for plot in drawn] == ["Each layer quantized alone", "Cost against gain"]
    bars, dots = (plot.figure["data"][0] for plot in drawn)
    assert bars["x"] == [12.34, 40.0, 200.0]
    assert drawn[0].figure["layout"]["yaxis"]["ticktext"][1] == "&lt;b&gt;odd&lt;/b&gt;"
    assert len(dots["x"]) == 2
    for plot in drawn:
        assert plotly.graph_objects.Figure(data=[{"type": plot.figure["data"][0]["type"]}]).data
    (alone,) = sensitivity_plots(LAYERS[2:]).values()
    assert len(alone) == 1


def test_the_page_escapes_names() -> None:
    page = render_page(sensitivity_document("m.onnx", "quantize-static", LAYERS, 64), sensitivity_plots(LAYERS))
    assert "Keep head (MatMul) float first." in page
    assert "<b>odd</b>" not in page

"""How near the operators came to the machine's limits, as the report says and draws it."""

from __future__ import annotations

import html
import importlib.resources
import json
import re
from dataclasses import replace

import plotly.graph_objects
import pytest

from onnx_lathe.benchmarks.limits import ModelRoofline, OperatorShare
from onnx_lathe.benchmarks.report.document import Section
from onnx_lathe.benchmarks.report.plots import Plot
from onnx_lathe.benchmarks.report.render import render_html, render_markdown
from onnx_lathe.benchmarks.report.roofline import roofline
from onnx_lathe.benchmarks.report.roofline_plot import roofline_plots
from tests.benchmarks.reports import INT8, model_roofline, small_report

FIGURES = ["MACs", "bytes", "time", "share of run", "share of limit", "bound by"]

BY_OPERATOR = [
    ["QLinearConv", "2", "30.0 M", "500 kB", "300 µs", "75.0 %", "25.0 %", "arithmetic"],
    ["MatMul", "1", "1.00 M", "2.00 MB", "60.0 µs", "15.0 %", "50.0 %", "memory"],
    ["LSTM", "1", "—", "50.0 kB", "30.0 µs", "7.5 %", "—", "unknown"],
    ["Reshape", "1", "0", "0 B", "10.0 µs", "2.5 %", "0.0 %", "overhead"],
    ["all nodes", "5", "—", "2.55 MB", "400 µs", "100.0 %", "28.4 %", "arithmetic"],
]


def section(*models: ModelRoofline) -> Section:
    made = roofline(replace(small_report(), rooflines=models))
    assert made is not None
    return made


def rows(made: Section, table: int) -> list[list[str]]:
    return [[cell.text for cell in row.cells] for row in made.tables[table].rows]


def plot(model: ModelRoofline) -> Plot:
    (drawn,) = roofline_plots([model])
    return drawn


def nodes(count: int) -> ModelRoofline:
    shares = tuple(OperatorShare(f"n{number}", "Add", 0, 100, 1e-6, 1e-7, "memory") for number in range(count))
    return replace(model_roofline(), shares=shares)


def test_operators_are_summed_and_a_sum_with_an_unknown_part_is_unknown() -> None:
    made = section(model_roofline())
    assert [table.caption for table in made.tables] == [
        f"{INT8}, by operator",
        f"{INT8}, the nodes that take longest",
    ]
    assert [column.name for column in made.tables[0].columns] == ["operator", "nodes", *FIGURES]
    assert [column.name for column in made.tables[0].columns if not column.numeric] == ["operator", "bound by"]
    assert rows(made, 0) == BY_OPERATOR


def test_nodes_stand_alone_and_only_the_longest() -> None:
    made = section(model_roofline())
    assert [column.name for column in made.tables[1].columns] == ["node", "operator", *FIGURES]
    assert rows(made, 1)[:2] == [
        ["conv1", "QLinearConv", "24.0 M", "400 kB", "200 µs", "50.0 %", "25.0 %", "arithmetic"],
        ["conv2", "QLinearConv", "6.00 M", "100 kB", "100 µs", "25.0 %", "25.0 %", "memory"],
    ]
    assert [row[0] for row in rows(section(nodes(12)), 1)] == [f"n{number}" for number in range(10)]


def test_a_sentence_says_how_near_and_over_how_much_of_the_time() -> None:
    assert section(model_roofline()).notes[0] == (
        f"{INT8}: 28.4 % of its limit over 92.5 % of the time; "
        "peaks of 120 GMAC/s (float32) and 480 GMAC/s (uint8 with int8), 32.0 GB/s, 2 threads."
    )
    unknown = replace(model_roofline(), shares=model_roofline().shares[3:4], threads=1)
    assert section(unknown).notes[0].startswith(f"{INT8}: — of its limit over 0.0 % of the time; ")
    assert section(unknown).notes[0].endswith(", 1 thread.")


def test_models_follow_each_other_and_none_is_no_section() -> None:
    made = section(model_roofline(), replace(nodes(1), name="other"))
    assert [table.caption.split(",")[0] for table in made.tables[2:]] == ["other", "other"]
    assert made.notes[1].startswith("other: 10.0 % of its limit")
    assert made.folded
    assert roofline(small_report()) is None


def test_a_model_without_nodes_has_a_row_of_nothing() -> None:
    assert rows(section(nodes(0)), 0) == [["all nodes", "0", "0", "0 B", "0.00 ns", "—", "—", "—"]]


def test_the_roofs_bend_where_arithmetic_outruns_memory() -> None:
    data = plot(model_roofline()).figure["data"]
    assert [trace["name"] for trace in data] == ["float32 roof", "uint8 roof", "float32", "uint8 with int8"]
    for roof, rate in zip(data[:2], (1.2e11, 4.8e11), strict=True):
        assert roof["x"] == pytest.approx([0.5 / 3, rate / 3.2e10, 60 * 3])
        assert roof["y"] == pytest.approx([0.5 / 3 * 3.2e10, rate, rate])


def test_dots_are_the_nodes_that_multiply() -> None:
    floats, integers = plot(model_roofline()).figure["data"][2:]
    assert (floats["x"], floats["text"]) == (pytest.approx([0.5]), ["MatMul head"])
    assert floats["y"] == pytest.approx([1e6 / 6e-5])
    assert (integers["x"], integers["text"]) == (pytest.approx([60, 60]), ["QLinearConv conv1", "QLinearConv conv2"])
    assert integers["y"] == pytest.approx([1.2e11, 6e10])
    assert roofline_plots([nodes(3), nodes(0)]) == ()


def test_plotly_accepts_the_plot_and_the_page_has_its_colours() -> None:
    drawn = plot(model_roofline())
    text = json.dumps(drawn.figure, allow_nan=False)
    figure = json.loads(re.sub(r'"--[a-z0-9-]+"', '"#123456"', text))
    plotly.graph_objects.Figure(figure)
    assert (figure["layout"]["xaxis"]["type"], figure["layout"]["yaxis"]["type"]) == ("log", "log")
    assert figure["layout"]["xaxis"]["title"]["text"] == "arithmetic intensity (MACs/byte)"
    page = (importlib.resources.files("onnx_lathe.benchmarks.report") / "report.html.jinja").read_text("utf-8")
    assert all(f"{colour}: #" in page for colour in re.findall(r'"(--[a-z0-9-]+)"', text))


def test_the_page_has_tables_and_plot_and_markdown_the_tables() -> None:
    hostile = "<b>a|b</b>"
    share = replace(model_roofline().shares[0], node=hostile)
    report = replace(small_report(), rooflines=(replace(model_roofline(), name=hostile, shares=(share,)),))
    page = render_html(report)
    assert f"Roofline, {html.escape(hostile)}" in page
    assert hostile not in page
    markdown = render_markdown(report)
    assert "## Share of the machine's limit" in markdown
    assert r"\<b\>a\|b\</b\>" in markdown

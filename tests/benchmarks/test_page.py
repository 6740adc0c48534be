"""Every page in a browser: nothing loaded, nothing complained of, every plot drawn, light and dark."""

from __future__ import annotations

import io
import re
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from onnx_lathe.benchmarks.report.history import history_document, history_plots
from onnx_lathe.benchmarks.report.model import Report, Rung
from onnx_lathe.benchmarks.report.render import render_html, render_page
from onnx_lathe.benchmarks.suite import Suite
from onnx_lathe.converter.attribute import attribute
from onnx_lathe.runtime import tensors
from onnx_lathe.runtime.samples import Samples
from tests import graphs
from tests.benchmarks.browser import addresses, needs_chromium, picture, show
from tests.benchmarks.reports import full_report, graph_difference, small_report
from tests.benchmarks.suites import server, suite, under

HOSTILE = "<script>console.error('ran')</script><img src=x onerror=console.error('ran')>"

IMAGE = """
image (float[batch, 3, 12, 12] x) => (float[batch, 4] y) <float[432, 4] w> { flat = Flatten (x)  y = MatMul (flat, w) }
"""
TEXT = """
text (int64[batch, seq] ids) => (float[batch, 2] y) <float[50, 2] table, int64[1] along = {1}>
{ rows = Gather (table, ids)  y = ReduceSum <keepdims = 0> (rows, along) }
"""


def attribution(text: str) -> str:
    """Return what ``lathe attribute`` writes of a model with two sets of weights: pictures, or marked tokens."""
    with tempfile.TemporaryDirectory() as folder:
        a, b = (graphs.save(graphs.build(text, seed), Path(folder) / f"{seed}.onnx") for seed in range(2))
        data = Samples(tuple(tensors.random_feeds(a, {"batch": 1}, seed) for seed in range(4)))
        attribute(a, b, data, samples=2, evaluations=60, output=Path(folder) / "page.html")
        return (Path(folder) / "page.html").read_text("utf-8")


def hostile() -> Report:
    """Return a report whose names are markup."""
    report = small_report()
    changed = replace(graph_difference(), before=HOSTILE, operators_before={HOSTILE: 3})
    rungs = (*report.rungs, Rung(HOSTILE, HOSTILE, file_bytes=10, executed={HOSTILE: 1}))
    return replace(report, title=HOSTILE, rungs=rungs, difference=changed)


def results() -> list[Suite]:
    """Return results of two models over three days, one with a name that is markup."""
    return [suite(f"2026-01-0{day}T00:00:00+00:00", {HOSTILE: 0.001 * day, "n": 0.002}) for day in range(1, 4)]


def timeline() -> str:
    """Return a history, with a result under load."""
    found = [*results(), under("2026-01-04T00:00:00+00:00", server())]
    return render_page(history_document("h.jsonl", found), history_plots(found))


PAGES: dict[str, tuple[Callable[[], str], int]] = {
    "small": (lambda: render_html(small_report()), 4),
    "full": (lambda: render_html(full_report()), 7),
    "remembering": (lambda: render_html(replace(small_report(), history=tuple(results()))), 5),
    "hostile": (lambda: render_html(hostile()), 4),
    "pictures": (lambda: attribution(IMAGE), 0),
    "tokens": (lambda: attribution(TEXT), 0),
    "history": (timeline, 1),
}
"""The pages, and how many plots each has."""


@needs_chromium
@pytest.mark.parametrize("name", PAGES)
def test_a_browser_draws_every_plot_without_complaint_or_network(name: str, tmp_path: Path) -> None:
    make, plots = PAGES[name]
    page = tmp_path / "page.html"
    content = make()
    page.write_text(content, encoding="utf-8")
    shown = show(page)
    assert shown.console == ()
    assert addresses(content) == []
    assert len(re.findall(r'class="plot js-plotly-plot"', shown.dom)) == plots
    drawn = re.findall(r'<div class="plot js-plotly-plot".*?(<svg class="main-svg".*?</svg>)', shown.dom, re.DOTALL)
    assert len(drawn) == plots


@needs_chromium
@pytest.mark.parametrize("name", ["full", "pictures", "tokens"])
def test_light_and_dark_follow_the_reader(name: str, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(PAGES[name][0](), encoding="utf-8")
    light, dark = (
        np.asarray(Image.open(io.BytesIO(picture(page, tmp_path / f"{theme}.png", theme))).convert("L"))
        for theme in ("light", "dark")
    )
    assert light[2, 2] > 200
    assert dark[2, 2] < 60
    assert np.median(light) > 200
    assert np.median(dark) < 60


@needs_chromium
def test_a_complaint_and_an_address_would_be_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("<script>console.warn('told')</script><img src='http://a.example/x.png'>", encoding="utf-8")
    assert any("told" in line for line in show(page).console)
    assert addresses(page.read_text()) == ["http://a.example/x.png"]

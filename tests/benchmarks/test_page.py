"""Every page in a browser: nothing loaded, nothing complained of, every plot drawn, light and dark."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from onnx_lathe.benchmarks.report.document import Document, Mark, Panel, Section, Strip
from onnx_lathe.benchmarks.report.history import history_document, history_plots
from onnx_lathe.benchmarks.report.model import Report, Rung
from onnx_lathe.benchmarks.report.render import render_html, render_page
from tests.benchmarks.browser import addresses, needs_chromium, picture, show
from tests.benchmarks.reports import full_report, graph_difference, small_report
from tests.benchmarks.suites import suite

HOSTILE = "<script>console.error('ran')</script><img src=x onerror=console.error('ran')>"


def attribution() -> str:
    """Return a page with pictures and marked text, as those of attributions have."""
    content = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), 128, np.uint8)).save(content, "png")
    panels = (Panel("A", image=content.getvalue()), Panel("B", marks=(Mark("good", 0.9), Mark("bad", -0.5))))
    section = Section("samples", "Samples", strips=(Strip("sample 1", "answer 3", panels),))
    return render_page(Document("Why?", "agree", "as far as the noise floor", "They agree.", "", (), (), (section,)))


def hostile() -> Report:
    """Return a report whose names are markup."""
    report = small_report()
    changed = replace(graph_difference(), before=HOSTILE, operators_before={HOSTILE: 3})
    rungs = (*report.rungs, Rung(HOSTILE, HOSTILE, file_bytes=10, executed={HOSTILE: 1}))
    return replace(report, title=HOSTILE, rungs=rungs, difference=changed)


def timeline() -> str:
    """Return a history of two models, one with a name that is markup."""
    results = [suite(f"2026-01-0{day}T00:00:00+00:00", {HOSTILE: 0.001 * day, "n": 0.002}) for day in range(1, 4)]
    return render_page(history_document("h.jsonl", results), history_plots(results))


PAGES: dict[str, tuple[Callable[[], str], int]] = {
    "small": (lambda: render_html(small_report()), 4),
    "full": (lambda: render_html(full_report()), 7),
    "hostile": (lambda: render_html(hostile()), 4),
    "attribution": (attribution, 0),
    "history": (timeline, 1),
}
"""The pages, and how many plots each has."""


@needs_chromium
@pytest.mark.parametrize("name", PAGES)
def test_a_browser_draws_every_plot_without_complaint_or_network(name: str, tmp_path: Path) -> None:
    make, plots = PAGES[name]
    page = tmp_path / "page.html"
    page.write_text(make(), encoding="utf-8")
    shown = show(page)
    assert shown.console == ()
    assert addresses(make()) == []
    assert len(re.findall(r'class="plot js-plotly-plot"', shown.dom)) == plots
    drawn = re.findall(r'<div class="plot js-plotly-plot".*?(<svg class="main-svg".*?</svg>)', shown.dom, re.DOTALL)
    assert len(drawn) == plots


@needs_chromium
@pytest.mark.parametrize("name", ["full", "attribution"])
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
